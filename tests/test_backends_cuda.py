"""The torch backends on a GPU: a stand-in for torch.cuda here, the real one where there is one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor

from suanli.base.errors import MissingBackendError, SuanliError
from suanli.base.plan import Plan, Quantization
from suanli.engines.backends import _torch as shared
from suanli.engines.backends import backends, eager
from suanli.engines.backends._compiled import PerBatch, overwrites, settings
from suanli.engines.backends._graph import _move, flat_module
from suanli.engines.backends.aotinductor import _settings as package_settings
from suanli.engines.backends.eager import CudaGraphs, _records
from suanli.engines.backends.torchao import _chosen, linear_layers
from suanli.engines.program import Program
from tests import backend_models as models


class FakeCuda:
    """Records what is called inside a capture, and does it again at every replay."""

    def __init__(self) -> None:
        self.recording: list[Callable[[], object]] | None = None
        self.on_side_stream = False
        self.waits = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Stream:
            def wait_stream(self, other: object) -> None:
                fake.waits += 1

        class Graph:
            def __init__(self) -> None:
                self.steps: list[Callable[[], object]] = []

            def replay(self) -> None:
                for step in self.steps:
                    step()

        @contextmanager
        def graph(into: Graph) -> Iterator[None]:
            fake.recording = into.steps
            try:
                yield
            finally:
                fake.recording = None

        @contextmanager
        def stream(_: Stream) -> Iterator[None]:
            fake.on_side_stream = True
            try:
                yield
            finally:
                fake.on_side_stream = False

        main = Stream()
        for name, value in {
            "Stream": Stream,
            "current_stream": lambda: main,
            "stream": stream,
            "CUDAGraph": Graph,
            "graph": graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


class Doubler:
    """Doubles its input as a captured kernel would: into the same memory at every replay."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.captured: list[torch.Size] = []
        self.warm_ups = 0

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = x * 2
        if self.cuda.recording is not None:
            self.captured.append(x.shape)
            self.cuda.recording.append(lambda: torch.mul(x, 2, out=y))
        elif self.cuda.on_side_stream:
            self.warm_ups += 1
        return [y]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def test_graph_is_recorded_once_per_shape_and_replayed(cuda: FakeCuda) -> None:
    call = Doubler(cuda)
    graphs = CudaGraphs(call)
    first = graphs(torch.ones(2, 3))[0]
    second = graphs(torch.full((2, 3), 5.0))[0]
    assert torch.equal(first, torch.full((2, 3), 2.0)), "a replay overwrote an earlier answer"
    assert torch.equal(second, torch.full((2, 3), 10.0))
    assert call.captured == [torch.Size((2, 3))]
    assert call.warm_ups >= 1
    assert cuda.waits == 2
    graphs(torch.ones(4, 3))
    assert call.captured == [torch.Size((2, 3)), torch.Size((4, 3))]


def test_caller_may_reuse_its_input(cuda: FakeCuda) -> None:
    graphs = CudaGraphs(Doubler(cuda))
    given = torch.ones(2)
    graphs(given)
    given.fill_(100)
    assert torch.equal(graphs(torch.ones(2))[0], torch.full((2,), 2.0))


def test_only_the_last_shapes_are_kept(cuda: FakeCuda) -> None:
    call = Doubler(cuda)
    graphs = CudaGraphs(call)
    for size in range(1, 13):
        graphs(torch.ones(size))
    assert len(graphs._recorded) == 8
    captured = len(call.captured)
    graphs(torch.ones(12))
    assert len(call.captured) == captured
    graphs(torch.ones(1))
    assert len(call.captured) == captured + 1


def test_what_cannot_be_recorded_is_said(cuda: FakeCuda) -> None:
    def call(x: torch.Tensor) -> list[torch.Tensor]:
        if cuda.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return [x]

    with pytest.raises(SuanliError, match="not permitted when stream is capturing"):
        CudaGraphs(call)(torch.ones(2))


