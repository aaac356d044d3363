"""Whose a run's folder is, what is written when it begins and goes on, and what is told of it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from suanli.base.errors import BadInputError, SuanliError
from suanli.base.files import write_atomic
from suanli.base.train_results import TrainResult
from suanli.training import own_folder, run_folder
from suanli.training.calls import TrainOptions, train_workload
from suanli.training.checkpoints import Checkpoints
from suanli.training.own_folder import FolderLock, holder
from suanli.training.request import TrainRequest
from suanli.training.run_folder import Keeping, RunFolder
from suanli.training.trainer import Trainer
from tests.train_parts import new_loop, plant_nan, recipe

REF = f"{Path(__file__).with_name('train_parts.py')}:recipe"
locks = pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")


def _left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- what a run is, and whose weights its own are ------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the weights that a built-in's name finds."""
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "weights"


def _built_in(out: Path, backup: Path | None = None, **asked: Any) -> TrainResult:
    """Train what counts as a built-in workload: its reference is its name."""
    keeping = Keeping(backup=backup)
    request = TrainRequest(plan="default", device="cpu", out=out, keeping=keeping, **asked)
    return Trainer(replace(recipe(), ref="stripes"), request, lambda event: None).run()[0]


def _epochs(folder: Path) -> int:
    data = json.loads((folder / "run.json").read_text())
    return int(data["settings"]["epochs"])


def test_other_epochs_of_a_run_that_goes_on_are_recorded(tmp_path: Path, kept: Path) -> None:
    out, backup = tmp_path / "run", tmp_path / "backup"
    first = _built_in(out, backup, steps=9)
    assert (first.as_written, first.stopped, _epochs(out)) == (True, "steps", 4)
    again = _built_in(out, backup, resume=True, epochs=2)
    assert "the run goes on to 2 epochs, and was begun with 4" in again.notes
    assert (again.as_written, again.steps) == (False, 14)
    assert again.hyper_parameters["epochs"] == 2
    assert (_epochs(out), _epochs(backup)) == (2, 2)
    plain = _built_in(out, backup, resume=True)  # what was changed stays so
    assert (plain.as_written, plain.steps, plain.hyper_parameters["epochs"]) == (False, 14, 2)
    assert not kept.exists()
    same = _built_in(tmp_path / "same", steps=9)
    same = _built_in(tmp_path / "same", resume=True, epochs=4)  # as it was begun
    assert same.as_written and not any("goes on to" in note for note in same.notes)
    assert len(list(kept.iterdir())) == 1


def test_limits_of_a_run_that_goes_on_are_recorded(tmp_path: Path) -> None:
    out = tmp_path / "run"
    slow = replace(recipe(), settings=replace(recipe().settings, lr=1e-5))

    def trained(**asked: Any) -> TrainResult:
        request = TrainRequest(plan="default", device="cpu", out=out, **asked)
        return Trainer(slow, request, lambda event: None).run()[0]

    first = trained(to=1e-6)
    assert (first.stopped, first.steps) == ("target", 7)
    assert trained(resume=True).steps == 7  # there already
    assert first.quality.value < 1
    again = trained(resume=True, to=1.0, max_seconds=1e6)
    assert (again.stopped, again.quality.target) == ("epochs", 1)
    record = json.loads((out / "run.json").read_text())
    assert (record["target"], record["max_seconds"]) == (1, 1e6)


def test_a_refused_resume_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    _built_in(out, steps=9)
    for marker in out.rglob("complete.json"):
        marker.unlink()
    with pytest.raises(SuanliError, match="no checkpoint is whole"):
        _built_in(out, resume=True, epochs=2)
    assert _epochs(out) == 4


def test_a_backup_that_comes_later_learns_what_the_run_is(tmp_path: Path) -> None:
    out, backup = tmp_path / "run", tmp_path / "backup"
    _built_in(out, steps=9)
    _built_in(out, backup, resume=True)
    for name in ("run.json", "plan.json", "environment.json"):
        assert (backup / name).read_bytes() == (out / name).read_bytes()


