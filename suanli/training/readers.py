"""Worker processes that read the samples of a data set ahead of the step that needs them.

Each batch is shared out among the workers, which write their samples into memory that all of them
share. What a worker cannot survive (a decoder that crashes, the system out of memory) is seen at
once and told with the sample it was at; nothing that was started here outlives `close`.
"""

import math
import mmap
import multiprocessing
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch

from suanli.base.errors import BadInputError, SuanliError
from suanli.base.train_plan import TrainPlan
from suanli.devices import cpu_info
from suanli.workloads.record import Samples
from suanli.workloads.stream import Parts, Stream, check_like, own_generators

# As torch's own loader: a fork takes along data sets that cannot be sent, such as a notebook's.
_METHOD = "fork" if sys.platform == "linux" else "spawn"
_LOOK_S = 1.0  # how often a waiting worker looks whether its owner still lives
_END_S = 2.0  # for a worker to end by itself
_AT_ONCE = 256  # samples of a piece of a whole set
_RESIDENT_SHARE = 0.25  # of free memory that all samples may take

Share = Callable[[int], slice]


class ReadingError(SuanliError):
    """A worker process that reads samples has ended."""


@dataclass(frozen=True, kw_only=True)
class _Worker:
    """One process and the pipe to it."""

    process: Any
    link: Connection