def test_build_goes_without_graphs_where_it_must(
    cuda: FakeCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = models.mlp_program(tmp_path)
    plan = Plan(backend="eager", device="cuda:0", precision="bf16")

    def call(x: torch.Tensor) -> list[torch.Tensor]:
        if cuda.recording is not None:
            raise RuntimeError("not while capturing")
        return [x[:, :16]]

    class OnCpu(shared.TorchRunner):
        def __init__(self, function: Any, signature: Any, plan: Plan, **rest: Any) -> None:
            super().__init__(function, signature, plan.with_(device="cpu"), **rest)

    monkeypatch.setattr(shared, "TorchRunner", OnCpu)
    monkeypatch.setattr(eager, "_prepared", lambda *_: shared.Prepared(call, ()))
    note = eager.BACKEND.build(program, plan, tmp_path)
    assert note.plan.options == {"cuda_graph": False}
    assert "not while capturing" in note.details["cuda_graph"]


@pytest.mark.parametrize(
    ("device", "options", "recorded"),
    [
        ("cpu", {}, False),
        ("cpu", {"cuda_graph": True}, False),
        ("cuda:0", {}, True),
        ("cuda:0", {"cuda_graph": False}, False),
        ("cuda:0", {"source": True}, False),
    ],
)
def test_when_graphs_are_used(device: str, options: dict[str, bool], recorded: bool) -> None:
    assert _records(Plan(backend="eager", device=device, options=options)) is recorded


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_tf32_only_where_asked(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[object] = []
    monkeypatch.setattr(torch.cuda, "device", lambda d: devices.append(d) or nullcontext())
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark)
    plan = Plan(backend="eager", precision=precision, device="cuda:1")
    wanted = precision == "tf32"
    with pytest.raises(ZeroDivisionError), shared.conditions(plan, torch.get_num_threads()):
        assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == (wanted, wanted, True)
        raise ZeroDivisionError
    assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark) == before
    assert devices == ["cuda:1"]


def test_graph_moves_to_the_device(tmp_path: Path) -> None:
    # the meta device stands in: whatever stayed on the CPU would make these calls fail
    program = models.bert_program(tmp_path)
    module = flat_module(program, Plan(backend="eager"))
    _move(module, "meta")
    outputs = module(*[tensor.to("meta") for tensor in program.inputs(3)])
    assert [tuple(t.shape) for t in outputs] == [(3, 16, 64), (3, 64)]
    assert all(t.device.type == "meta" for t in outputs)


@pytest.mark.parametrize("mode", ["max-autotune", "reduce-overhead", "default", None])
def test_inductor_settings_on_a_gpu(
    mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = models.mlp_program(tmp_path)
    options: dict[str, Any] = {"mode": mode} if mode else {}
    plan = Plan(backend="inductor", precision="bf16", device="cuda:0", options=options)
    asked: list[dict[str, Any]] = []
    frozen: list[bool] = []

    def compile_(module: Any, **arguments: Any) -> object:
        asked.append(arguments)

        def run(*flat: torch.Tensor) -> object:
            frozen.append(inductor.freezing)
            return module(*flat)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    module = flat_module(program, plan.with_(device="cpu"))
    PerBatch(module, program.signature, plan)(*program.inputs(2))
    given = asked[0]["options"]
    graphs = mode != "default"
    assert frozen == [True]
    assert bool(given.get("triton.cudagraphs")) is graphs
    assert bool(given.get("max_autotune")) is (mode in (None, "max-autotune"))
    assert overwrites(plan) is graphs
    assert "triton.cudagraphs" not in settings(plan.with_(device="cpu"))


def test_baselines_as_a_gpu_user_has_them() -> None:
    table = backends()
    modes = {
        str(plan.options.get("mode", "default"))
        for plan in table["inductor"].spec.baselines
        if plan.device == "cuda"
    }
    assert modes >= {"default", "reduce-overhead", "max-autotune"}
    eager = [p for p in table["eager"].spec.baselines if p.device == "cuda"]
    assert {plan.precision for plan in eager} >= {"fp32", "tf32", "bf16", "fp16"}
    assert not overwrites(Plan(backend="inductor", device="cuda", options={"source": True}))


def test_autotuned_packages_on_a_gpu_only() -> None:
    plan = Plan(backend="aotinductor", device="cuda:0")
    assert package_settings(plan)["max_autotune"] is True
    assert package_settings(plan.with_(options={"max_autotune": False}))["max_autotune"] is False
    assert "max_autotune" not in package_settings(plan.with_(device="cpu"))


def test_fp8_leaves_odd_sizes_alone(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = torch.nn.Linear(32, 48), torch.nn.Linear(48, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.odd(self.even(x))

    inputs = models.Inputs(args=(torch.randn(2, 32),))
    program = models.program(Odd(), inputs, tmp_path)
    layers = linear_layers(flat_module(program, Plan(backend="torchao")))
    chosen = _chosen(layers, _fp8())
    assert chosen == [layers["even"]]


def _fp8() -> Plan:
    quantization = Quantization(scheme="fp8-dynamic")
    return Plan(backend="torchao", precision="fp8", device="cuda:0", quantization=quantization)


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "present", lambda package: package != "triton")
    from torch._inductor import cpp_builder

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    with pytest.raises(MissingBackendError, match="triton"):
        shared.need_compiler(Plan(backend="inductor", device="cuda:0"))
    shared.need_compiler(Plan(backend="inductor"))


# On a real GPU


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Program]:
    root = tmp_path_factory.mktemp("gpu_programs")
    names = ("conv", "bert", "gpt2", "resnet", "mlp")
    return {name: getattr(models, f"{name}_program")(root / name) for name in names}


LIMITS = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 2e-2, "fp16": 5e-3}


