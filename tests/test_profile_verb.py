"""`suanli profile` end to end: workloads, training, runs, engines, plans, checks, refusals."""

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import suanli
from suanli import cli
from suanli.base import codec, schema
from suanli.base.errors import BadInputError, SuanliError
from suanli.base.lazy import present
from suanli.base.plan import Plan
from suanli.base.profile_results import ProfileResult
from suanli.base.train_plan import TrainPlan
from suanli.engines import engine as engine_module
from suanli.training.calls import train_module
from tests import engine_parts, train_parts
from tests.profile_parts import ceilings


@pytest.fixture(autouse=True)
def planted_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ceilings(bf16=8.0, fp32=10e12)
    monkeypatch.setattr("suanli.measure.ceilings.ceilings", lambda *_, **__: found)
    monkeypatch.setattr("suanli.profiling.measuring._WARM_SECONDS", 0.05)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `suanli profile …` in this process: (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["suanli", "profile", *arguments])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


def parts_add_up(result: ProfileResult) -> None:
    """The sum of the parts is the step, within five per cent, and rows are inside their parts."""
    assert result.categories.total_ms == pytest.approx(result.step_ms.p50, rel=0.05)
    operators = sum(row.time_ms for row in result.operators)
    times = result.categories
    busy = times.forward_ms + times.backward_ms + times.optimizer_ms
    assert operators == pytest.approx(busy, rel=1e-6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x).mean((2, 3)))


def test_a_module_and_its_inputs() -> None:
    found = suanli.profile(Block(), torch.randn(8, 16, 24, 24), batch=8, steps=5, device="cpu")
    parts_add_up(found)
    assert (found.subject, found.training, found.batch) == ("workload", False, 8)
    rows = {(row.name, row.module): row for row in found.operators}
    conv = rows["convolution", "inner.0"]
    assert conv.source.startswith("test_profile_verb.py:")
    assert conv.flops == 2 * 8 * 24 * 24 * 32 * 16 * 9
    assert conv.sol_ms is not None
    assert conv.sol_ms < conv.time_ms
    large = [row for row in found.operators if row.share > 0.01]
    assert all(row.source for row in large), [row.name for row in large if not row.source]
    assert found.memory is not None
    assert found.memory.predicted is not None
    off = found.memory.predicted.total_bytes / found.memory.total_bytes - 1
    assert abs(off) < 0.10, found.memory
    assert found.profiler is not None
    assert {event.track for event in found.trace} == {"phase", "host"}
    assert any(event.operator is not None for event in found.trace)


def test_the_users_module_is_left_as_it_was() -> None:
    model = Block().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    suanli.profile(
        model, torch.randn(2, 16, 8, 8), plan=Plan(backend="eager", precision="bf16"), steps=3
    )
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_training_a_workload() -> None:
    recipe = train_parts.recipe(batch=128)
    found = suanli.profile(recipe, plan=TrainPlan(), steps=5, device="cpu")
    parts_add_up(found)
    times = found.categories
    assert times.forward_ms > 0
    assert times.backward_ms > times.optimizer_ms > 0
    assert isinstance(found.plan, TrainPlan)
    phases = {row.phase for row in found.operators}
    assert phases == {"forward", "backward", "optimizer"}
    back = [row for row in found.operators if row.name == "convolution_backward"]
    assert back
    assert all(row.module and row.source.startswith("train_parts.py:") for row in back)
    assert found.sol is not None
    assert found.memory is not None
    kinds = found.memory
    assert kinds.weights_bytes > 0
    assert kinds.optimizer_bytes > 0
    assert kinds.predicted is not None
    assert kinds.predicted.total_bytes == pytest.approx(kinds.total_bytes, rel=0.10)
    lost = sum(item.ms for item in found.lost)
    assert lost == pytest.approx(found.step_ms.p50 - found.sol.ms, rel=0.10)


def test_the_advice_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suanli.profiling.checking._TURN_SECONDS", 0.05)
    monkeypatch.setattr("suanli.base.compiler.find_compiler", lambda: None)
    plain = TrainPlan(optimizer_kernel="loop")
    found = suanli.profile(train_parts.recipe(), plan=plain, steps=3, check=2, device="cpu")
    tried = [item for item in found.advice if item.measured_speedup is not None]
    assert len(tried) == min(2, len(found.advice)) >= 1
    assert all(item.plan is not None and not item.failed for item in tried)


def test_the_advice_is_tried_on_a_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suanli.profiling.checking._TURN_SECONDS", 0.02)
    monkeypatch.setattr("suanli.profiling.advice._LEAST_EXPECTED", 0.0)
    batches = [(torch.randn(32, 512), torch.arange(32) % 10)] * 2
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    found = suanli.profile(
        model, batches, nn.functional.cross_entropy, steps=3, check=1, check_seconds=0.2,
        device="cpu",
    )  # fmt: skip
    (tried,) = [item for item in found.advice if item.failed or item.measured_speedup]
    assert not tried.failed
    assert tried.measured_speedup is not None