class Readers:
    """Reads batches in the order in which they are asked for.

    Attributes:
        given_up: Asked while a sample is long in coming; True ends the waiting.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        size: int,
        seed: int = 0,
        workers: int = 0,
        ahead: int = 1,
        share: Share | None = None,
        method: str = _METHOD,
    ) -> None:
        """Start the workers.

        Args:
            stream: What is read.
            size: Most samples of a batch.
            seed: Of what the samples draw.
            workers: Processes; 0 reads in this one, when a batch is taken.
            ahead: Batches that may be asked for and not taken yet.
            share: Which samples of a batch of so many are read; the others stay undefined.
            method: How processes are started.

        Raises:
            BadInputError: The first sample cannot be read.
        """
        self._stream, self._seed, self._share = stream, seed, share
        self.given_up: Callable[[], bool] = _never
        self._ahead = max(1, ahead)
        self._asked: deque[tuple[int, torch.Tensor, int]] = deque()
        self._workers: list[_Worker] = []
        # also at the end of the interpreter, which else waits for them for ever
        self._end = Finalize(self, _ended, (self._workers,), exitpriority=10)
        self._next_slot = 0
        first = stream.head(1)
        assert first.labels is not None
        self._like: Parts = tuple(part[0] for part in (*first.inputs, first.labels))
        if workers:
            make = _mapped if method == "fork" else _shared
            self._slots = [
                tuple(make((size, *part.shape), part.dtype) for part in self._like)
                for _ in range(self._ahead)
            ]
            self._at = make((workers,), torch.int64)
            self._start(workers, method)

    @property
    def full(self) -> bool:
        """Whether a batch has to be taken before another one can be asked for."""
        return len(self._asked) >= self._ahead

    def ask(self, epoch: int, rows: torch.Tensor) -> None:
        """Have a batch read.

        Args:
            epoch: It decides what its samples draw.
            rows: Places of its samples in the stream, [B].
        """
        slot = self._next_slot
        self._next_slot = (slot + 1) % self._ahead
        self._asked.append((epoch, rows, slot))
        mine = self._mine(rows)
        for number, worker in enumerate(self._workers):
            part = np.asarray(mine[number :: len(self._workers)], dtype=np.int64).reshape(-1, 2)
            try:
                worker.link.send((slot, epoch, part))
            except OSError:
                continue  # it has ended, which is told where its samples are missed

    def take(self) -> Samples:
        """The batch that was asked for first.

        Raises:
            BadInputError: One of its samples cannot be read.
            ReadingError: A worker has ended.
        """
        epoch, rows, slot = self._asked.popleft()
        if not self._workers:
            parts = self._read_here(epoch, rows)
        else:
            for worker in self._workers:
                self._answer(worker)
            # the slot is written again as soon as another batch is asked for
            parts = tuple(part[: len(rows)].clone() for part in self._slots[slot])
        return Samples(inputs=parts[:-1], labels=parts[-1])

    def close(self) -> None:
        """End the workers; nothing can be asked for any more."""
        self._end()
        self._asked.clear()

    def _start(self, count: int, method: str) -> None:
        context: Any = multiprocessing.get_context(method)
        for number in range(count):
            here, there = context.Pipe()
            process = context.Process(
                target=_work,
                args=(self._stream, self._slots, self._at, there, number, self._seed, os.getpid()),
                name=f"suanli-reader-{number}",
                daemon=True,
            )
            with warnings.catch_warnings():
                # Python 3.12 warns of every fork of a process with threads; torch's idle ones are
                # harmless there, because a worker computes on one
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            there.close()
            self._workers.append(_Worker(process=process, link=here))

    def _mine(self, rows: torch.Tensor) -> list[tuple[int, int]]:
        """(place in the batch, place in the stream) of each sample that is read here."""
        places = range(len(rows))[self._share(len(rows)) if self._share else slice(None)]
        return [(place, int(rows[place])) for place in places]

    def _read_here(self, epoch: int, rows: torch.Tensor) -> Parts:
        found = tuple(torch.zeros((len(rows), *p.shape), dtype=p.dtype) for p in self._like)
        with own_generators():
            for place, row in self._mine(rows):
                _put(self._stream, row, epoch, self._seed, tuple(part[place] for part in found))
        return found

    def _answer(self, worker: _Worker) -> None:
        """Wait until a worker has done its part of a batch."""
        ready: Sequence[Any] = []
        while not ready:
            ready = wait([worker.link, worker.process.sentinel], _LOOK_S)
            if not ready and self.given_up():
                raise ReadingError(
                    f"sample {self._index(worker)} of the data set is still not read"
                )
        try:
            # what it said before it ended is there still
            wrong = worker.link.recv() if worker.link.poll() else ("", "")
            if not wrong:
                return
        except (EOFError, OSError):
            wrong = ("", "")
        message, next_step = wrong
        if message:
            raise BadInputError(message, next_step=next_step)
        raise self._lost(worker)

    def _index(self, worker: _Worker) -> int:
        """Of the sample that a worker was at last."""
        return self._stream.index(int(self._at[self._workers.index(worker)]))

    def _lost(self, worker: _Worker) -> ReadingError:
        worker.process.join(_END_S)
        code = worker.process.exitcode
        how = f"ended with code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        return ReadingError(
            f"a process that reads the data set {how}, at sample {self._index(worker)}",
            next_step='a crash of its decoder, or too little memory: a plan with fewer "workers"',
        )


def _ended(workers: list[_Worker]) -> None:
    """End processes, by force where they do not by themselves."""
    for worker in workers:
        try:
            worker.link.send(None)
        except OSError:
            continue
    for worker in workers:
        worker.process.join(_END_S / len(workers))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()
        worker.link.close()
    workers.clear()


def _never() -> bool:
    return False


def stays(samples: Samples, device: str) -> bool:
    """Whether all samples may be kept on a device: they fit, and are the same in each epoch."""
    if not isinstance(samples, Stream):
        return True
    need = samples.sample_bytes * len(samples)
    return need <= _RESIDENT_SHARE * _free_bytes(device) and samples.nature().fixed


def how_read(samples: Samples, plan: TrainPlan) -> list[str]:
    """What a person should know of how a plan reads the samples of a data set, in lines."""
    if not isinstance(samples, Stream):
        unused = "the samples are tensors, so the plan's workers have nothing to read"
        return [unused] if plan.workers else []
    samples.trim()
    nature, count, found = samples.nature(), len(samples), list[str]()
    if not nature.repeatable:
        found.append(
            "the data set gives another sample when it is asked for the same one with the same "
            "seed, so a resumed run will not be the same bit for bit: let __getitem__ draw "
            "from torch's, numpy.random's or random's own generator"
        )
    if plan.data == "resident":
        size = samples.sample_bytes * count / 1e6
        found.append(
            f"the data set gave {nature.probed} samples alike each time: all {count} stay in "
            f"memory ({size:.0f} MB)"
        )
    elif plan.workers:
        ahead = max(1, plan.prefetch)
        found.append(f"{plan.workers} processes read the data set, {ahead} batches ahead")
    return found


def in_memory(samples: Samples) -> Samples:
    """The samples themselves; a stream is read by all cores, once.

    Raises:
        BadInputError: They do not fit, or one cannot be read.
        ReadingError: A worker has ended.
    """
    if not isinstance(samples, Stream):
        return samples
    if samples.kept is None:
        samples.check_fits()
        pieces = list(chunks(samples, _AT_ONCE))
        inputs = tuple(
            torch.cat(column) for column in zip(*(p.inputs for p in pieces), strict=True)
        )
        labels = torch.cat([p.labels for p in pieces if p.labels is not None])
        samples.keep(Samples(inputs=inputs, labels=labels))
    return samples.whole()


def chunks(samples: Samples, size: int) -> Iterator[Samples]:
    """All samples in order, in pieces of at most `size`; those of a stream read by all cores.

    Raises:
        BadInputError: One cannot be read.
        ReadingError: A worker has ended.
    """
    found = samples.kept if isinstance(samples, Stream) and samples.kept else samples
    starts = range(0, len(found), size)
    if not isinstance(found, Stream):
        yield from (found.part(slice(start, start + size)) for start in starts)
        return
    workers = cpu_info().usable_cores if len(found) > size else 0
    readers = Readers(found, size=size, workers=workers, ahead=2)
    asked = iter(starts)
    try:
        for _ in starts:
            while not readers.full and (start := next(asked, None)) is not None:
                readers.ask(0, torch.arange(start, min(start + size, len(found))))
            yield readers.take()
    finally:
        readers.close()


def _free_bytes(device: str) -> int:
    import psutil

    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


# -- in a worker --------------------------------------------------------------------------------


def _work(
    stream: Stream,
    slots: list[Parts],
    at: torch.Tensor,
    link: Connection,
    number: int,
    seed: int,
    owner: int,
) -> None:
    """Read what is asked for until the owner says that it is over, or is gone."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # both reach the whole group; the owner decides
    torch.set_num_threads(1)
    while (task := _received(link, owner)) is not None:
        slot, epoch, part = task
        wrong: tuple[str, str] | None = None
        for place, row in part.tolist():
            at[number] = row
            try:
                _put(stream, row, epoch, seed, tuple(column[place] for column in slots[slot]))
            except BadInputError as error:
                wrong = (str(error.args[0]), error.next_step)
                break
        link.send(wrong)


def _received(link: Connection, owner: int) -> Any:
    """The next task; None at the end."""
    try:
        while not link.poll(_LOOK_S):
            if os.getppid() != owner:
                return None
        return link.recv()
    except (EOFError, OSError):
        return None


def _put(stream: Stream, row: int, epoch: int, seed: int, where: Parts) -> None:
    """Read a sample into its place."""
    parts = stream.read(row, epoch, seed)
    check_like(parts, where, stream.index(row))
    for part, place in zip(parts, where, strict=True):
        place.copy_(part)


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that forks share; it does not count against the size of /dev/shm."""
    count = math.prod(shape)
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, count * dtype.itemsize)
    found: torch.Tensor = torch.frombuffer(memory, dtype=dtype, count=count)
    return found.view(shape)


def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that processes of any kind share."""
    made = torch.zeros(shape, dtype=dtype)
    made.share_memory_()  # type: ignore[no-untyped-call]
    return made
