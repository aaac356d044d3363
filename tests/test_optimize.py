"""`optimize` from end to end on small models: what it finds, refuses, keeps and says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import suanli
from suanli import cli
from suanli.api import OptimizeOptions, optimize_workload
from suanli.base import codec, schema
from suanli.base.errors import BadInputError, CaptureError
from suanli.base.events import Event
from suanli.base.results import OptimizeResult
from suanli.base.trial import Trial
from suanli.engines.finalists import batch_ranges

pytestmark = pytest.mark.usefixtures("quick_search")
QUICK: dict[str, Any] = {"budget_s": 14.0, "max_batch": 4, "backends": ("eager",), "keep": True}


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 10),
    ).eval()


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def engine(quick_search: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("with space") / "engine"
    with suanli.optimize(small_net(), IMAGES, out=folder, **QUICK) as found:
        yield found


def test_engine_answers_as_the_model(engine: Any) -> None:
    net = small_net()
    for batch in (1, 3, 4, 9):
        images = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            wanted = net(images)
        torch.testing.assert_close(engine(images), wanted, rtol=0.05, atol=0.02)


def test_result_fits_its_schema(engine: Any) -> None:
    plain = json.loads(codec.dumps(engine.result))
    jsonschema.validate(plain, json.loads(schema.text("optimize")))
    assert codec.from_json(OptimizeResult, plain) == engine.result


def test_result_holds_what_was_promised(engine: Any) -> None:
    result = engine.result
    assert result.engine_dir is not None
    assert {c.batch for c in result.confirmations} == {1, 4}
    assert result.values is not None
    assert result.values.ok
    assert result.sol is not None
    assert 0 < (result.sol.fraction or 0) <= 1
    assert result.trials[0].baseline
    assert result.trials[0].plan.precision == "fp32"
    assert result.quality is None
    assert all(trial.reason for trial in result.trials if trial.status != "verified")


def test_never_slower_than_the_best_baseline(engine: Any) -> None:
    for race in engine.result.confirmations:
        assert race.speedup_vs_best_baseline.hi95 >= 1.0 or race.note


def test_saved_engine_opens_in_a_fresh_process(engine: Any, tmp_path: Path) -> None:
    import numpy as np

    images = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype("float32")
    np.save(tmp_path / "x.npy", images)
    command = [
        sys.executable, "-m", "suanli.cli", "run", engine.result.engine_dir,
        "--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npy"), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    jsonschema.validate(said, json.loads(schema.text("run")))
    assert not said["portable"]
    with torch.no_grad():
        wanted = small_net()(torch.from_numpy(images))
    got = torch.from_numpy(np.load(tmp_path / "y.npy"))
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.02)


class Enough(Exception):
    """The search is over."""


@pytest.mark.usefixtures("in_process")
def test_second_run_resumes(engine: Any) -> None:
    tried: list[Trial] = []

    def until_written(event: Event) -> None:
        if event.trial is not None:
            tried.append(event.trial)
        if event.text == "writing the engine":
            raise Enough

    with pytest.raises(Enough):
        suanli.optimize(small_net(), IMAGES, on_event=until_written, **QUICK)
    assert tried[0].resumed
    assert tried[0].plan == engine.result.trials[0].plan


def test_batch_ranges_leave_no_gap() -> None:
    assert batch_ranges({1: 0, 8: 0, 32: 0}, 32) == [(1, 32, 0)]
    assert batch_ranges({1: 1, 32: 0}, 32) == [(1, 1, 1), (2, 32, 0)]
    assert batch_ranges({1: 0, 8: 1, 32: 0}, 32) == [(1, 1, 0), (2, 8, 1), (9, 32, 0)]
    assert batch_ranges({4: 0}, 4) == [(1, 4, 0)]


@pytest.mark.usefixtures("in_process")
def test_interrupt_keeps_what_was_found(tmp_path: Path) -> None:
    trials = 0

    def stop_after_one(event: Event) -> None:
        nonlocal trials
        trials += event.trial is not None
        if trials == 1:
            trials += 1
            raise KeyboardInterrupt

    options = {**QUICK, "fresh": True}
    with suanli.optimize(small_net(), IMAGES, on_event=stop_after_one, **options) as found:
        assert found.result.interrupted
        with torch.no_grad():
            assert found(IMAGES).shape == (2, 10)


class Stubborn(nn.Module):
    """Cannot be exported: what it does depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum().item() > 1e9:
            return x
        return self.linear(x)


def test_what_cannot_be_captured_is_said() -> None:
    with pytest.raises(CaptureError, match="eager"):
        suanli.optimize(Stubborn().eval(), torch.randn(2, 8), **QUICK)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget_s": 0}, "budget"),
        ({"budget_s": float("nan")}, "budget"),
        ({"objective": "speed"}, "latency"),
        ({"batch": 0}, "batch"),
        ({"batch": 8, "max_batch": 4}, "max-batch"),
        ({"max_drop": -1}, "max-drop"),
        ({"tolerance": 2}, "tolerance"),
        ({"device": "cuda:9"}, "cuda:9"),
        ({"backends": ("warp",)}, "warp"),
    ],
)
def test_senseless_options_are_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInputError, match=words) as caught:
        suanli.optimize(small_net(), IMAGES, **{**QUICK, **options})
    assert "\n" not in str(caught.value)


def test_unknown_workload_offers_near_names() -> None:
    with pytest.raises(BadInputError, match="resnet50"):
        optimize_workload("resnet51", OptimizeOptions())


def test_inputs_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(CaptureError) as caught:
        suanli.optimize(small_net(), torch.randn(2, 5, 16, 16), **QUICK)
    assert "\n" not in str(caught.value)


def test_target_that_is_no_engine_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(BadInputError, match="no engine"):
        suanli.optimize(small_net(), IMAGES, out=str(tmp_path), **QUICK)
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_full_disk_leaves_the_older_engine(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    kept = tmp_path / "engine"
    shutil.copytree(engine.result.engine_dir, kept)
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BadInputError, match="disk"):
        suanli.optimize(small_net(), IMAGES, out=kept, **QUICK)
    monkeypatch.undo()
    with suanli.load(kept) as older:
        assert older(IMAGES).shape == (2, 10)


def test_command_line_errors_are_one_line_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "suanli.cli", "optimize", "resnet51"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [(done.returncode, done.stderr)]
    for arguments in (
        ["optimize", "missing.py:model"],
        ["optimize", "digits-resnet", "--budget", "0"],
        ["run", str(tmp_path), "--input", "x.npy"],
    ):
        monkeypatch.setattr(sys, "argv", ["suanli", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said.append((end.value.code, capfd.readouterr().err))
    for code, line in said:
        assert code == 2, line
        assert len(line.strip().splitlines()) == 1, line
        assert "Traceback" not in line
