"""ONNX Runtime: the CPU provider, and the CUDA and TensorRT providers where they are installed.

On the CPU only fp32 is offered. ONNX Runtime has no bf16 kernels there, and its own static int8
(QDQ, per channel) was never competitive where OpenVINO runs too: ResNet-50 on one core with AMX
took 16 ms against 4.5 ms, BERT-base 40 ms against 24 ms. It still wins for networks of a few
microseconds, where the cost of a call decides.

The GPU providers are written to their documentation and tested with a stand-in for the library;
nobody has run them on a GPU yet.
"""

import json
import shutil
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from suanli.base.errors import MissingBackendError, SuanliError
from suanli.base.lazy import need
from suanli.base.plan import BackendSpec, Plan
from suanli.devices.cpu_facts import usable_cores
from suanli.engines._quiet import quiet
from suanli.engines.backend import BuildNote, LayerTime, Runner
from suanli.engines.backends._onnx_profile import Origins, layer_events
from suanli.engines.backends._pieces import (
    arrays_of,
    batch_of,
    check_split,
    fresh_outputs,
    pieces,
)
from suanli.engines.onnx_export import program_onnx

if TYPE_CHECKING:
    import torch

    from suanli.base.signature import Signature
    from suanli.engines.program import Program

_INSTALL = 'pip install "onnxruntime>=1.23" "onnx>=1.18" "onnxscript>=0.5"'
_INSTALL_GPU = 'pip install "onnxruntime-gpu>=1.23" "onnx>=1.18" "onnxscript>=0.5"'
_FILE = "model.onnx"
_ERRORS_ONLY = 3


class OnnxRuntimeBackend:
    """Ships plain ONNX and opens sessions on it."""

    spec = BackendSpec(
        name="onnxruntime",
        install=_INSTALL,
        packages=("onnxruntime", "onnx", "onnxscript"),
        devices=("cpu", "cuda"),
        precisions={"cpu": ("fp32",), "cuda": ("tf32", "fp16", "fp32")},
        options={"provider": ("cuda", "tensorrt")},
        option_needs={"provider": ("cuda",)},
        build_s=7.0,
        promise={"fp32": 0.55, "cuda/fp32": 0.9, "cuda/tf32": 0.6, "cuda/fp16": 0.4},
        streams=True,
        needs_onnx=True,
    )

    def build(
        self,
        program: "Program",
        plan: Plan,
        folder: Path,
        calibration: "Sequence[tuple[torch.Tensor, ...]] | None" = None,
    ) -> BuildNote:
        """Write model.onnx, in half precision where the plan says so; see `Backend.build`."""
        check_split(program.signature, plan)
        runtime = _runtime(plan)
        if plan.quantized or plan.float_operators:
            raise SuanliError("onnxruntime is offered in floating point of one precision only")
        if plan.precision not in self.spec.precisions[_kind(plan)]:
            raise SuanliError(f"onnxruntime does not offer {plan.precision} on {plan.device}")
        source = program_onnx(program)
        if plan.precision == "fp16" and plan.options.get("provider") != "tensorrt":
            _write_half(source, folder / _FILE)
        else:
            for file in source.parent.iterdir():
                shutil.copyfile(file, folder / file.name)
        return BuildNote(plan=plan, details={"onnxruntime": str(runtime.__version__)})

    def load(self, program: "Program", plan: Plan, folder: Path) -> Runner:
        """Open the file; sessions are made on the first call that needs them."""
        if _kind(plan) == "cuda":
            return _CudaRunner(program.signature, plan, folder / _FILE)
        return _CpuRunner(program.signature, plan, folder / _FILE)


