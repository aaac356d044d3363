"""TensorRT, written to the documented interface of version 10.

Its libraries could not be installed where this was written: the calls are tested against a stand-in
that records them, and nobody has run them on a GPU yet. Calibrated int8 is left out (the calibrator
interface is deprecated); quantised plans on GPUs go through torchao.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli.base.errors import SuanliError
from suanli.base.lazy import need
from suanli.base.plan import BackendSpec, Plan
from suanli.engines.backend import BuildNote, LayerTime, Runner
from suanli.engines.backends._pieces import batch_of, check_split
from suanli.engines.onnx_export import program_onnx

if TYPE_CHECKING:
    import torch

    from suanli.base.signature import Signature
    from suanli.engines.program import Program

_INSTALL = "pip install tensorrt-cu12"
_FILE = "model.plan"
_WORKSPACE_BYTES = 4 * 2**30
# Flags that allow a precision; fp32 is always allowed.
_FLAGS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "tf32": ("TF32",),
    "fp16": ("TF32", "FP16"),
    "bf16": ("TF32", "BF16"),
}


class TensorRtBackend:
    """Builds a serialised engine from ONNX and runs it on torch's stream."""

    spec = BackendSpec(
        name="tensorrt",
        install=_INSTALL,
        packages=("tensorrt", "onnx", "onnxscript"),
        devices=("cuda",),
        precisions={"cuda": ("fp16", "bf16", "tf32", "fp32")},
        options={"level": (3, 5)},
        build_s=60.0,
        promise={"fp16": 0.15, "bf16": 0.2, "tf32": 0.4, "fp32": 0.7},
        needs_onnx=True,
    )

    def build(
        self,
        program: "Program",
        plan: Plan,
        folder: Path,
        calibration: "Sequence[tuple[torch.Tensor, ...]] | None" = None,
    ) -> BuildNote:
        """Write model.plan for every batch from 1 to the largest; see `Backend.build`."""
        trt = need("tensorrt", _INSTALL)
        check_split(program.signature, plan)
        if plan.quantized or plan.float_operators or plan.precision not in _FLAGS:
            raise SuanliError(f"tensorrt is not offered for {plan.title}")
        if plan.streams > 1 or plan.sub_batch:
            raise SuanliError("tensorrt runs a batch as a whole")
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        network = builder.create_network(0)
        _parse(trt, network, program_onnx(program))
        config = _config(trt, builder, plan)
        if program.signature.dynamic:
            config.add_optimization_profile(_profile(builder, program))
        serialized = builder.build_serialized_network(network, config)
        if serialized is None:
            raise SuanliError("tensorrt found no implementation for a layer of the model")
        (folder / _FILE).write_bytes(bytes(serialized))
        return BuildNote(plan=plan, details={"tensorrt": str(trt.__version__)})

    def load(self, program: "Program", plan: Plan, folder: Path) -> Runner:
        """Deserialise the engine: native code, so the folder must be trusted."""
        return _Runner(program.signature, plan, folder / _FILE)


def _parse(trt: Any, network: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if not parser.parse_from_file(str(path)):
        reasons = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
        raise SuanliError(f"tensorrt cannot read the model: {(reasons or ['no reason given'])[0]}")


def _config(trt: Any, builder: Any, plan: Plan) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    config.builder_optimization_level = int(plan.options.get("level", 3))
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and fp32 plans must be fp32
    for name in _FLAGS[plan.precision]:
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is None:
            raise SuanliError(f"tensorrt {trt.__version__} cannot be asked for {plan.precision}")
        config.set_flag(flag)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    return config


def _profile(builder: Any, program: "Program") -> Any:
    """Shapes from one sample to the largest batch, tuned at the batch of the example inputs."""
    largest = program.signature.max_batch
    typical = min(max(program.meta.batch, 1), largest)
    profile = builder.create_optimization_profile()
    for spec in program.signature.inputs:
        shapes = [
            tuple(batch if size == -1 else size for size in spec.shape)
            for batch in (1, typical, largest)
        ]
        profile.set_shape(spec.name, *shapes)
    return profile


class _Runner:
    """One execution context; calls are ordered on torch's current stream."""

    def __init__(self, signature: "Signature", plan: Plan, path: Path) -> None:
        import torch

        self._trt = need("tensorrt", _INSTALL)
        self._signature = signature
        self._device = torch.device(plan.device)
        with torch.cuda.device(self._device):
            self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
            self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self._engine is None:
                raise SuanliError("this tensorrt or this GPU is not the one the engine is for")
            self._context = self._engine.create_execution_context()
        self._names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        self._lock = threading.Lock()

    def __call__(self, inputs: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
        import torch

        tensors = [tensor.to(self._device).contiguous() for tensor in inputs]
        with self._lock, torch.cuda.device(self._device):
            outputs = self._bound(tensors)
            stream = torch.cuda.current_stream(self._device).cuda_stream
            if not self._context.execute_async_v3(stream):
                raise SuanliError("tensorrt could not start the engine")
        return outputs

    def layer_times(self, inputs: "Sequence[torch.Tensor]") -> list[LayerTime]:
        """Times that TensorRT's own profiler reports for one call."""
        import torch

        times: dict[str, float] = {}

        class _Profiler(self._trt.IProfiler):  # type: ignore[name-defined, misc]
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times[layer_name] = ms

        self._context.profiler = _Profiler()
        self(inputs)
        torch.cuda.synchronize(self._device)
        self._context = self._engine.create_execution_context()  # a profiler cannot be taken off
        return [LayerTime(name=name, kind="", time_ms=ms) for name, ms in times.items()]

    def close(self) -> None:
        """Give back the context and the engine."""
        with self._lock:
            self._context = self._engine = self._runtime = None

    def _bound(self, tensors: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
        import torch

        batch = batch_of(self._signature, tensors)
        for spec, tensor in zip(self._signature.inputs, tensors, strict=True):
            if spec.name not in self._names:
                continue  # an input that the model does not use
            if not self._context.set_input_shape(spec.name, tuple(tensor.shape)):
                raise SuanliError(f"tensorrt refuses {spec.name} {list(tensor.shape)}")
            self._context.set_tensor_address(spec.name, tensor.data_ptr())
        outputs = []
        for spec in self._signature.outputs:
            shape = [batch if size == -1 else size for size in spec.shape]
            dtype = getattr(torch, spec.dtype)
            output = torch.empty(shape, dtype=dtype, device=self._device)
            self._context.set_tensor_address(spec.name, output.data_ptr())
            outputs.append(output)
        return outputs


BACKEND = TensorRtBackend()