def _on_gpu(
    runner: Any, program: Program, limit: float, batches: Sequence[int] = (1, 3, 5)
) -> None:
    """From CPU tensors and from the GPU's, and the answers stay what they were."""
    models.check_values(runner, program, limit, batches)
    flat = [tensor.cuda() for tensor in program.inputs(3)]
    first = runner(flat)
    assert all(tensor.is_cuda for tensor in first)
    kept = [tensor.clone() for tensor in first]
    runner([t * 0 for t in flat])
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv", "bert", "gpt2", "resnet", "mlp"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"cuda_graph": False}, {"source": True}])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gpu_eager(
    programs: dict[str, Program],
    name: str,
    precision: Any,
    options: dict[str, Any],
    layout: Any,
    tmp_path: Path,
) -> None:
    plan = Plan(
        backend="eager",
        precision=precision,
        device="cuda:0",
        memory_layout=layout,
        options=options,
    )
    runner = models.built(backends()["eager"], programs[name], plan, tmp_path)
    _on_gpu(runner, programs[name], LIMITS[precision])
    assert runner.layer_times(programs[name].inputs(2))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv", "bert", "mlp"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "default"},
        {"mode": "reduce-overhead"},
        {"source": True},
        {"source": True, "mode": "reduce-overhead"},
    ],
)
def test_gpu_inductor(
    programs: dict[str, Program], name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    plan = Plan(backend="inductor", precision="bf16", device="cuda:0", options=options)
    runner = models.built(backends()["inductor"], programs[name], plan, tmp_path)
    _on_gpu(runner, programs[name], LIMITS["bf16"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv", "bert"])
def test_gpu_aotinductor(programs: dict[str, Program], name: str, tmp_path: Path) -> None:
    plan = Plan(
        backend="aotinductor", precision="fp16", device="cuda:0", options={"static_batch": 3}
    )
    runner = models.built(backends()["aotinductor"], programs[name], plan, tmp_path)
    _on_gpu(runner, programs[name], LIMITS["fp16"])


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weight", "fp8-dynamic"])
def test_gpu_torchao(programs: dict[str, Program], scheme: str, tmp_path: Path) -> None:
    if scheme == "fp8-dynamic" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    plan = _fp8().with_(quantization=Quantization(scheme=scheme), options={"mode": "default"})
    runner = models.built(backends()["torchao"], programs["bert"], plan, tmp_path)
    models.check_values(runner, programs["bert"], 0.08)
