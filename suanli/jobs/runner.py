"""Runs the queue: one job at a time on each device, and again what did not end.

A job runs in a session of its own, so that Ctrl-C reaches this process alone, which then asks the
jobs to stop: they save, and wait for the next call. Where this process is killed the jobs go on;
the next call finds them by their number and start, and waits for them.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from suanli.base.events import Event, Listener
from suanli.base.queue_results import Job
from suanli.jobs import command as commands
from suanli.jobs.place import Place, next_start, why_nowhere, why_waits
from suanli.jobs.store import JobStore
from suanli.training.own_folder import holder
from suanli.training.stopping import StopRequests

_LOOK_S = 0.2
_STOP_S = 40.0  # a run saves and ends within 30 s of SIGTERM
_MOST_CRASHES = 3
_STOPPED = (130, -signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGTERM)


class Runner:
    """Works the queue off."""

    def __init__(
        self,
        store: JobStore,
        places: Callable[[], list[Place]],
        listener: Listener,
        *,
        program: tuple[str, ...] = (sys.executable, "-m", "suanli"),
    ) -> None:
        """Prepare.

        Args:
            store: The queue.
            places: Gives the devices with what is free now.
            listener: Told what starts and ends.
            program: What is put before a job's words.
        """
        self._store, self._places, self._listener = store, places, listener
        self._program = program
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._peaks: dict[int, int] = {}
        self._told: set[int] = set()

    def run(self, stop: StopRequests) -> bool:
        """Run until nothing waits and nothing runs; gives whether it was asked to stop before."""
        while True:
            self._reap()
            if stop.asked:
                self._stop_all()
                return True
            while self._start_one():
                pass
            jobs = self._store.all()
            if not any(job.state in ("waiting", "running") for job in jobs):
                return False
            time.sleep(_LOOK_S)

    # -- starting -------------------------------------------------------------------------------

    def _start_one(self) -> bool:
        jobs, places = self._store.all(), self._places()
        waiting = [job for job in jobs if job.state == "waiting"]
        for job in waiting:
            reason = why_nowhere(job, places)
            if reason:
                self._end(job.id, _failed(reason))
                return True
        busy = {job.device: _left(job) for job in jobs if job.state == "running"}
        found = next_start(waiting, places, busy)
        if found is None:
            self._say_waits(waiting, places, busy)
            return False
        claimed = self._store.claim(found.job.id, found.device)
        if claimed is not None:
            self._launch(claimed)
        return True

    def _say_waits(
        self, waiting: Sequence[Job], places: Sequence[Place], busy: Collection[str]
    ) -> None:
        """Tell once of each job that memory is what it waits for."""
        for job in waiting:
            reason = why_waits(job, places, busy)
            if reason and job.id not in self._told:
                self._say(f"job {job.id}: {reason}")
            self._told = self._told | {job.id} if reason else self._told - {job.id}

    def _launch(self, job: Job) -> None:
        folder, log = Path(job.folder), Path(job.log)
        words = commands.to_start(job.command, folder, job.device)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as out:
                out.write(f"$ suanli {shlex.join(words)}\n".encode())
                out.flush()
                child = subprocess.Popen(
                    [*self._program, *words],
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self._end(job.id, _failed(f"cannot start: {error.strerror}"))
            return
        self._children[job.id] = child
        self._peaks[job.id] = job.peak_bytes or 0
        born = _born(child.pid)
        self._store.change(job.id, lambda j: replace(j, pid=child.pid, born=born))
        self._say(f"job {job.id} on {job.device}: {shlex.join(words)}")

    # -- ending ---------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Take in what ended, of this process and of earlier ones."""
        for job in self._store.all():
            if job.state != "running":
                continue
            child = self._children.get(job.id)
            if child is not None:
                code = child.poll()
                if code is None:
                    self._watch(job.id, child.pid)
                else:
                    del self._children[job.id]
                    self._ended(job.id, code)
            elif job.pid is None and (pid := _trains(job)) is not None:
                # its queue was killed before it could write down which process it had started
                self._adopt(job.id, pid)
            elif not _lives(job):
                # started by a call that was killed: how it ended is not known, so it goes on
                self._end(job.id, lambda j: _again(j, "its queue was killed"))

    def _adopt(self, number: int, pid: int) -> None:
        self._store.change(
            number, lambda j: replace(j, pid=pid, born=_born(pid)) if j.pid is None else None
        )

    def _ended(self, number: int, code: int) -> None:
        peak = self._peaks.pop(number, 0) or None

        def outcome(job: Job) -> Job:
            spent = job.spent_s + max(0.0, time.time() - (job.started_s or time.time()))
            job = replace(job, exit_code=code, peak_bytes=peak, spent_s=spent)
            if code == 0:
                return replace(job, state="done", reason="", pid=None, born=None)
            if code in _STOPPED:
                return _again(job, "it was stopped")
            if code < 0 and job.crashes + 1 < _MOST_CRASHES:
                return _again(replace(job, crashes=job.crashes + 1), f"signal {-code} ended it")
            reason = f"signal {-code} ended it" if code < 0 else _last_line(Path(job.log), code)
            return replace(job, state="failed", reason=reason, pid=None, born=None)

        self._end(number, outcome)

    def _end(self, number: int, how: Callable[[Job], Job]) -> None:
        job = self._store.change(number, lambda j: how(j) if not _is_over(j) else None)
        if job is not None:
            words = f": {job.reason}" if job.reason else ""
            self._say(f"job {number} {job.state}{words}")

    def _stop_all(self) -> None:
        """Ask all children to save and end; after a while they are killed."""
        for child in self._children.values():
            child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_S
        while self._children and time.monotonic() < deadline:
            self._reap()
            time.sleep(_LOOK_S)
        for child in self._children.values():
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for number in list(self._children):
            del self._children[number]
            self._end(number, lambda j: _again(j, "it did not stop and was killed"))

    def _watch(self, number: int, pid: int) -> None:
        """Keep the most memory that a job's processes were seen to hold together."""
        try:
            process = psutil.Process(pid)
            held = [p.memory_info().rss for p in (process, *process.children(recursive=True))]
        except psutil.Error:
            return
        self._peaks[number] = max(self._peaks[number], sum(held))

    def _say(self, text: str) -> None:
        self._listener(Event(kind="note", text=text))


def _is_over(job: Job) -> bool:
    return job.state in ("done", "failed")


def _failed(reason: str) -> Callable[[Job], Job]:
    return lambda job: replace(job, state="failed", reason=reason)


def _again(job: Job, reason: str) -> Job:
    """The job at its place in the queue again."""
    return replace(job, state="waiting", device="", pid=None, born=None, reason=reason)


def _left(job: Job) -> float | None:
    """Seconds until a running job should end; None where that is not known."""
    seconds = job.need_on(job.device).seconds
    if seconds is None or job.started_s is None:
        return None
    return max(0.0, seconds - (time.time() - job.started_s))


def _born(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _lives(job: Job) -> bool:
    """Whether a job's process is still there; one that was just claimed counts as such."""
    if job.pid is None:
        return time.time() - (job.started_s or 0.0) < _STOP_S
    return job.born is not None and _born(job.pid) == job.born


def _trains(job: Job) -> int | None:
    """The process that trains in a job's folder, or None."""
    return holder(Path(job.folder) / job.out) if job.out else None


def _last_line(log: Path, code: int) -> str:
    """What a job said last, without the program's name."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    said = [line.strip() for line in lines if line.strip() and not line.startswith("$ suanli")]
    last = said[-1].removeprefix("suanli: ")[:200] if said else "it said nothing"
    return f"exit code {code}: {last}"