def test_weights_that_started_elsewhere_or_slowed_down_are_not_the_workload_s(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _built_in(tmp_path / "first")
    assert first.as_written
    (own,) = kept.iterdir()
    own.unlink()
    from_it = _built_in(tmp_path / "from", start=tmp_path / "first")
    assert from_it.as_written  # the hyper-parameters are
    assert not list(kept.iterdir())
    plant_nan(monkeypatch, at_call=3)
    halved = _built_in(tmp_path / "halved", on_nan="rollback", steps=20)
    assert not halved.as_written
    rest = _built_in(tmp_path / "halved", resume=True)  # the checkpoint has the lower rate
    assert (rest.steps, rest.stopped, rest.as_written) == (28, "epochs", False)
    assert not list(kept.iterdir())


# -- what is told --------------------------------------------------------------------------------


def test_failing_checkpoints_are_told_beside_failing_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    folder, loop, notes = RunFolder(tmp_path / "gone" / "run"), new_loop(recipe()), list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", full)
        for _ in range(2):
            folder._metrics(loop.progress(0.0), notes.append)
            folder.save(loop, notes.append)
    assert notes == [
        "metrics are not kept: No such file or directory",
        "no checkpoint at step 0: No space left on device",
    ]
    folder.save(loop, notes.append)
    assert notes[2:] == ["checkpoints are written again, from step 0 on"]


def test_metrics_that_cannot_be_cut_are_said_with_a_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_atomic", full)
    with pytest.raises(SuanliError, match=r"metrics.jsonl: No space left .*--resume goes on"):
        run_folder._cut_metrics(tmp_path / "metrics.jsonl", 2)


# -- one process in a folder ---------------------------------------------------------------------


@locks
def test_a_folder_is_one_process_s(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "one"
    first, second = FolderLock(out), FolderLock(tmp_path / "runs" / "." / "one")
    assert first.take()
    assert not second.take()
    assert holder(out) == os.getpid()
    other = FolderLock(tmp_path / "runs" / "other")
    assert other.take()
    other.release()
    first.release()
    assert holder(out) is None
    assert second.take()
    second.release()


@locks
def test_a_second_start_or_resume_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = TrainOptions(out=out, plan="default", device="cpu", epochs=1)
    lock = FolderLock(out)
    assert lock.take()
    words = rf"another process trains in .*run \(pid {os.getpid()}\)"
    with pytest.raises(BadInputError, match=words):
        train_workload(REF, options)
    lock.release()
    assert _left(tmp_path) == []
    train_workload(REF, options)
    before = _left(tmp_path)
    assert lock.take()
    with pytest.raises(BadInputError, match=words + r" \(wait for its end\)"):
        train_workload(REF, replace(options, resume=True))
    lock.release()
    assert _left(tmp_path) == before


@locks
def test_a_default_folder_is_taken_from_its_choice_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = TrainOptions(plan="default", device="cpu", epochs=1)
    searching = FolderLock(Path("runs/stripes"))  # there is nothing of the run yet
    assert searching.take()
    assert train_workload(REF, options).run_dir == "runs/stripes-2"
    searching.release()
    assert not Path("runs/stripes").exists()
    again = train_workload(REF, replace(options, resume=True, epochs=2))
    assert (again.run_dir, again.steps) == ("runs/stripes-2", 14)
    assert train_workload(REF, options).run_dir == "runs/stripes-3"
    with (
        pytest.raises(BadInputError, match="no run in runs/none"),
        own_folder.own_folder(None, "none", resume=True),
    ):
        pass


HOLDS = """
import os, sys, time
from pathlib import Path
from suanli.training.own_folder import FolderLock
lock = FolderLock(Path(sys.argv[1]))
assert lock.take()
if os.fork() == 0:  # as a process that reads samples
    time.sleep(20)
    os._exit(0)
print("ready", flush=True)
time.sleep(100)
"""


@locks
def test_a_killed_process_leaves_its_folder_free(tmp_path: Path) -> None:
    out, lock = tmp_path / "run", FolderLock(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(out)], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert holder(out) == process.pid
        assert not lock.take()
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.05)
        try:
            assert lock.take()  # though the child that it forked still lives
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    lock.release()
    assert _left(tmp_path) == []


@locks
def test_a_file_system_without_locks_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    for lock in (FolderLock(tmp_path / "runs" / "one"), FolderLock(tmp_path / "runs" / "one")):
        assert lock.take()
        lock.release()
    (tmp_path / "file").touch()
    assert FolderLock(tmp_path / "file" / "run").take()
    assert _left(tmp_path) == ["file"]


# -- a beginning that is cut short ---------------------------------------------------------------


class _Killed(BaseException):
    """In the place of a signal."""


def _failing_at(number: int, error: BaseException) -> Any:
    """Write files, but for the one of this number."""
    calls: list[Path] = []

    def write(path: Path, text: str) -> None:
        calls.append(path)
        if len(calls) == number:
            raise error
        write_atomic(path, text)

    return write


@pytest.mark.parametrize("number", [1, 3, 4, 6])
def test_a_full_disk_while_a_run_begins_leaves_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = _failing_at(number, OSError(28, "No space left on device"))
    monkeypatch.setattr(run_folder, "write_atomic", write)
    with pytest.raises(BadInputError, match=r"cannot write to .*No space left"):
        _built_in(tmp_path / "runs" / "one", tmp_path / "copies")
    assert _left(tmp_path) == []


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_killed_while_a_run_begins_it_begins_again_or_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, backup = tmp_path / "run", tmp_path / "copies"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_atomic", _failing_at(number, _Killed()))
        patch.setattr(RunFolder, "withdraw", lambda self: None)
        with pytest.raises(_Killed):
            _built_in(out, backup, epochs=1)
    out.mkdir(exist_ok=True)
    (out / ".environment.json.1-2-abcdef01.xyz").touch()  # what a kill leaves of a file
    begun = (out / "run.json").exists()
    assert begun == (number > 3)
    result = _built_in(out, backup, epochs=1, resume=begun)
    assert result.steps == 7
    assert (backup / "run.json").read_bytes() == (out / "run.json").read_bytes()
    assert begun or not list(out.glob(".*"))


def test_what_is_nobody_s_beginning_is_not_taken(tmp_path: Path) -> None:
    for names in (["plan.json"], ["environment.json", "notes.txt"]):
        out = tmp_path / names[-1]
        out.mkdir()
        for name in names:
            (out / name).touch()
        with pytest.raises(BadInputError, match="holds something that is no run"):
            _built_in(out)
        assert sorted(path.name for path in out.iterdir()) == sorted(names)