def test_example_inputs_say_the_batch() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    assert suanli.profile(model, torch.randn(6, 16), steps=3, device="cpu").batch == 6
    assert suanli.profile(model, torch.randn(6, 16), batch=2, steps=3, device="cpu").batch == 2


def test_a_recipe_is_profiled_in_inference() -> None:
    found = suanli.profile("mnist-fast", train=False, steps=3, device="cpu")
    assert (found.training, found.batch) == (False, 1)


def test_a_race_without_time_is_refused() -> None:
    with pytest.raises(BadInputError, match="check_seconds"):
        suanli.profile("mnist-mlp", check=1, check_seconds=0.0)


@pytest.mark.parametrize("kind", [SuanliError, TypeError])
def test_a_plan_that_cannot_be_tried_says_why(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise kind("no such kernel here")

    monkeypatch.setattr("suanli.profiling.checking.raced", refuse)
    found = suanli.profile(Block(), torch.randn(2, 16, 8, 8), steps=3, check=1, device="cpu")
    assert found.advice[0].failed == "no such kernel here"
    assert found.advice[0].measured_speedup is None


def test_what_was_found_stays_when_checks_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("suanli.profiling.checking.raced", stop)
    found = suanli.profile(Block(), torch.randn(2, 16, 8, 8), steps=3, check=1, device="cpu")
    assert found.interrupted
    assert found.advice


def test_a_run_is_profiled_as_its_workload_and_plan(tmp_path: Path) -> None:
    file = tmp_path / "job.py"
    file.write_text(
        "from tests import train_parts\n\n\ndef job():\n    return train_parts.WORKLOAD\n"
    )
    from suanli.training.calls import TrainOptions, train_workload

    train_workload(
        f"{file}:job",
        TrainOptions(plan="default", epochs=1, out=tmp_path / "run", device="cpu"),
    )
    found = suanli.profile(tmp_path / "run", steps=3, device="cpu")
    assert (found.subject, found.training) == ("run", True)
    assert found.batch == train_parts.SETTINGS.batch
    parts_add_up(found)


def test_a_run_without_a_source_is_refused(tmp_path: Path) -> None:
    settings = {"plan": "default", "epochs": 1, "out": tmp_path / "run", "device": "cpu"}
    data, loss = train_parts.data(), nn.functional.cross_entropy
    train_module(train_parts.make_model(), data, loss, **settings)
    with pytest.raises(BadInputError, match="lived in one process only"):
        suanli.profile(str(tmp_path / "run"), steps=3)


@pytest.mark.skipif(not present("openvino"), reason="OpenVINO is not installed")
def test_a_backends_own_counters_are_mapped_to_operators() -> None:
    plan = Plan(backend="openvino")
    found = suanli.profile(
        Block(), torch.randn(8, 16, 24, 24), batch=8, steps=5, plan=plan, device="cpu"
    )
    parts_add_up(found)
    conv = next(row for row in found.operators if row.name == "convolution")
    assert conv.module == "inner.0"
    assert "relu" in conv.fused, "what the backend fused is shown as one"
    assert conv.flops >= 2 * 8 * 24 * 24 * 32 * 16 * 9
    assert conv.kernel
    assert found.profiler is None
    assert found.memory is None


@pytest.mark.skipif(not present("onnxruntime"), reason="ONNX Runtime is not installed")
def test_onnx_runtimes_own_counters_are_mapped_to_operators() -> None:
    plan = Plan(backend="onnxruntime")
    x = torch.randn(8, 16, 24, 24)
    found = suanli.profile(Block(), x, batch=8, steps=5, plan=plan, device="cpu")
    parts_add_up(found)
    conv = next(row for row in found.operators if row.name == "convolution")
    assert conv.module == "inner.0"
    assert conv.source.startswith("test_profile_verb.py:")
    assert conv.flops >= 2 * 8 * 24 * 24 * 32 * 16 * 9
    assert conv.kernel
    assert found.profiler is None


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_compiled_code_is_mapped_to_the_operators_in_it(train: bool) -> None:
    if train:
        plan: Plan | TrainPlan = TrainPlan(compile="default")
        found = suanli.profile(train_parts.recipe(batch=128), plan=plan, steps=5, device="cpu")
        assert found.categories.backward_ms > 0
    else:
        plan = Plan(backend="inductor")
        x = torch.randn(8, 16, 24, 24)
        found = suanli.profile(Block(), x, batch=8, steps=5, plan=plan, device="cpu")
    parts_add_up(found)
    kernels = [row.kernel for row in found.operators]
    assert any("fused" in kernel for kernel in kernels), kernels
    products = {row.name for row in found.operators if row.flops > 0}
    assert any("conv" in name for name in products), kernels
    assert any("mm" in name for name in products), kernels


def test_an_engine_is_profiled_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = engine_parts.make_program(tmp_path / "program")
    engine_parts.make_engine(tmp_path / "engine", program, tmp_path)
    quick = engine_parts.QuickBackend()
    monkeypatch.setattr(engine_module, "_backend_table", lambda extra: {"quick": quick})
    found = suanli.profile(tmp_path / "engine", batch=4, steps=3)
    parts_add_up(found)
    assert (found.subject, found.workload, found.batch) == ("engine", "net", 4)
    assert found.plan == engine_parts.PLAN
    (layer,) = found.operators
    assert (layer.kernel, layer.time_ms) == ("all", pytest.approx(1.0, rel=0.01))
    assert found.flops > 2 * 4 * (6 * 8 + 8 * 4), "the captured operators count"
    with pytest.raises(BadInputError, match="from 1 to 8"):
        suanli.profile(tmp_path / "engine", batch=9)
    with pytest.raises(BadInputError, match="its plan already"):
        suanli.profile(tmp_path / "engine", plan=Plan(backend="eager"))


def test_an_own_step_has_its_parts(tmp_path: Path) -> None:
    model, x = Block().train(), torch.randn(4, 16, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    trace = tmp_path / "trace.json"
    found = suanli.profile(step, model=model, batch=4, steps=5, device="cpu", trace=str(trace))
    parts_add_up(found)
    assert found.training
    assert found.categories.backward_ms > 0
    assert found.categories.optimizer_ms > 0
    assert any(row.module == "inner.0" for row in found.operators)
    events = json.loads(trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {"forward", "backward", "optimizer"} <= {event["name"] for event in spans}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    assert torch.autograd.backward.__name__ == "backward", "what was watched is put back"


def test_the_command_prints_one_screen(call, tmp_path: Path) -> None:
    code, out, err = call("worked-784-128-10", "--batch", "4", "--steps", "3", "--device", "cpu")
    assert code == 0, err
    assert "verdict" in out
    assert "of the speed of light" in out
    assert len(out.splitlines()) <= 60


def test_the_page_is_written_at_once(call, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = ("worked-784-128-10", "--steps", "3", "--device", "cpu", "--report", str(page))
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    text = page.read_text(encoding="utf-8")
    assert "All operators of a step" in text
    for row in json.loads(out)["operators"]:
        assert row["source"] in text
    code, _, err = call(*arguments[:-1], str(tmp_path / "page.txt"))
    assert (code, "must end in .html" in err) == (2, True)


def test_the_json_is_what_its_schema_says(call, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(codec.dumps(Plan(backend="eager", precision="bf16")))
    code, out, err = call(
        *("worked-784-128-10", "--json", "--steps", "3", "--plan", str(plan), "--device", "cpu"),
        *("--trace", str(tmp_path / "t.json")),
    )
    assert (code, err) == (0, "")
    found = json.loads(out)
    jsonschema.validate(found, json.loads(schema.text("profile")))
    assert found["plan"]["precision"] == "bf16"
    assert codec.from_json(ProfileResult, found).verb == "profile"
    assert (tmp_path / "t.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing-of-that-name"], "unknown workload"),
        (["resnet50", "--batch", "0"], "--batch"),
        (["resnet50", "--steps", "1"], "--steps"),
        (["resnet50", "--check", "99"], "--check"),
        (["resnet50", "--plan", "no-such-file.json"], "--plan"),
        (["resnet50", "--trace", "/no/such/folder/t.json"], "--trace"),
        (["resnet50", "--device", "tpu"], "unknown device"),
    ],
)
def test_what_makes_no_sense_is_refused(call, arguments: list[str], words: str) -> None:
    code, out, err = call(*arguments)
    assert code == 2
    assert words in out + err
    assert "Traceback" not in out + err


def test_a_plan_of_the_other_kind_is_refused() -> None:
    with pytest.raises(BadInputError, match="plan of training"):
        suanli.profile(Block(), torch.randn(1, 16, 8, 8), plan=TrainPlan(), train=False)
    with pytest.raises(BadInputError, match="plan of inference"):
        suanli.profile(train_parts.recipe(), plan=Plan(backend="eager"))


def test_a_model_with_an_optimizer_is_put_back() -> None:
    model = Block()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batches = [(torch.randn(4, 16, 8, 8), torch.tensor([0, 1, 2, 3]))]
    found = suanli.profile(
        model, batches, nn.functional.cross_entropy, optimizer=optimizer, steps=3, device="cpu"
    )
    parts_add_up(found)
    assert found.memory is not None
    states = 2 * sum(p.nbytes for p in model.parameters())
    assert found.memory.optimizer_bytes == pytest.approx(states, rel=0.01)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not optimizer.state_dict()["state"]


def test_a_loader_that_gives_something_else_is_refused() -> None:
    with pytest.raises(BadInputError, match="the loader gives"):
        suanli.profile(Block(), [torch.zeros(1)], nn.functional.cross_entropy, device="cpu")


def test_a_loader_that_runs_out_is_refused() -> None:
    batches = (batch for batch in [(torch.randn(4, 16, 8, 8), torch.tensor([0, 1, 2, 3]))] * 2)
    loss = nn.functional.cross_entropy
    with pytest.raises(BadInputError, match="only once"):
        suanli.profile(Block(), batches, loss, steps=3, device="cpu")
    with pytest.raises(BadInputError, match="no samples"):
        suanli.profile(Block(), [(torch.zeros(0, 16, 8, 8), torch.zeros(0))], loss, device="cpu")
    with pytest.raises(BadInputError, match="a NoneType does not"):
        suanli.profile(Block(), None, loss, device="cpu")


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    for folder, file, train in (("e", "manifest.json", True), ("r", "run.json", False)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
        with pytest.raises(BadInputError, match="makes no sense"):
            suanli.profile(tmp_path / folder, train=train)
    loader, loss = [(torch.zeros(1), torch.zeros(1))], nn.functional.cross_entropy
    with pytest.raises(BadInputError, match="leave `batch` out"):
        suanli.profile(Block(), loader, loss, batch=3, device="cpu")
    with pytest.raises(BadInputError, match="a list cannot be profiled"):
        suanli.profile([1, 2], device="cpu")


def test_a_module_without_inputs_is_told_what_is_missing() -> None:
    with pytest.raises(BadInputError, match=r"profile\(model, inputs\) needs"):
        suanli.profile(Block(), device="cpu")


def test_data_and_device_go_where_they_are_asked_for(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, file in (("e", "manifest.json"), ("r", "run.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
        with pytest.raises(BadInputError, match="leave --data out"):
            suanli.profile(tmp_path / folder, tmp_path)
    asked: list[Any] = []

    def resolve(ref: str, *, data: Path | None) -> None:
        asked.append((ref, data))
        raise BadInputError("enough")

    monkeypatch.setattr("suanli.workloads.resolve.resolve", resolve)
    assert call("my-net", "--data", str(tmp_path), "--device", "cpu")[0] == 2
    assert asked.pop() == ("my-net", tmp_path)

    def of_run(folder: Path, plan: Any, batch: int | None, device: str) -> None:
        asked.append(device)
        raise BadInputError("enough")

    monkeypatch.setattr("suanli.profiling.training_subjects.of_run", of_run)
    for device in ("auto", "cpu"):
        with pytest.raises(BadInputError, match="enough"):
            suanli.profile(tmp_path / "r", device=device)
    assert asked == ["", "cpu"], "unasked, a run stays on the device of its own plan"


def test_energy_is_what_the_counter_gained_over_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from suanli.devices import device

    class Counter:
        """The processor, with a counter that gains 12 J while steps are timed."""

        readings = iter([100.0, 112.0])

        def energy_j(self) -> float:
            return next(self.readings)

        def __getattr__(self, name: str) -> Any:
            return getattr(device("cpu"), name)

    monkeypatch.setattr("suanli.profiling.measuring.find_device", lambda name: Counter())
    model, x = Block().eval(), torch.randn(2, 16, 8, 8)
    found = suanli.profile(model, x, steps=4, device="cpu")
    assert found.energy_j == pytest.approx(3.0)


def test_a_check_that_can_try_nothing_says_so() -> None:
    model, x = Block().eval(), torch.randn(2, 16, 8, 8)
    found = suanli.profile(lambda: model(x), model=model, steps=3, check=2, device="cpu")
    assert "nothing was tried: it exists only once" in found.notes


@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True])
def test_a_step_on_a_gpu(train: bool) -> None:
    """Kernels are joined with operators, and the parts of the step add up on the device too."""
    x = torch.randn(64, 16, 32, 32)
    if train:
        batches = [(x, torch.randint(0, 10, (64,)))]
        plan = TrainPlan(device="cuda:0")
        found = suanli.profile(
            Block(), batches, nn.functional.cross_entropy, plan=plan, steps=10, device="cuda:0"
        )
        assert found.categories.backward_ms > 0
        assert found.categories.transfer_ms > 0, "the loader's batches lie in the host's memory"
    else:
        found = suanli.profile(Block(), x, batch=64, steps=10, device="cuda:0")
    assert found.categories.total_ms == pytest.approx(found.step_ms.p50, rel=0.05)
    conv = next(row for row in found.operators if row.name == "convolution")
    assert (conv.module, bool(conv.kernel)) == ("inner.0", True)
    assert "device" in {event.track for event in found.trace}
    assert found.memory is not None
    assert found.memory.total_bytes > x.nbytes