def session_options(runtime: Any, plan: Plan, threads: int) -> Any:
    """Options of one session with that many threads."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    if plan.streams > 1:
        # streams fill the cores; a thread that waits busily takes one from its neighbour
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def providers(plan: Plan, stream: int | None = None) -> list[Any]:
    """Execution providers of a plan with their options, the preferred one first.

    Args:
        plan: A plan of this backend.
        stream: CUDA stream (an address) on which the session must work.
    """
    cpu: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
    if _kind(plan) == "cpu":
        return [cpu]
    number = plan.device.partition(":")[2] or "0"
    common = {"device_id": number}
    if stream is not None:
        common |= {"user_compute_stream": str(stream)}
    tf32 = "0" if plan.precision == "fp32" else "1"
    cuda = ("CUDAExecutionProvider", common | {"use_tf32": tf32})
    if plan.options.get("provider") != "tensorrt":
        return [cuda, cpu]
    half = "True" if plan.precision == "fp16" else "False"
    tensorrt = ("TensorrtExecutionProvider", common | {"trt_fp16_enable": half})
    return [tensorrt, cuda, cpu]


class _CpuRunner:
    """Answers any batch; a call that is one piece runs on all the plan's threads."""

    concurrent = True  # by a lock of its own

    def __init__(self, signature: "Signature", plan: Plan, path: Path) -> None:
        self._runtime = _runtime(plan)
        self._signature, self._plan, self._path = signature, plan, path
        self._names = [spec.name for spec in signature.inputs]
        self._cuts = plan.streams > 1 or plan.sub_batch > 0
        self._sessions: dict[str, list[Any]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __call__(self, inputs: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
        arrays = arrays_of(inputs)
        with self._lock:
            if not self._cuts:
                return self._whole(arrays)
            batch = batch_of(self._signature, inputs)
            cuts = pieces(batch, self._plan.streams, self._plan.sub_batch)
            if len(cuts) == 1:
                return self._whole(arrays)
            return self._cut(arrays, batch, cuts)

    def layer_times(self, inputs: "Sequence[torch.Tensor]") -> list[LayerTime]:
        """Times by ONNX Runtime's profiler, in a session opened for it."""
        arrays = arrays_of(inputs)
        with self._lock:
            return _profiled(self._runtime, self._plan, self._path, self._feed(arrays))

    def close(self) -> None:
        """Give back sessions and threads."""
        with self._lock:
            self._sessions.clear()
            if self._pool is not None:
                self._pool.shutdown()
                self._pool = None

    def _feed(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._names, arrays, strict=True))

    def _whole(self, arrays: Sequence[np.ndarray]) -> "list[torch.Tensor]":
        import torch

        (session,) = self._opened("whole", 1, _all_threads(self._plan))
        return [torch.from_numpy(np.asarray(a)) for a in session.run(None, self._feed(arrays))]

    def _cut(
        self, arrays: Sequence[np.ndarray], batch: int, cuts: Sequence[tuple[int, int]]
    ) -> "list[torch.Tensor]":
        import torch

        streams = self._plan.streams
        threads = max(1, _all_threads(self._plan) // streams)
        # a session of one thread computes in the caller's thread, so streams can share it
        sessions = self._opened("cut", 1 if threads == 1 else streams, threads)
        specs = self._signature.outputs
        types = [getattr(torch, spec.dtype) for spec in specs]
        outputs = fresh_outputs([spec.shape for spec in specs], types, batch)
        targets = [tensor.numpy() for tensor in outputs]

        def work(stream: int) -> None:
            session = sessions[stream % len(sessions)]
            for start, stop in cuts[stream::streams]:
                results = session.run(None, self._feed(self._part(arrays, start, stop)))
                for target, result in zip(targets, results, strict=True):
                    target[start:stop] = result

        if streams == 1:
            work(0)
            return outputs
        if self._pool is None:
            self._pool = ThreadPoolExecutor(streams, thread_name_prefix="onnxruntime")
        waiting = [self._pool.submit(work, stream) for stream in range(streams)]
        errors = [future.exception() for future in waiting]  # all have ended before one is raised
        for error in errors:
            if error is not None:
                raise error
        return outputs

    def _part(self, arrays: Sequence[np.ndarray], start: int, stop: int) -> list[np.ndarray]:
        return [
            array[start:stop] if spec.batched else array
            for array, spec in zip(arrays, self._signature.inputs, strict=True)
        ]

    def _opened(self, use: str, count: int, threads: int) -> list[Any]:
        if use not in self._sessions:
            self._sessions[use] = [
                _session(self._runtime, self._plan, self._path, threads) for _ in range(count)
            ]
        return self._sessions[use]


class _CudaRunner:
    """One session whose inputs and outputs stay on the GPU, ordered with torch's stream."""

    def __init__(self, signature: "Signature", plan: Plan, path: Path) -> None:
        import torch

        self._runtime = _runtime(plan)
        self._signature, self._plan, self._path = signature, plan, path
        self._device = torch.device(plan.device)
        self._number = self._device.index or 0
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._types = [getattr(torch, spec.dtype) for spec in signature.outputs]
        self._session = _session(self._runtime, plan, path, 0, self._stream.cuda_stream)

    def __call__(self, inputs: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
        import torch

        tensors = [tensor.to(self._device).contiguous() for tensor in inputs]
        batch = batch_of(self._signature, tensors)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            shapes = [spec.shape for spec in self._signature.outputs]
            outputs = [
                torch.empty([batch if n == -1 else n for n in shape], dtype=t, device=self._device)
                for shape, t in zip(shapes, self._types, strict=True)
            ]
        binding = self._session.io_binding()
        for spec, tensor in zip(self._signature.inputs, tensors, strict=True):
            binding.bind_input(*self._place(spec.name, tensor))
            tensor.record_stream(self._stream)
        for spec, tensor in zip(self._signature.outputs, outputs, strict=True):
            binding.bind_output(*self._place(spec.name, tensor))
            tensor.record_stream(current)
        self._session.run_with_iobinding(binding)
        current.wait_stream(self._stream)
        return outputs

    def layer_times(self, inputs: "Sequence[torch.Tensor]") -> list[LayerTime]:
        """Times by ONNX Runtime's profiler, in a session opened for it."""
        arrays = [tensor.detach().cpu().contiguous().numpy() for tensor in inputs]
        names = [spec.name for spec in self._signature.inputs]
        feed = dict(zip(names, arrays, strict=True))
        return _profiled(self._runtime, self._plan, self._path, feed)

    def close(self) -> None:
        """Give back the session."""
        self._session = None

    def _place(self, name: str, tensor: "torch.Tensor") -> tuple[Any, ...]:
        kind = np.dtype(str(tensor.dtype).removeprefix("torch.")).type
        return (name, "cuda", self._number, kind, tuple(tensor.shape), tensor.data_ptr())


def _kind(plan: Plan) -> str:
    return plan.device.partition(":")[0]


def _all_threads(plan: Plan) -> int:
    return plan.threads * plan.streams or usable_cores()


def _runtime(plan: Plan) -> Any:
    """Import the library with the provider that the plan needs.

    Raises:
        MissingBackendError: The library or the provider is absent.
    """
    runtime = need("onnxruntime", _INSTALL)
    if _kind(plan) == "cpu":
        return runtime
    if hasattr(runtime, "preload_dlls"):
        with quiet():
            runtime.preload_dlls()  # takes CUDA and cuDNN from where torch has them
    tensorrt = plan.options.get("provider") == "tensorrt"
    wanted = "TensorrtExecutionProvider" if tensorrt else "CUDAExecutionProvider"
    if wanted not in runtime.get_available_providers():
        raise MissingBackendError(f"onnxruntime with {wanted}", _INSTALL_GPU)
    return runtime


def _session(runtime: Any, plan: Plan, path: Path, threads: int, stream: int | None = None) -> Any:
    return _opened_session(
        runtime, path, session_options(runtime, plan, threads), providers(plan, stream)
    )


def _opened_session(runtime: Any, path: Path, options: Any, chosen: list[Any]) -> Any:
    try:
        session = runtime.InferenceSession(str(path), sess_options=options, providers=chosen)
    except Exception as error:  # the library's exceptions share no base class
        text = str(error).strip() or type(error).__name__
        raise SuanliError(
            f"onnxruntime cannot open the model: {text.splitlines()[0][:300]}"
        ) from error
    first = chosen[0][0]
    if first not in session.get_providers():
        raise SuanliError(f"onnxruntime fell back from {first}; its libraries do not load")
    return session


def _profiled(runtime: Any, plan: Plan, path: Path, feed: dict[str, np.ndarray]) -> list[LayerTime]:
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(runtime, plan, _all_threads(plan))
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "run")
        session = _opened_session(runtime, path, options, providers(plan))
        for _ in range(2):  # the first call also makes room
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return layer_events(events, Origins(path))


def _write_half(source: Path, target: Path) -> None:
    """Convert the weights and products to fp16; inputs and outputs keep their types."""
    onnx = need("onnx", _INSTALL_GPU)
    with quiet():
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
    large = model.ByteSize() > 1_500_000_000
    onnx.save(model, str(target), save_as_external_data=large, location=f"{_FILE}.data")


BACKEND = OnnxRuntimeBackend()
