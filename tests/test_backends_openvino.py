"""OpenVINO answers like torch, at every batch, in every plan."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("openvino")

from suanli.base.errors import CaptureError, SuanliError
from suanli.base.plan import Plan, Quantization
from suanli.engines import openvino_graph
from suanli.engines.backend import Runner
from suanli.engines.backends._pieces import pieces
from suanli.engines.backends.openvino import BACKEND, configuration
from suanli.engines.program import Program
from tests import small_programs as small

FP32 = Plan(backend="openvino")
BF16 = Plan(backend="openvino", precision="bf16")
HAS_BF16 = "BF16" in openvino_graph.openvino().Core().get_property(
    "CPU", "OPTIMIZATION_CAPABILITIES"
)
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 instructions")


@pytest.fixture(scope="module", params=["conv", "bert", "gpt2", "resnet"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return small.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def conv(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return small.build("conv", tmp_path_factory.mktemp("conv"))


def opened(program: Program, plan: Plan, folder: Path, graph: str = "exported") -> Runner:
    folder.mkdir(exist_ok=True)
    note = BACKEND.build(program, plan, folder)
    assert note.details["graph"].startswith(graph)
    return BACKEND.load(program, note.plan, folder)


@pytest.mark.parametrize(
    "plan",
    [
        FP32,
        FP32.with_(threads=1),
        FP32.with_(streams=2, threads=1),
        FP32.with_(streams=2, threads=1, sub_batch=1),
        FP32.with_(sub_batch=2),
        pytest.param(BF16, marks=needs_bf16),
        pytest.param(BF16.with_(streams=2, threads=1, sub_batch=2), marks=needs_bf16),
    ],
    ids=lambda plan: plan.title,
)
def test_answers_like_torch_at_any_batch(program: Program, plan: Plan, tmp_path: Path) -> None:
    runner = opened(program, plan, tmp_path)
    for batch in (1, 3, 5, small.MAX_BATCH, 1):
        flat = small.fresh_inputs(program, batch)
        error = small.worst_error(runner(flat), small.eager(program, flat))
        assert error < (1e-5 if plan.precision == "fp32" else 0.05)
        if plan.precision == "bf16":
            assert error > 1e-5, "bf16 that rounds nothing did not run in bf16"
    runner.close()


def test_results_are_not_touched_by_later_calls(conv: Program, tmp_path: Path) -> None:
    for number, plan in enumerate((FP32, FP32.with_(streams=2, threads=1, sub_batch=1))):
        runner = opened(conv, plan, tmp_path / str(number))
        for batch in (1, 4):
            first = runner(small.fresh_inputs(conv, batch))
            kept = [tensor.clone() for tensor in first]
            for _ in range(3):
                runner([torch.full_like(t, 7.0) for t in conv.inputs(batch)])
            assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_inputs_are_only_read(conv: Program, tmp_path: Path) -> None:
    runner = opened(conv, FP32, tmp_path)
    flat = small.fresh_inputs(conv, 4)
    before = [tensor.clone() for tensor in flat]
    runner(flat)
    assert all(torch.equal(a, b) for a, b in zip(flat, before, strict=True))


def test_strided_and_differentiable_inputs(conv: Program, tmp_path: Path) -> None:
    runner = opened(conv, FP32, tmp_path)
    image = small.images(4).to(memory_format=torch.channels_last).requires_grad_()
    wanted = small.eager(conv, [image.detach().contiguous()])
    assert small.worst_error(runner([image]), wanted) < 1e-5


def test_pieces_cover_the_batch_once() -> None:
    for batch in range(1, 40):
        for streams in (1, 2, 3):
            for sub_batch in (0, 1, 4, 64):
                cuts = pieces(batch, streams, sub_batch)
                assert [i for a, b in cuts for i in range(a, b)] == list(range(batch))
                assert len(cuts) >= min(streams, batch)
                if sub_batch:
                    assert max(b - a for a, b in cuts) <= sub_batch


class Two(nn.Module):
    """Two inputs of other names than torch gives, one passed on, one result given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, left: torch.Tensor, pair: dict[str, torch.Tensor]) -> tuple[object, ...]:
        y = self.linear(left) - pair["right"]
        return y, None, y, left, {"mask": y > 0, "index": y.argmax(1)}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Program:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    folder = tmp_path_factory.mktemp("two")
    return small.program_of(Two().eval(), folder, x, pair={"right": 2 * x})


