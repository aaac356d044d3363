"""The jobs of this machine in one SQLite file: what is written there outlives every process.

Each change is a transaction of its own, so several calls of `suanli queue` can work on it at once.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from suanli.base import codec
from suanli.base.errors import ArtefactError, BadInputError
from suanli.base.files import config_dir
from suanli.base.queue_results import Job, JobState
from suanli.jobs import command as commands

_WAIT_S = 30.0  # for another process's transaction


class JobStore:
    """Adds, changes and lists jobs."""

    def __init__(self, folder: Path | None = None) -> None:
        """Open the queue; its folder is made on the first change.

        Args:
            folder: By default `queue` in the user's configuration folder.
        """
        self.folder = folder or config_dir() / "queue"

    def add(self, job: Job) -> Job:
        """Put a job at the end; gives it with its number.

        Raises:
            BadInputError: Another job that is not over writes to the same folder.
        """
        with self._transaction() as jobs:
            for other in self._all(jobs):
                if other.state in ("waiting", "running") and job.out and _clash(job, other):
                    raise BadInputError(
                        f"job {other.id} already writes to {job.out}",
                        next_step="give another folder with -o",
                    )
            cursor = jobs.execute("INSERT INTO jobs (state, record) VALUES ('waiting', '{}')")
            number = int(cursor.lastrowid or 0)
            command = commands.with_out(job.command, number, Path(job.folder))
            made = replace(
                job,
                id=number,
                command=command,
                out=commands.out_of(command) if command[0] == "train" else "",
                log=str(self.folder / "logs" / f"{number}.txt"),
            )
            _write(jobs, made)
        return made

    def all(self) -> tuple[Job, ...]:
        """All jobs, the oldest first."""
        if not self._file.exists():
            return ()
        with self._transaction() as jobs:
            return tuple(self._all(jobs))

    def get(self, number: int) -> Job:
        """One job.

        Raises:
            BadInputError: There is none of that number.
        """
        for job in self.all():
            if job.id == number:
                return job
        raise _unknown(number)

    def change(self, number: int, how: Callable[[Job], Job | None]) -> Job | None:
        """Read a job, let `how` make the new one, and write it, in one transaction.

        Args:
            number: Which job.
            how: Gives the new record, or None to leave the old one.

        Returns:
            The new record; None where it was left or is gone.
        """
        with self._transaction() as jobs:
            row = jobs.execute("SELECT record FROM jobs WHERE id = ?", (number,)).fetchone()
            changed = how(_read(row[0])) if row else None
            if changed is not None:
                _write(jobs, changed)
            return changed

    def claim(self, number: int, device: str) -> Job | None:
        """Take a waiting job for a device, unless somebody else took either in the meantime."""
        with self._transaction() as jobs:
            found = list(self._all(jobs))
            if any(j.state == "running" and j.device == device for j in found):
                return None
            job = next((j for j in found if j.id == number and j.state == "waiting"), None)
            if job is None:
                return None
            taken = replace(
                job, state="running", device=device, starts=job.starts + 1, started_s=time.time()
            )
            _write(jobs, taken)
            return taken

    def remove(self, number: int) -> Job:
        """Take a job off the queue.

        Raises:
            BadInputError: There is none, or it runs.
        """
        self.get(number)  # makes no queue where there is none
        with self._transaction() as jobs:
            row = jobs.execute("SELECT record FROM jobs WHERE id = ?", (number,)).fetchone()
            if row is None:
                raise _unknown(number)
            job = _read(row[0])
            if job.state == "running":
                raise BadInputError(f"job {number} runs", next_step="stop `suanli queue run` first")
            jobs.execute("DELETE FROM jobs WHERE id = ?", (number,))
        return job

    @property
    def _file(self) -> Path:
        return self.folder / "queue.db"

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        connection = self._connected()
        try:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS jobs "
                "(id INTEGER PRIMARY KEY AUTOINCREMENT, state TEXT, record TEXT)"
            )
            yield connection
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:  # a full disk, rights, another's long transaction
            raise ArtefactError(
                f"the queue {self._file} cannot be used: {error}",
                next_step="see to the rights and the room of its folder, and try again",
            ) from None
        except sqlite3.DatabaseError as error:
            raise ArtefactError(
                f"the queue {self._file} cannot be used: {error}",
                next_step="move the file away to begin anew",
            ) from None
        finally:
            connection.close()  # what was not committed is undone

    def _connected(self) -> sqlite3.Connection:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return sqlite3.connect(self._file, timeout=_WAIT_S, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ArtefactError(
                f"the queue {self._file} cannot be used: {reason}",
                next_step="see to the rights of its folder, or name another by SUANLI_CONFIG",
            ) from None

    @staticmethod
    def _all(jobs: sqlite3.Connection) -> Iterator[Job]:
        for (record,) in jobs.execute("SELECT record FROM jobs ORDER BY id").fetchall():
            yield _read(record)


def over(state: JobState) -> bool:
    """Whether nothing more will happen to a job."""
    return state in ("done", "failed")


def _unknown(number: int) -> BadInputError:
    return BadInputError(f"there is no job {number}", next_step="suanli queue list")


def _write(jobs: sqlite3.Connection, job: Job) -> None:
    record = json.dumps(codec.to_json(job))
    jobs.execute("UPDATE jobs SET state = ?, record = ? WHERE id = ?", (job.state, record, job.id))


def _read(record: str) -> Job:
    return codec.from_json(Job, json.loads(record))


def _clash(one: Job, other: Job) -> bool:
    return bool(other.out) and _place(one) == _place(other)


def _place(job: Job) -> Path:
    return (Path(job.folder) / job.out).resolve()
