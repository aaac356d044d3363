"""What stands around a run by accident or malice: locks that are none, odd names and the like."""

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from suanli.base import events_log, files, processes
from suanli.base.errors import ArtefactError, BadInputError, SuanliError
from suanli.base.queue_results import Job
from suanli.parallel.replicas import Replicas
from suanli.training.calls import TrainOptions, train_workload
from suanli.training.checkpoints import Checkpoints, why_not_whole
from suanli.training.encryption import Cipher
from suanli.training.own_folder import FolderLock, holder
from suanli.workloads.weights import load_weights, save_weights, weight_facts
from tests.train_parts import new_loop, recipe, samples

REF = f"{Path(__file__).with_name('train_parts.py')}:recipe"
locks = pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")

# -- a lock that is none -------------------------------------------------------------------------


@locks
@pytest.mark.parametrize("kind", ["link", "broken link", "folder", "pipe"])
def test_what_is_no_file_is_no_lock(kind: str, tmp_path: Path) -> None:
    target, lock = tmp_path / "precious", tmp_path / ".run.lock"
    if kind != "broken link":
        target.write_text("mine")
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(target)
    with pytest.raises(BadInputError, match=r"\.run\.lock is no file.*remove it"):
        FolderLock(tmp_path / "run").take()
    assert holder(tmp_path / "run") is None
    assert target.exists() == (kind != "broken link")
    assert kind == "broken link" or target.read_text() == "mine"


@locks
@pytest.mark.parametrize("kind", ["second name", "other content", "binary"])
def test_somebody_s_file_is_locked_and_left_as_it_is(kind: str, tmp_path: Path) -> None:
    content = {"other content": b"77 is a number\n", "binary": bytes(range(256)) * 99}
    own = tmp_path / ".run.lock"
    if kind == "second name":
        (tmp_path / "precious").write_bytes(b"")
        os.link(tmp_path / "precious", own)
    else:
        own.write_bytes(content[kind])
    first = FolderLock(tmp_path / "run")
    assert first.take()
    assert not FolderLock(tmp_path / "run").take()
    assert holder(tmp_path / "run") is None  # who has it cannot be written there
    first.release()
    assert own.read_bytes() == content.get(kind, b"")


@locks
def test_what_a_killed_run_left_is_taken_over_and_removed(tmp_path: Path) -> None:
    for left in ("", "4711 elsewhere", "4711 elsewhere\n"):
        (tmp_path / ".run.lock").write_text(left)
        lock = FolderLock(tmp_path / "run")
        assert lock.take()
        assert holder(tmp_path / "run") == os.getpid()
        lock.release()
        assert not list(tmp_path.iterdir())


# -- names and environments ----------------------------------------------------------------------


def test_files_beside_a_folder_whose_name_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "in").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    own = tmp_path / "run.events.jsonl"
    assert events_log.path_of(Path()) == own
    assert events_log.path_of(Path("in") / "..").resolve() == own
    assert events_log.path_of(Path("in")) == Path("in.events.jsonl")
    assert files.beside(Path("/"), "-tune") == Path("/-tune")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "TORCHELASTIC_RESTART_COUNT"])
