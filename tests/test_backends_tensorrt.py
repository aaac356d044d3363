"""What is asked of TensorRT, recorded by a stand-in for its documented interface."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from suanli.base.errors import MissingBackendError, SuanliError
from suanli.base.plan import Plan, Quantization
from suanli.engines.backends import status
from suanli.engines.backends.tensorrt import BACKEND
from suanli.engines.program import Program
from tests import small_programs as small

FP32 = Plan(backend="tensorrt", device="cuda:0")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    pytest.importorskip("onnxscript")
    return small.build("conv", tmp_path_factory.mktemp("conv"))


class FakeTensorRt(ModuleType):
    """Records calls. Unknown attributes fail, so a call that TensorRT 10 lacks is seen."""

    __version__ = "10.9.0"

    def __init__(self, *, parses: bool = True, builds: bool = True) -> None:
        super().__init__("tensorrt")
        self.calls: list[tuple[Any, ...]] = []
        self.flags: set[str] = {"TF32"}  # on unless it is switched off
        self.config = SimpleNamespace()
        self._parses, self._builds = parses, builds
        self.BuilderFlag = SimpleNamespace(FP16="FP16", BF16="BF16", TF32="TF32")
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="WORKSPACE")
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
        self.IProfiler = object

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None: ...

    def Builder(self, logger: Any) -> Any:
        def build(network: Any, config: Any) -> bytes | None:
            self.calls.append(("build", config.builder_optimization_level))
            return b"engine" if self._builds else None

        self.config = SimpleNamespace(
            set_memory_pool_limit=lambda pool, size: self.calls.append(("memory", pool, size)),
            set_flag=self.flags.add,
            clear_flag=self.flags.discard,
            add_optimization_profile=lambda profile: self.calls.append(("profile",)),
        )
        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(flags=flags),
            create_builder_config=lambda: self.config,
            create_optimization_profile=lambda: SimpleNamespace(
                set_shape=lambda *shape: self.calls.append(("shape", *shape))
            ),
            build_serialized_network=build,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        def parse(path: str) -> bool:
            assert Path(path).read_bytes()[:1] == b"\x08", "no ONNX file"
            return self._parses

        error = SimpleNamespace(desc=lambda: "No importer registered for op: Made")
        return SimpleNamespace(parse_from_file=parse, num_errors=1, get_error=lambda index: error)

    def Runtime(self, logger: Any) -> Any:
        def deserialize(data: bytes) -> Any:
            if data != b"engine":
                return None
            return SimpleNamespace(
                create_execution_context=self._context,
                num_io_tensors=2,
                get_tensor_name=lambda i: ("input", "output0")[i],
            )

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    def _context(self) -> Any:
        def execute(stream: int) -> bool:
            self.calls.append(("execute", stream))
            if hasattr(context, "profiler"):
                context.profiler.report_layer_time("conv + relu", 0.25)
            return True

        def set_shape(name: str, shape: tuple[int, ...]) -> bool:
            self.calls.append(("input", name, shape))
            return shape[0] <= small.MAX_BATCH

        context = SimpleNamespace(
            set_input_shape=set_shape,
            set_tensor_address=lambda name, at: self.calls.append(("address", name, at)),
            execute_async_v3=execute,
        )
        return context


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    module = FakeTensorRt()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: _Nothing())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=99)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return module


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("precision", "flags"),
    [
        ("fp32", set()),
        ("tf32", {"TF32"}),
        ("fp16", {"TF32", "FP16"}),
        ("bf16", {"TF32", "BF16"}),
    ],
)
def test_a_precision_is_what_its_flags_allow(
    program: Program, fake: FakeTensorRt, tmp_path: Path, precision: Any, flags: set[str]
) -> None:
    plan = FP32.with_(precision=precision, options={"level": 5})
    note = BACKEND.build(program, plan, tmp_path)
    assert fake.flags == flags
    assert note.details == {"tensorrt": "10.9.0"}
    assert (tmp_path / "model.plan").read_bytes() == b"engine"
    assert ("build", 5) in fake.calls
    name = program.signature.inputs[0].name
    shapes = [(batch, 3, 16, 16) for batch in (1, 3, small.MAX_BATCH)]
    assert ("shape", name, *shapes) in fake.calls
    assert ("profile",) in fake.calls


def test_one_batch_size_needs_no_profile(fake: FakeTensorRt, tmp_path: Path) -> None:
    fixed = small.program_of(small.conv_net(), tmp_path / "p", small.images(2), dynamic=False)
    BACKEND.build(fixed, FP32, tmp_path)
    assert ("profile",) not in fake.calls


def test_a_call_gives_addresses_and_runs_on_torchs_stream(
    program: Program, fake: FakeTensorRt, tmp_path: Path
) -> None:
    BACKEND.build(program, FP32, tmp_path)
    runner: Any = BACKEND.load(program, FP32, tmp_path)
    runner._device = torch.device("cpu")  # memory that exists here; all else stays as on a GPU
    runner._names = {program.signature.inputs[0].name, "output0"}
    flat = small.fresh_inputs(program, 2)
    fake.calls.clear()
    (output,) = runner(flat)
    name = program.signature.inputs[0].name
    assert fake.calls == [
        ("input", name, (2, 3, 16, 16)),
        ("address", name, flat[0].data_ptr()),
        ("address", "output0", output.data_ptr()),
        ("execute", 99),
    ]
    assert output.shape == (2, 10)
    assert runner(flat)[0].data_ptr() != output.data_ptr(), "memory of an earlier result"
    (layer,) = runner.layer_times(flat)
    assert (layer.name, layer.time_ms) == ("conv + relu", 0.25)
    with pytest.raises(SuanliError, match="refuses"):
        runner(small.fresh_inputs(program, small.MAX_BATCH + 1))


def test_what_cannot_be_built_is_one_line(
    program: Program, fake: FakeTensorRt, tmp_path: Path
) -> None:
    for plan, reason in (
        (FP32.with_(precision="fp8"), "not offered"),
        (FP32.with_(streams=2), "as a whole"),
        (FP32.with_(quantization=Quantization(scheme="int8-static")), "not offered"),
    ):
        with pytest.raises(SuanliError, match=reason):
            BACKEND.build(program, plan, tmp_path)
    fake._parses = False
    with pytest.raises(SuanliError, match="No importer registered for op: Made"):
        BACKEND.build(program, FP32, tmp_path)
    fake._parses, fake._builds = True, False
    with pytest.raises(SuanliError, match="no implementation"):
        BACKEND.build(program, FP32, tmp_path)
    assert not (tmp_path / "model.plan").exists()
    del fake.BuilderFlag.FP16
    with pytest.raises(SuanliError, match="cannot be asked for fp16"):
        BACKEND.build(program, FP32.with_(precision="fp16"), tmp_path)


def test_an_engine_for_another_gpu_is_refused(
    program: Program, fake: FakeTensorRt, tmp_path: Path
) -> None:
    (tmp_path / "model.plan").write_bytes(b"another")
    with pytest.raises(SuanliError, match="not the one the engine is for"):
        BACKEND.load(program, FP32, tmp_path)


def test_absent_is_not_broken(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = status(BACKEND)
    assert not found.present
    assert found.install == "pip install tensorrt-cu12"
    with pytest.raises(MissingBackendError, match="pip install tensorrt-cu12"):
        BACKEND.build(program, FP32, tmp_path)
