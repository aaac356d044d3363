"""`suanli queue` where its file, its words or its processes are not as they should be."""

import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from suanli.base.errors import ArtefactError, BadInputError
from suanli.jobs import estimate
from suanli.jobs.store import JobStore
from suanli.training.stopping import StopRequests
from tests.test_queue import CPU, job, queued, runner


def test_a_queue_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match=r"cannot be used: .*SUANLI_CONFIG"):
        JobStore(tmp_path / "file" / "queue").add(job("train", "x"))
    (tmp_path / "queue.db").mkdir()
    with pytest.raises(ArtefactError, match="cannot be used: unable to open"):
        JobStore(tmp_path).all()


def test_a_job_that_starts_while_it_is_removed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = JobStore(tmp_path)
    made = store.add(job("train", "x"))
    store.claim(made.id, "cpu")
    monkeypatch.setattr(JobStore, "get", lambda self, number: made)  # as it was a moment ago
    with pytest.raises(BadInputError, match="runs"):
        store.remove(made.id)
    assert [one.state for one in store.all()] == ["running"]


@pytest.mark.parametrize(
    "words",
    [
        ("train", "digits-resnet", "--epochs", "abc"),
        ("train", "digits-resnet", "--max-seconds=-3"),
        ("optimize", "resnet50", "--budget", "abc"),
    ],
)
def test_options_that_are_no_numbers_are_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(BadInputError, match="must be a number more than 0"):
        estimate.needs_of(job(*words), [CPU], [])


HOLDS = """
import sys, time
from pathlib import Path
from suanli.training.own_folder import FolderLock
lock = FolderLock(Path(sys.argv[1]))
assert lock.take()
print("ready", flush=True)
time.sleep(0.6)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_a_job_whose_queue_was_killed_before_it_knew_its_process_is_not_started_beside_it(
    tmp_path: Path,
) -> None:
    store, work = runner(tmp_path, [CPU], [])
    made = queued(store, tmp_path, "short")
    store.claim(made.id, "cpu")
    store.change(made.id, lambda j: replace(j, started_s=time.time() - 1000))
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / made.out)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    ends: list[float] = []
    reaper = threading.Thread(target=lambda: ends.append(child.wait() or time.time()))
    reaper.start()
    work.run(StopRequests())
    reaper.join()
    child.stdout.close()
    ended = store.get(made.id)
    assert (ended.state, ended.starts) == ("done", 2)
    begun = float((tmp_path / made.out / "span.txt").read_text().split()[0])
    assert begun > ends[0] - 0.2  # the thread may see the end somewhat later