@pytest.mark.parametrize("plan", [FP32, FP32.with_(streams=2, threads=1)], ids=lambda p: p.title)
def test_odd_results(two: Program, plan: Plan, tmp_path: Path) -> None:
    # an input that is passed on is one of the things that only the way by ONNX can do
    runner = opened(two, plan, tmp_path, graph="onnx, because")
    for batch in (1, 4):
        flat = small.fresh_inputs(two, batch)
        values, wanted = runner(flat), small.eager(two, flat)
        assert [v.dtype for v in values] == [w.dtype for w in wanted]
        for value, reference in zip(values, wanted, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
        values[0].zero_()
        assert values[1].abs().sum() > 0, "two outputs share memory"
        values[3].zero_()
        assert flat[0].abs().sum() > 0, "an output is the user's input"


def test_one_batch_size_only(tmp_path: Path) -> None:
    program = small.program_of(
        small.conv_net(), tmp_path / "program", small.images(2), dynamic=False
    )
    runner = opened(program, FP32, tmp_path / "engine")
    flat = small.fresh_inputs(program, 2)
    assert small.worst_error(runner(flat), small.eager(program, flat)) < 1e-5
    with pytest.raises(SuanliError, match="batches of 2 only"):
        BACKEND.build(program, FP32.with_(streams=2), tmp_path / "engine")


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(0)


def test_a_batch_that_cannot_be_cut_is_not_cut(tmp_path: Path) -> None:
    program = small.program_of(Mean().eval(), tmp_path / "program", torch.randn(3, 4))
    with pytest.raises(SuanliError, match="output0 has no batch dimension"):
        BACKEND.build(program, FP32.with_(streams=2), tmp_path / "engine")
    runner = opened(program, FP32, tmp_path / "engine")
    flat = small.fresh_inputs(program, 5)
    assert small.worst_error(runner(flat), small.eager(program, flat)) < 1e-5


def test_layer_times_name_modules_and_precisions(program: Program, tmp_path: Path) -> None:
    runner = opened(program, FP32, tmp_path)
    layers = runner.layer_times(program.inputs(3))
    assert sum(layer.time_ms for layer in layers) > 0
    modules = dict(program.exported_module().named_modules())
    owners = {name for layer in layers for name in layer.origin}
    named = [name for name in owners if name in modules]
    assert len(named) >= 4, owners
    assert {layer.precision for layer in layers if layer.origin} <= {"fp32", "i32", "i64", "int8"}


@needs_bf16
def test_operators_kept_in_fp32_really_run_in_fp32(program: Program, tmp_path: Path) -> None:
    lowered = opened(program, BF16, tmp_path / "all").layer_times(program.inputs(3))
    products = [
        layer.origin[0]
        for layer in lowered
        if layer.kind in ("Convolution", "FullyConnected") and layer.precision == "bf16"
    ]
    assert len(products) >= 3, "bf16 did not run in bf16"
    chosen = products[1]
    kept = opened(program, BF16.with_(float_operators=(chosen,)), tmp_path / "one")
    precision = {
        name: la.precision for la in kept.layer_times(program.inputs(3)) for name in la.origin
    }
    assert precision[chosen] == "fp32"
    assert precision[products[2]] == "bf16"
    flat = small.fresh_inputs(program, 3)
    assert small.worst_error(kept(flat), small.eager(program, flat)) < 0.05


def test_a_module_stands_for_all_in_it(conv: Program) -> None:
    model = openvino_graph.openvino().Core().read_model(openvino_graph.program_graph(conv))
    names = openvino_graph.operator_names(model)
    assert len(set(names)) == len(names)
    inside = openvino_graph.matching(names, ["1"])
    assert {"1.first", "1.second", "1.short"} <= set(inside)
    assert not any(name.startswith("0.") for name in inside)
    assert openvino_graph.matching(names, ["1.first"]) == ["1.first"]
    with pytest.raises(SuanliError, match=r"no operator is called 2\.first"):
        openvino_graph.matching(names, ["2.first"])


def test_converted_once_by_whoever_is_first(tmp_path: Path) -> None:
    program = small.program_of(small.conv_net(), tmp_path, small.images())
    first = openvino_graph.program_graph(program)
    stamp = first.stat().st_mtime_ns
    assert openvino_graph.program_graph(program).stat().st_mtime_ns == stamp
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".openvino")]


def test_by_way_of_onnx_where_the_direct_way_fails(
    conv: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")

    def fails(program: Program) -> None:
        raise RuntimeError("No conversion rule found for operations: aten.made_up")

    monkeypatch.setattr(openvino_graph, "_from_exported", fails)
    model = openvino_graph.convert(conv)
    assert openvino_graph.source_of(model).startswith("onnx, because No conversion rule")
    flat = small.fresh_inputs(conv, 2)
    compiled = (
        openvino_graph.openvino()
        .Core()
        .compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    )
    value = torch.from_numpy(compiled([flat[0].numpy()])[0].copy())
    assert small.worst_error([value], small.eager(conv, flat)) < 1e-5

    def fails_too(program: Program) -> Path:
        raise CaptureError("no ONNX either")

    monkeypatch.setattr(openvino_graph, "program_onnx", fails_too)
    with pytest.raises(CaptureError, match=r"aten\.made_up"):
        openvino_graph.convert(conv)


def test_plans_that_are_not_for_it_are_refused(conv: Program, tmp_path: Path) -> None:
    for plan, reason in (
        (FP32.with_(precision="fp16"), "does not offer fp16"),
        (FP32.with_(streams=0), "streams must be positive"),
        (FP32.with_(float_operators=("nothing",)), "no operator is called nothing"),
        (FP32.with_(quantization=Quantization(scheme="int8-weight")), "int8-weight"),
    ):
        with pytest.raises(SuanliError, match=reason):
            BACKEND.build(conv, plan, tmp_path)


def test_bf16_needs_instructions() -> None:
    core = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    old = SimpleNamespace(Core=lambda: core)
    with pytest.raises(SuanliError, match="no bf16 instructions"):
        configuration(BF16, streams=1, ov=old)
    quantised = FP32.with_(precision="int8", quantization=Quantization(scheme="int8-static"))
    assert configuration(quantised, streams=1, ov=old)["INFERENCE_PRECISION_HINT"] == "f32"


def test_in_another_process_without_network_names_are_the_same(conv: Program) -> None:
    code = f"""
        import socket, threading, time
        asked = []
        def refuse(*args, **kwargs):
            asked.append(args)
            raise OSError("no network in this test")
        socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
        from pathlib import Path
        from suanli.engines.openvino_graph import convert, operator_names
        from suanli.engines.program import Program
        program = Program(Path({str(conv.folder)!r}))
        convert(program)
        print("names:", "|".join(operator_names(convert(program))))
        import nncf
        time.sleep(0.3)  # telemetry would be sent from a thread
        print("asked", asked)
    """
    found = _run(code)
    names = openvino_graph.operator_names(openvino_graph.convert(conv))
    assert f"names: {'|'.join(names)}\n" in found
    assert "asked []" in found


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
