"""ONNX Runtime answers like torch on the CPU; on CUDA the right calls are made."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from suanli.base.errors import MissingBackendError, SuanliError
from suanli.base.plan import Plan, Quantization
from suanli.engines.backend import Runner
from suanli.engines.backends import onnxruntime as backend
from suanli.engines.backends._onnx_profile import Origins, layer_events
from suanli.engines.backends.onnxruntime import BACKEND, providers
from suanli.engines.onnx_export import program_onnx
from suanli.engines.program import Program
from tests import small_programs as small

FP32 = Plan(backend="onnxruntime")
CUDA = Plan(backend="onnxruntime", device="cuda:1")


@pytest.fixture(scope="module", params=["conv", "bert", "gpt2", "resnet"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return small.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def conv(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return small.build("conv", tmp_path_factory.mktemp("conv"))


def opened(program: Program, plan: Plan, folder: Path) -> Runner:
    folder.mkdir(exist_ok=True)
    note = BACKEND.build(program, plan, folder)
    return BACKEND.load(program, note.plan, folder)


@pytest.mark.parametrize(
    "plan",
    [
        FP32,
        FP32.with_(threads=1),
        FP32.with_(streams=2, threads=1),
        FP32.with_(streams=2, threads=2, sub_batch=1),
        FP32.with_(sub_batch=2),
    ],
    ids=lambda plan: plan.title,
)
def test_answers_like_torch_at_any_batch(program: Program, plan: Plan, tmp_path: Path) -> None:
    runner = opened(program, plan, tmp_path)
    for batch in (1, 3, 5, small.MAX_BATCH, 1):
        flat = small.fresh_inputs(program, batch)
        assert small.worst_error(runner(flat), small.eager(program, flat)) < 1e-5
    runner.close()


@pytest.mark.parametrize("plan", [FP32, FP32.with_(streams=2, threads=1)], ids=lambda p: p.title)
def test_results_are_not_touched_by_later_calls(conv: Program, plan: Plan, tmp_path: Path) -> None:
    runner = opened(conv, plan, tmp_path)
    first = runner(small.fresh_inputs(conv, 4))
    kept = [tensor.clone() for tensor in first]
    for _ in range(3):
        runner([torch.full_like(t, 7.0) for t in conv.inputs(4)])
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_an_error_in_one_stream_comes_out(conv: Program, tmp_path: Path) -> None:
    runner = opened(conv, FP32.with_(streams=2, threads=1), tmp_path)
    with pytest.raises(Exception, match=r"invalid dimensions|INVALID_ARGUMENT"):
        runner([torch.zeros(4, 5, 16, 16)])
    flat = small.fresh_inputs(conv, 4)
    assert small.worst_error(runner(flat), small.eager(conv, flat)) < 1e-5


def test_layer_times_name_modules(program: Program, tmp_path: Path) -> None:
    layers = opened(program, FP32, tmp_path).layer_times(program.inputs(3))
    modules = {name for name, _ in program.exported_module().named_modules()}
    assert sum(layer.time_ms for layer in layers) > 0
    assert len({la.origin for la in layers if la.origin and la.origin[0] in modules}) >= 2
    products = [la for la in layers if la.kind in ("Conv", "Gemm", "FusedConv", "MatMul")]
    assert {la.precision for la in products} == {"fp32"}
    weights = {name.removesuffix(".weight") for name in program.weights}
    own = [la.origin[0] for la in products if la.origin and la.origin[0] in weights]
    assert len(set(own)) >= 4, "no product is named after the module whose weights it uses"


def test_only_the_last_call_of_a_profile_counts() -> None:
    def event(name: str, us: int, **args: Any) -> dict[str, Any]:
        return {"cat": "Node", "name": name, "dur": us, "args": args}

    events = [
        {"cat": "Session", "name": "model_run", "dur": 999},
        event("conv_kernel_time", 5000, op_name="Conv"),
        event("conv_kernel_time", 2500, op_name="Conv", input_type_shape=[{"float16": [1]}]),
        event("conv_fence_before", 7),
    ]
    (layer,) = layer_events(events, SimpleNamespace(of=lambda name, kind: (name, kind)))
    assert (layer.time_ms, layer.kind, layer.precision) == (2.5, "Conv", "fp16")
    assert layer.origin == ("conv", "Conv")


def test_a_fused_layer_names_all_its_modules(conv: Program) -> None:
    origins = Origins(program_onnx(conv))
    assert origins.of("relu_nchwc", "Conv")[0] == "0.first"
    assert origins.of("relu", "FusedConv")[0] == "0.first"
    assert origins.of("made_up", "Conv") == ()


def test_plans_that_are_not_for_it_are_refused(conv: Program, tmp_path: Path) -> None:
    for plan, reason in (
        (FP32.with_(precision="bf16"), "does not offer bf16 on cpu"),
        (FP32.with_(quantization=Quantization(scheme="int8-static")), "floating point"),
        (FP32.with_(float_operators=("0.first",)), "one precision only"),
    ):
        with pytest.raises(SuanliError, match=reason):
            BACKEND.build(conv, plan, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_one_clear_line(conv: Program, tmp_path: Path) -> None:
    BACKEND.build(conv, FP32, tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not onnx")
    with pytest.raises(SuanliError, match="cannot open the model") as caught:
        BACKEND.load(conv, FP32, tmp_path)(conv.inputs(1))
    assert "\n" not in str(caught.value)


def test_the_engine_shares_no_file_with_the_program(conv: Program, tmp_path: Path) -> None:
    BACKEND.build(conv, FP32, tmp_path)
    original = (conv.folder / "onnx" / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(b"changed")
    assert (conv.folder / "onnx" / "model.onnx").read_bytes() == original


# -- CUDA: what is asked of the library, without a GPU -----------------------------------------


def test_providers_and_their_options() -> None:
    assert providers(FP32) == [("CPUExecutionProvider", {})]
    (name, options), fallback = providers(CUDA, 77)
    assert name == "CUDAExecutionProvider"
    assert options == {"device_id": "1", "user_compute_stream": "77", "use_tf32": "0"}
    assert fallback[0] == "CPUExecutionProvider"
    assert providers(CUDA.with_(precision="tf32"))[0][1]["use_tf32"] == "1"
    through = CUDA.with_(precision="fp16", options={"provider": "tensorrt"})
    chosen = providers(through)
    assert [entry[0] for entry in chosen][:2] == [
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
    ]
    assert chosen[0][1]["trt_fp16_enable"] == "True"


def test_without_the_gpu_build_the_install_command_is_named(conv: Program, tmp_path: Path) -> None:
    with pytest.raises(MissingBackendError, match="onnxruntime-gpu"):
        BACKEND.build(conv, CUDA, tmp_path)


def test_half_precision_keeps_the_types_of_inputs_and_outputs(
    conv: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    real = backend._runtime(FP32)
    monkeypatch.setattr(backend, "_runtime", lambda plan: real)
    BACKEND.build(conv, CUDA.with_(precision="fp16"), tmp_path)
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    weights = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 4}
    assert weights == {onnx.TensorProto.FLOAT16}
    flat = small.fresh_inputs(conv, 2)
    values = BACKEND.load(conv, FP32, tmp_path)(flat)
    error = small.worst_error(values, small.eager(conv, flat))
    assert 1e-6 < error < 0.02


class FakeBinding:
    def __init__(self) -> None:
        self.inputs: list[tuple[Any, ...]] = []
        self.outputs: list[tuple[Any, ...]] = []

    def bind_input(self, *where: Any) -> None:
        self.inputs.append(where)

    def bind_output(self, *where: Any) -> None:
        self.outputs.append(where)


class FakeStream:
    """Records which stream waits for which."""

    log: ClassVar[list[str]] = []

    def __init__(self, device: Any = None, name: str = "own") -> None:
        self.name, self.cuda_stream = name, 4321

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_a_cuda_call_binds_memory_and_orders_streams(
    conv: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeStream.log = []
    seen: dict[str, Any] = {}

    class Session:
        def __init__(self, path: str, sess_options: Any, providers: Any) -> None:
            seen["providers"] = providers

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def io_binding(self) -> FakeBinding:
            return FakeBinding()

        def run_with_iobinding(self, binding: FakeBinding) -> None:
            FakeStream.log.append("run")
            seen["binding"] = binding

    real = backend._runtime(FP32)
    fake = SimpleNamespace(
        **{
            name: getattr(real, name)
            for name in ("SessionOptions", "ExecutionMode", "GraphOptimizationLevel")
        },
        InferenceSession=Session,
    )
    monkeypatch.setattr(backend, "_runtime", lambda plan: fake)
    current = FakeStream(name="current")
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    runner = backend._CudaRunner(conv.signature, CUDA, tmp_path)
    runner._device = torch.device("cpu")  # memory that exists here; all else stays as on a GPU
    flat = small.fresh_inputs(conv, 3)
    (output,) = runner(flat)
    assert seen["providers"][0][1]["user_compute_stream"] == "4321"
    (bound,) = seen["binding"].inputs
    assert bound[:3] == (conv.signature.inputs[0].name, "cuda", 1)
    assert bound[4:] == ((3, 3, 16, 16), flat[0].data_ptr())
    assert seen["binding"].outputs[0][4:] == ((3, 10), output.data_ptr())
    assert FakeStream.log == ["own waits for current", "run", "current waits for own"]


@pytest.mark.gpu
@pytest.mark.skipif(sys.platform != "linux", reason="the GPU build is for Linux")
def test_on_a_gpu_it_answers_like_torch(program: Program, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    plan = FP32.with_(device="cuda:0")
    runner = opened(program, plan, tmp_path)
    for batch in (1, small.MAX_BATCH):
        flat = small.fresh_inputs(program, batch)
        values = [t.cpu() for t in runner([t.cuda() for t in flat])]
        assert small.worst_error(values, small.eager(program, flat)) < 1e-4
