"""`suanli train` from end to end: the folder, Ctrl-C, kill -9, resuming, own modules, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import suanli
from suanli.base import codec, schema
from suanli.base.errors import BadInputError
from suanli.base.events import Event
from suanli.base.hardware import Ceilings
from suanli.base.timing import Estimate
from suanli.base.train_plan import TrainPlan
from suanli.base.train_results import TrainResult
from suanli.devices import device
from suanli.reports import training as report
from suanli.training import choosing
from suanli.training.calls import TrainOptions, train_workload
from suanli.training.checkpoints import newest_whole
from suanli.training.run_folder import read_metrics
from suanli.training.stopping import StopRequests
from tests.train_parts import WORKLOAD, ask_to_stop, data, plant_nan, samples

REF = f"{Path(__file__).with_name('train_parts.py')}:recipe"
ROOT = Path(__file__).parent.parent


def _train(out: Path, **options: Any) -> TrainResult:
    options = {"plan": "default", "device": "cpu", **options}
    return train_workload(REF, TrainOptions(out=out, **options))


def test_the_folder_holds_all_of_a_run(tmp_path: Path) -> None:
    events: list[Event] = []
    out = tmp_path / "run"
    options = TrainOptions(out=out, plan="default", device="cpu", to=50)
    result = train_workload(REF, options, on_event=events.append)
    assert {f.name for f in out.iterdir()} >= {
        *("run.json", "plan.json", "environment.json", "metrics.jsonl", "tensorboard"),
        *("checkpoints", "weights.safetensors", "result.json"),
    }
    data = json.loads((out / "result.json").read_text())
    jsonschema.validate(data, json.loads(schema.text("train")))
    assert codec.read(TrainResult, out / "result.json").steps == result.steps
    assert codec.read(TrainPlan, out / "plan.json") == result.plan
    assert result.quality is not None
    assert result.quality.target == 0.5
    assert result.quality.reached_at_s is not None
    assert result.stopped == "target"
    assert result.quality.value > 0.5
    assert result.as_written
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines][-1] == result.steps
    assert any(e.kind == "progress" for e in events)
    assert newest_whole(out / "checkpoints") == Path(str(result.checkpoint))
    weights = load_file(out / "weights.safetensors")
    assert weights.keys() == WORKLOAD.make_model().state_dict().keys()


def test_the_report_fits_and_says_what_matters(tmp_path: Path) -> None:
    import io

    from rich.console import Console

    result = _train(tmp_path / "run", epochs=2)
    page = io.StringIO()
    report.train(result, Console(file=page, width=80))
    text = page.getvalue()
    for words in ("stripes, batch 32, seed 0", "samples/s", "2.00 epochs, 14 steps", "accuracy"):
        assert words in text
    assert "not the workload's as written" in text  # the epochs are not
    assert max(map(len, text.splitlines()[:-1])) <= 80
    page = io.StringIO()
    asked = ("my file.py:recipe", "--data", "D")
    report.train(replace(result, interrupted=True), Console(file=page, width=80), asked=asked)
    again = f"Go on with: suanli train 'my file.py:recipe' --resume -o {tmp_path / 'run'} --data D"
    assert again in page.getvalue().splitlines()


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _train(whole)
    _stopped_after(parts, steps=9)
    cut = json.loads((parts / "result.json").read_text())
    assert cut["interrupted"] and cut["quality"] is None and cut["steps"] == 9
    again = _train(parts, resume=True)
    assert again.resumed_from == 9
    assert again.steps == 28
    one, other = (load_file(f / "weights.safetensors") for f in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [x["step"] for x in read_metrics(parts / "metrics.jsonl")] == sorted(
        {x["step"] for x in read_metrics(parts / "metrics.jsonl")}
    )
    done = _train(parts, resume=True)  # there is nothing left to do
    assert (done.resumed_from, done.steps, done.stopped) == (28, 28, "epochs")
    assert (done.step_ms, done.samples_per_s) == (again.step_ms, again.samples_per_s)


def test_a_resumed_run_keeps_what_the_search_said(tmp_path: Path) -> None:
    _stopped_after(tmp_path, steps=9)
    first = codec.read(TrainResult, tmp_path / "result.json")
    speedup = Estimate(p50=2.0, lo95=1.9, hi95=2.1)
    told = replace(first, speedup=speedup, baseline="eager fp32")
    (tmp_path / "result.json").write_text(codec.dumps(told))
    again = _train(tmp_path, resume=True)
    assert (again.speedup, again.baseline) == (speedup, "eager fp32")
    (tmp_path / "result.json").write_text("{")  # a file that was cut is none
    assert _train(tmp_path, resume=True).speedup is None


def _stopped_after(out: Path, steps: int, **more: Any) -> None:
    """A run that is asked to stop, as a signal would, after so many steps."""
    from suanli.training import loop as module

    was = module._REPORT_EVERY_S
    module._REPORT_EVERY_S = 0.0
    try:
        options = TrainOptions(out=out, plan="default", device="cpu", **more)
        before = signal.getsignal(signal.SIGTERM)

        def at(event: Event) -> None:
            if event.progress is not None and event.progress.step == steps:
                ask_to_stop(signal.SIGTERM)

        train_workload(REF, options, on_event=at)
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        module._REPORT_EVERY_S = was


def test_encrypted_with_a_backup_it_resumes_from_the_backup(tmp_path: Path) -> None:
    import shutil

    out, backup, key = tmp_path / "run", tmp_path / "backup", tmp_path / "key"
    _train(out, epochs=1, backup=backup, key=key)
    shutil.rmtree(out / "checkpoints")
    result = _train(out, epochs=2, resume=True, backup=backup, key=key)
    assert result.resumed_from == 7
    with pytest.raises(BadInputError, match="encrypted"):
        _train(out, epochs=3, resume=True, backup=backup)


def test_a_mistyped_key_of_a_run_that_goes_on_is_not_made(tmp_path: Path) -> None:
    out, key, typo = tmp_path / "run", tmp_path / "key", tmp_path / "kye"
    _train(out, epochs=1, key=key)
    with pytest.raises(BadInputError, match=r"kye: No such file .*the key it was begun with"):
        _train(out, epochs=2, resume=True, key=typo)
    assert not typo.exists()


def test_a_run_that_was_begun_without_a_key_is_not_gone_on_with_one(tmp_path: Path) -> None:
    out, key = tmp_path / "run", tmp_path / "key"
    _train(tmp_path / "other", epochs=1, key=key)
    _train(out, epochs=1)
    with pytest.raises(BadInputError, match=r"begun without a key.*go on without --key"):
        _train(out, epochs=2, resume=True, key=key)
    with pytest.raises(BadInputError, match="sharded run cannot be encrypted"):
        _train(tmp_path / "third", key=key, plan=TrainPlan(sharded=True))
    assert not (tmp_path / "third").exists()


def test_options_that_a_run_that_goes_on_does_not_take_are_said(tmp_path: Path) -> None:
    out = tmp_path / "run"
    _train(out, epochs=1, seed=2, freeze=("body.0.*",))
    again = _train(
        out, epochs=2, resume=True, seed=2, freeze=("head.*",), lr_of={"head.*": 3}, tune=4
    )
    (said,) = [note for note in again.notes if "changes nothing" in note]
    assert said == "the run goes on as it was begun, so --freeze, --lr-of, --tune changes nothing"
    plain = _train(out, epochs=3, resume=True)
    assert not any("changes nothing" in note for note in plain.notes)


def test_own_rates_are_reported_kept_and_gone_on_with(tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    _stopped_after(out, steps=9, lr_of={"head.*": 0.5})
    result = _train(out, resume=True)
    line = "2 tensors that match head.* learn at 0.5 times the rate: head.weight, head.bias"
    assert line in result.notes
    assert result.hyper_parameters["lr_of"] == "head.*=0.5"
    assert not result.as_written
    _train(whole, lr_of=("head.*=0.5",))
    one, other = (load_file(f / "weights.safetensors") for f in (out, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(BadInputError, match=r"--lr-of tail.\* matches no parameter .*body"):
        _train(tmp_path / "c", lr_of={"tail.*": 2})


def test_a_long_judgement_gives_way_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import suanli.training.loop as module

    judged = module.judge

    def asked_meanwhile(*args: Any, stop: Callable[[], bool], **more: Any) -> float:
        ask_to_stop(signal.SIGTERM)
        return judged(*args, stop=stop, **more)

    out = tmp_path / "run"
    monkeypatch.setattr(module, "_LONGEST_JUDGING_S", 0.0)
    monkeypatch.setattr(module, "judge", asked_meanwhile)
    first = _train(out, epochs=2)  # at the end of its first epoch
    assert (first.stopped, first.steps, first.quality) == ("asked", 7, None)
    assert newest_whole(out / "checkpoints") is not None
    monkeypatch.setattr(module, "judge", judged)
    ends = _train(out, resume=True, epochs=2)
    assert ends.quality is not None
    monkeypatch.setattr(module, "judge", asked_meanwhile)
    late = tmp_path / "late"
    at_end = _train(late, epochs=1)
    assert (at_end.stopped, at_end.steps, at_end.quality) == ("asked", 7, None)
    assert at_end.interrupted
    monkeypatch.setattr(module, "judge", judged)
    made_up = _train(late, resume=True, epochs=1)
    assert (made_up.stopped, made_up.steps) == ("epochs", 7)
    assert made_up.quality is not None


def test_a_nan_can_be_rolled_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_nan(monkeypatch, at_call=5)
    result = _train(tmp_path / "run", on_nan="rollback")
    assert result.steps == 28
    assert any("back to step 0, with 0.5 of the rate" in note for note in result.notes)


def test_each_rollback_halves_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from suanli.training.step import Stepper

    real, calls, rates = Stepper.gradients, 0, []

    def twice(self: Stepper, *args: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        rates.append(self.peak_rates[0])
        loss = real(self, *args, **more)
        return loss * float("nan") if calls in (3, 6) else loss

    monkeypatch.setattr(Stepper, "gradients", twice)
    result = _train(tmp_path / "run", on_nan="rollback", epochs=1)
    assert [rates[i] / rates[0] for i in (0, 3, 6)] == [1.0, 0.5, 0.25]
    assert any("back to step 0, with 0.25 of the rate" in note for note in result.notes)


def test_weights_that_are_nan_are_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from suanli.training.step import Stepper

    real = Stepper.update

    def broken(self: Stepper, done: float) -> None:
        real(self, done)
        if done > 0.8:  # the last step's update
            next(self.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(Stepper, "update", broken)
    result = _train(tmp_path / "run", epochs=1, checkpoint_s=1e-9)
    assert "no checkpoint at step 7: a weight is infinite or NaN" in result.notes
    newest = newest_whole(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step-000000006"


def test_a_run_that_ended_before_its_first_checkpoint_begins_where_it_began(
    tmp_path: Path,
) -> None:
    import shutil

    _train(tmp_path / "first", epochs=1)
    whole, again = tmp_path / "whole", tmp_path / "again"
    for out in (whole, again):
        _train(out, epochs=1, start=tmp_path / "first", seed=3)
    shutil.rmtree(again / "checkpoints")
    result = _train(again, resume=True)
    assert result.resumed_from is None
    one, other = (load_file(f / "weights.safetensors") for f in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_backup_alone_is_enough_and_is_one_run_s(tmp_path: Path) -> None:
    import shutil

    out, backup = tmp_path / "run", tmp_path / "backup"
    _train(out, epochs=1, backup=backup)
    with pytest.raises(BadInputError, match="holds checkpoints of another run"):
        _train(tmp_path / "other", epochs=1, backup=backup)
    shutil.rmtree(out)
    result = _train(out, epochs=2, resume=True, backup=backup)
    assert (result.resumed_from, result.steps) == (7, 14)


def test_acceptance_samples_are_looked_at_before_the_first_step(tmp_path: Path) -> None:
    parts = data()
    none = replace(parts.acceptance, labels=None)
    short = replace(parts.search, labels=parts.search.labels[:3])  # type: ignore[index]
    for bad, words in (
        (replace(parts, acceptance=none), "acceptance samples have none"),
        (replace(parts, search=short), "60 search samples but 3 labels"),
    ):
        with pytest.raises(BadInputError, match=words):
            suanli.train(replace(WORKLOAD, data=lambda bad=bad: bad), plan="default", out=tmp_path)


def test_weights_of_another_run_and_frozen_parts(tmp_path: Path) -> None:
    _train(tmp_path / "one", epochs=1)
    result = _train(tmp_path / "two", epochs=1, start=tmp_path / "one", freeze=("body.*",))
    one, two = (load_file(tmp_path / n / "weights.safetensors") for n in ("one", "two"))
    assert torch.equal(one["body.0.weight"], two["body.0.weight"])
    assert not torch.equal(one["head.weight"], two["head.weight"])
    assert any("tensors taken from" in note for note in result.notes)


# -- from Python -------------------------------------------------------------------------------


def _own() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


def test_an_own_module_is_trained_in_place(tmp_path: Path) -> None:
    model, given = _own(), samples(300, 5)
    before = [p.detach().clone() for p in model.parameters()]
    run = suanli.train(
        model,
        (given.inputs[0], given.labels),
        functional.cross_entropy,
        optimizer="adam",
        lr=0.01,
        batch=32,
        epochs=6,
        plan="default",
        out=str(tmp_path / "run"),
    )
    assert run.model is model
    assert not model.training
    assert run.result.quality is not None
    assert run.result.quality.value > 0.6
    assert run.result.quality.n == 30
    assert not any(
        torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
    )


def test_numbers_to_come_near_to_are_judged_by_the_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    run = suanli.train(
        nn.Linear(4, 1), (x, y), functional.mse_loss, lr=0.1, epochs=20, plan="default",
        out=tmp_path / "run",
    )  # fmt: skip
    assert run.result.quality is not None
    assert run.result.quality.metric == "loss"
    assert run.result.quality.value < 1e-3
    stopped = suanli.train(
        nn.Linear(4, 1), (x, y), functional.mse_loss, lr=0.01, epochs=20, plan="default",
        to=3.0, out=tmp_path / "target",
    ).result  # fmt: skip
    assert stopped.quality is not None
    assert (stopped.quality.target, stopped.stopped) == (3.0, "target")  # no percentage


def test_a_module_without_a_file_is_searched_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unmeasured = Ceilings(device=device("cpu").info, items=(), threads=1, measured_at="")
    monkeypatch.setattr(choosing, "ceilings", lambda name: unmeasured)
    given = samples(400, 5)
    run = suanli.train(
        _own(), torch.utils.data.TensorDataset(given.inputs[0], given.labels),
        functional.cross_entropy, lr=0.1, batch=64, epochs=1, budget_s=5.0, out=tmp_path / "run",
        device="cpu",
    )  # fmt: skip
    trials = run.result.trials
    verified = [t for t in trials if t.status == "verified"]
    assert verified
    assert any(t.baseline for t in verified)
    assert run.result.plan.as_plan() in [t.plan for t in verified]
    skipped = [t for t in trials if t.plan.backend == "inductor"]
    assert skipped and all("in this process" in t.reason for t in skipped)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (suanli.train, "needs data and a loss"),
        (lambda m: suanli.train(m, 3, functional.mse_loss), "data cannot be a int"),
        (lambda m: suanli.train(m, ([1], [2]), functional.mse_loss), "must be tensors"),
        (
            lambda m: suanli.train(m, (torch.zeros(3, 64), torch.zeros(2)), functional.mse_loss),
            "2 labels but 3 entries",
        ),
        (
            lambda m: suanli.train(m, (torch.zeros(0, 64), torch.zeros(0)), functional.mse_loss),
            "no samples",
        ),
        (
            lambda m: suanli.train(m, (torch.zeros(9, 64), torch.zeros(9)), functional.mse_loss),
            "too few to hold some out",
        ),
        (
            lambda m: suanli.train(
                m, (torch.zeros(9, 64), torch.zeros(9)), functional.mse_loss, warmth=3
            ),
            "'warmth' is no option",
        ),
        (lambda m: suanli.train(m, epochs=0), "--epochs"),
        (lambda m: suanli.train(m, max_seconds=0), "--max-seconds"),
        (lambda m: suanli.train(m, to=400), "--to"),
        (lambda m: suanli.train(m, on_nan="cry"), "--on-nan"),
    ],
)
def test_bad_calls_are_one_line(
    call: Callable[[nn.Module], Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match=words):
        call(_own())
    assert not (tmp_path / "runs").exists()


# -- the command -------------------------------------------------------------------------------


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "suanli.cli", "train", *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_killed_and_terminated_it_goes_on_to_the_same_end(tmp_path: Path) -> None:
    arguments = (REF, "--plan", "default", "--epochs", "120", "--checkpoint", "0.05", "-o")
    out, whole = tmp_path / "run", tmp_path / "whole"
    for number in (signal.SIGKILL, signal.SIGTERM):
        resume = ["--resume"] if out.exists() else []
        process = subprocess.Popen(
            [*_command(*arguments, str(out)), *resume], env=_environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        seen = newest_whole(out / "checkpoints")
        deadline = time.monotonic() + 60
        while newest_whole(out / "checkpoints") == seen and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        code = process.wait(30)
        assert code == (-9 if number == signal.SIGKILL else 130)
        newest = newest_whole(out / "checkpoints")
        assert newest is not None
        assert newest.name < "step-000000840"
    done = subprocess.run(
        [*_command(*arguments, str(out)), "--resume", "--json"], env=_environment(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["resumed_from"] > 0
    assert result["steps"] == 840
    subprocess.run(_command(*arguments, str(whole)), env=_environment(), check=True,
                   capture_output=True)  # fmt: skip
    one, other = (load_file(f / "weights.safetensors") for f in (out, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_auto_finds_a_verified_plan_in_processes_of_their_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [*_command(REF, "--budget", "60", "--json", "-o", str(tmp_path / "run"))],
        env=_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    jsonschema.validate(result, json.loads(schema.text("train")))
    statuses = {t["status"] for t in result["trials"]}
    assert "verified" in statuses
    assert result["sol"]["fraction"] > 0
    assert result["baseline"]


def test_folders_that_may_not_be_taken(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no run in"):
        _train(tmp_path / "none", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(BadInputError, match="holds something that is no run"):
        _train(tmp_path / "other")
    _train(tmp_path / "run", epochs=1)
    with pytest.raises(BadInputError, match="holds a run"):
        _train(tmp_path / "run")
    with pytest.raises(BadInputError, match="no labelled data"):
        train_workload("resnet50", TrainOptions(out=tmp_path / "x", plan="default"))


def test_a_signal_that_was_not_set_from_python_is_restored_as_far_as_can_be() -> None:
    was = signal.getsignal(signal.SIGTERM)
    try:
        with StopRequests() as stop:
            stop._before[signal.SIGTERM] = None  # as `signal.signal` says of such a handler
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, was)