def test_an_environment_that_makes_no_sense_is_said(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = {"WORLD_SIZE": processes.world, "RANK": processes.rank}.get(name, processes.starts)
    for text in ("abc", "-1", "²", "1" * 5000):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv(name, text)
        with pytest.raises(BadInputError, match=rf"{name}=.* no number .*unset {name}"):
            ask()
    monkeypatch.setenv(name, "")
    assert ask() == (1 if name == "WORLD_SIZE" else 0)


def test_one_process_alone_is_the_first_whatever_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert (processes.world(), processes.rank()) == (1, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (processes.world(), processes.rank()) == (4, 3)


def test_half_an_environment_of_torchrun_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SuanliError, match=r"do not reach each other.* RANK expected"):
        Replicas.from_environment("cpu")


# -- odd lists of files, and equal files ---------------------------------------------------------

_ENTRY = {"bytes": 1, "sha256": "0"}


@pytest.mark.parametrize(
    "text",
    ["null", "[]", "{", "[" * 200_000, '{"files": ' + '{"a": ' * 100_000, "\x00", "1" * 5000],
)
def test_a_list_of_files_that_is_none(text: str, tmp_path: Path) -> None:
    for cipher in (None, Cipher(b"k" * 32)):
        (tmp_path / "complete.json").write_text(text)
        assert why_not_whole(tmp_path, cipher) == "it was not finished"


@pytest.mark.parametrize("name", ["a\0b", "../a", "", "..", "\ud800", "a/b"])
def test_names_that_no_file_of_a_checkpoint_has(name: str, tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path).save(3, {"run": {"a": torch.ones(2)}})
    marker = json.loads((folder / "complete.json").read_text())
    marker["files"][name] = _ENTRY
    (folder / "complete.json").write_text(json.dumps(marker))
    assert why_not_whole(folder)


def test_a_checkpoint_whose_list_leaves_its_tensors_out(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.save(3, {"run": {"a": torch.ones(2)}})
    marker = json.loads((folder / "complete.json").read_text())
    del marker["files"]["run.safetensors"]
    (folder / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(ArtefactError, match=r"run\.safetensors is absent"):
        checkpoints.load()


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    facts = {name: f"é {name}" for name in "zyxwvutsrq"}  # safetensors gives them in any order
    for name, given in (("a", facts), ("b", dict(reversed(facts.items()))), ("c", None)):
        save_weights(model, tmp_path / name, given)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert weight_facts(tmp_path / "a") == facts
    assert weight_facts(tmp_path / "c") == {}
    for odd in ("[1]", "{", "[" * 100_000):
        (tmp_path / "odd").write_bytes(save({"w": torch.ones(1)}, metadata={"facts": odd}))
        with pytest.raises(BadInputError, match="odd is no readable"):
            weight_facts(tmp_path / "odd")
    for name in "ac":
        other = torch.nn.Linear(3, 2)
        load_weights(other, tmp_path / name)
        assert torch.equal(other.weight, model.weight)
        assert torch.equal(other.bias, model.bias)


def test_a_job_s_words_are_what_a_shell_takes() -> None:
    job = Job(id=1, command=("train", "my file.py:w", "-o", "a b"), folder="/", log="")
    assert shlex.split(job.words) == list(job.command)


# -- another target ------------------------------------------------------------------------------


def test_a_run_that_goes_on_is_held_against_its_own_target() -> None:
    loop = new_loop(recipe())
    loop._watched = samples(60, 2)
    state = {**loop.run_state(), "quality": 0.6, "reached_at_s": 1.0}
    for target, before, found in ((0.5, 1.0, 1.0), (0.5, None, 0.0), (0.9, 1.0, None)):
        loop.limits = replace(loop.limits, target=target)
        loop.restore_run({**state, "reached_at_s": before})
        assert loop.reached_at_s == found
    loop.limits = replace(loop.limits, target=None)
    loop.restore_run(state)
    assert loop.reached_at_s == 1.0


# -- where copies lie ----------------------------------------------------------------------------


def test_a_backup_in_the_run_s_own_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for place in ("run", "run/checkpoints", "run/../run/copies", "link/copies"):
        options = TrainOptions(out=tmp_path / "run", plan="default", backup=tmp_path / place)
        with pytest.raises(BadInputError, match="lies in the run's folder"):
            train_workload(REF, options)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_backup_writes_over_nobody_s_files(tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    (copies / "plan.json").write_text("mine")
    (copies / "letter.txt").write_text("mine")
    options = TrainOptions(
        out=tmp_path / "run", plan="default", device="cpu", epochs=1, backup=copies
    )
    with pytest.raises(BadInputError, match=r"copies holds a plan\.json already"):
        train_workload(REF, options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copies"]
    assert (copies / "plan.json").read_text() == "mine"
    (copies / "plan.json").unlink()
    train_workload(REF, options)
    assert (copies / "letter.txt").read_text() == "mine"


def test_another_run_s_backup_is_not_gone_on_with(tmp_path: Path) -> None:
    def options(name: str, copies: str, **more: Any) -> TrainOptions:
        places = {"out": tmp_path / name, "backup": tmp_path / copies}
        return TrainOptions(plan="default", device="cpu", epochs=1, **places, **more)

    train_workload(REF, options("one", "copies of one"))
    train_workload(REF, replace(options("two", "copies of two", seed=2), epochs=2))
    before = (tmp_path / "copies of two" / "run.json").read_bytes()
    with pytest.raises(BadInputError, match="backup of another run: its seed is 2, and not 0"):
        train_workload(REF, options("one", "copies of two", resume=True))
    assert (tmp_path / "copies of two" / "run.json").read_bytes() == before
    result = train_workload(REF, replace(options("one", "copies of one", resume=True), epochs=2))
    assert result.steps == 14
