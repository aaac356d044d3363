"""Samples of a torch data set, each read when it is asked for: they need not fit into memory.

What `__getitem__` draws comes from torch's, numpy's and Python's own generators, and all three are
seeded for each sample from (seed, epoch, index). So a sample does not depend on which process reads
it, nor on what was read before: any number of workers gives the same batches, and a resumed run
sees what the first one would have seen.
"""

import hashlib
import random
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from suanli.base.errors import BadInputError
from suanli.workloads.record import Samples

_PROBED = 32  # samples that are read several times, to see whether they stay the same
_LEAST_PROBED, _PROBE_S = 4, 2.0  # no more than four of them where that takes longer
_MOST_IN_MEMORY = 0.5  # of what is free, where somebody wants all samples at once

Parts = tuple[torch.Tensor, ...]
"""Of one sample: its inputs, then its label, without a batch dimension."""


@dataclass(frozen=True, kw_only=True)
class Nature:
    """How a data set answers when it is asked for the same sample again.

    Attributes:
        fixed: In each epoch the same.
        repeatable: With the same seed, epoch and index the same; without it nothing can be gone on
            with exactly.
        probed: Samples that were asked for several times.
        read_s: Seconds of reading one.
    """

    fixed: bool
    repeatable: bool
    probed: int
    read_s: float


class Stream(Samples):
    """Samples that are read on demand.

    `inputs` and `labels` are those of all samples: whoever looks at them reads all into memory,
    where they fit. `head` and `read` give what is needed and no more.

    Attributes:
        dataset: Map-style: `len(dataset)`, and `dataset[index]` gives (input, label), (input, …,
            label) or ((input, …), label) of tensors, arrays or numbers.
        workers: Processes that its owner reads it with; None where that is not known.
        classes: Labels have to be below; None where they are not looked at.
        ignored: A label that counts for nothing, or None.
    """

    dataset: Any
    workers: int | None
    classes: int | None
    ignored: int | None
    _rows: torch.Tensor
    _head: Samples | None
    _all: Samples | None
    _nature: Nature | None

    def __init__(
        self,
        dataset: "Dataset[Any]",
        rows: Sequence[int] | torch.Tensor | None = None,
        *,
        workers: int | None = None,
        classes: int | None = None,
        ignored: int | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            dataset: See the class.
            rows: Indices of the samples in it; None is all.
            workers: See the class.
            classes: The same.
            ignored: The same.
        """
        length = len(dataset)  # type: ignore[arg-type]
        found = torch.arange(length) if rows is None else torch.as_tensor(rows)
        kept: dict[str, Any] = {"dataset": dataset, "_rows": found.contiguous()}
        kept |= {"workers": workers, "classes": classes, "ignored": ignored}
        kept |= {"_head": None, "_all": None, "_nature": None}
        vars(self).update(kept)  # the base class is frozen

    def __len__(self) -> int:
        return int(self._rows.numel())

    def __repr__(self) -> str:
        return f"Stream({type(self.dataset).__name__}, {len(self)} samples)"

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def inputs(self) -> Parts:
        """Of all samples, in memory."""
        return self.whole().inputs

    @property
    def labels(self) -> torch.Tensor | None:
        """The same."""
        return self.whole().labels

    @property
    def sample_bytes(self) -> int:
        """Of one sample."""
        first = self.head(1)
        assert first.labels is not None
        return sum(part.nbytes for part in (*first.inputs, first.labels))

    def index(self, row: int) -> int:
        """A sample's index in the data set."""
        return int(self._rows[row])

    def part(self, rows: slice | torch.Tensor) -> "Stream":
        """The samples at these places, read on demand as well."""
        return self._like(rows=self._rows[rows])

    def held_to(self, classes: int | None, ignored: int | None) -> "Stream":
        """The same samples; labels are looked at when they are read."""
        made = self._like(classes=classes, ignored=ignored)
        vars(made).update(_nature=self._nature, _head=self._head, _all=self._all)
        return made

    def head(self, count: int) -> Samples:
        """The first so many, as epoch 0 of seed 0 has them; what was read is kept."""
        count = min(count, len(self))
        if self._all is not None:
            return self._all.part(slice(0, count))
        if self._head is None or len(self._head) < count:
            with own_generators():
                read = [self.read(row) for row in range(count)]
            for row, parts in enumerate(read):
                check_like(parts, read[0], self.index(row))
            columns = [torch.stack(column) for column in zip(*read, strict=True)]
            kept = Samples(inputs=tuple(columns[:-1]), labels=columns[-1])
            vars(self).update(_head=kept)
            return kept
        return self._head.part(slice(0, count))

    def whole(self) -> Samples:
        """All samples in memory, as epoch 0 of seed 0 has them; they stay there.

        Raises:
            BadInputError: They do not fit, or one cannot be read.
        """
        if self._all is not None:
            return self._all
        self.check_fits()
        found = self.head(len(self))
        self.keep(found)
        return found

    def trim(self) -> None:
        """Let go of what `head` has kept, but for the first sample."""
        first = self.head(1)
        assert first.labels is not None
        inputs = tuple(part.clone() for part in first.inputs)
        vars(self).update(_head=Samples(inputs=inputs, labels=first.labels.clone()))

    def keep(self, samples: Samples) -> None:
        """Take in all samples, which somebody has read."""
        vars(self).update(_all=samples, _head=None)

    @property
    def kept(self) -> Samples | None:
        """All samples, where they are in memory; else None."""
        return self._all

    def check_fits(self) -> None:
        """Refuse to read more than memory holds.

        Raises:
            BadInputError: All samples together would take more than half of what is free.
        """
        import psutil

        need, free = self.sample_bytes * len(self), psutil.virtual_memory().available
        if need > _MOST_IN_MEMORY * free:
            raise BadInputError(
                f"{len(self)} samples take {need / 1e9:.1f} GB in memory, "
                f"{free / 1e9:.1f} GB are free",
                next_step="give a part of them, such as a torch.utils.data.Subset",
            )

    def read(self, row: int, epoch: int = 0, seed: int = 0) -> Parts:
        """One sample. It seeds this process's own generators: see `own_generators`.

        Args:
            row: Its place here.
            epoch: With `seed` and the sample's index it decides what is drawn.
            seed: Of the run.

        Raises:
            BadInputError: It cannot be read, or is no sample; the message names its index.
        """
        index = self.index(row)
        _seed_all(_mixed(seed, epoch, index))
        try:
            sample = self.dataset[index]
        except BadInputError as error:
            raise BadInputError(f"sample {index} of the data set: {error}") from None
        except (Exception, SystemExit) as error:
            lines = str(error).strip().splitlines()
            text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            raise BadInputError(
                f"sample {index} of the data set cannot be read: {text[:200]}"
            ) from None
        parts = _parts(sample, index)
        self._check(parts, index)
        return parts

    def nature(self) -> Nature:
        """How the data set answers when it is asked again; some samples are read for it, once."""
        if self._nature is not None:
            return self._nature
        found = self._probed()
        vars(self).update(_nature=found)
        return found

    def _like(self, **changes: Any) -> "Stream":
        values: dict[str, Any] = {"rows": self._rows, "workers": self.workers}
        values |= {"classes": self.classes, "ignored": self.ignored}
        return Stream(self.dataset, **{**values, **changes})

    def _probed(self) -> Nature:
        count = min(_PROBED, len(self))
        rows = [row * (len(self) - 1) // max(count - 1, 1) for row in range(count)]
        fixed = repeatable = True
        started = time.perf_counter()
        probed = 0
        with own_generators():
            for row in rows:
                first = self.read(row)
                repeatable = repeatable and _same(first, self.read(row))
                fixed = fixed and _same(first, self.read(row, epoch=1))
                probed += 1
                if probed >= _LEAST_PROBED and time.perf_counter() - started > _PROBE_S:
                    break
        read_s = (time.perf_counter() - started) / (3 * max(probed, 1))
        return Nature(
            fixed=fixed and repeatable, repeatable=repeatable, probed=probed, read_s=read_s
        )

    def _check(self, parts: Parts, index: int) -> None:
        for part in parts:
            if part.is_floating_point() and not _finite(part):
                raise BadInputError(f"sample {index} of the data set holds NaN or infinity")
        label = parts[-1]
        if self.classes is None or label.is_floating_point():
            return
        wrong = label[(label < 0) | (label >= self.classes)]
        wrong = wrong if self.ignored is None else wrong[wrong != self.ignored]
        if wrong.numel():
            raise BadInputError(
                f"label {int(wrong[0])} of sample {index} of the data set is out of range, the "
                f"model has classes 0 to {self.classes - 1}"
            )


@contextmanager
def own_generators() -> Iterator[None]:
    """Leave torch's (CPU), numpy's and Python's generators as they were."""
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.random.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def check_like(parts: Parts, first: Parts, index: int) -> None:
    """Refuse a sample that is not like the first one.

    Args:
        parts: Of the sample.
        first: Of the first one.
        index: Of the sample in its data set, for the message.

    Raises:
        BadInputError: It has other shapes or types.
    """
    if len(parts) != len(first):
        raise BadInputError(
            f"sample {index} of the data set has {len(parts)} parts, another {len(first)}"
        )
    for one, other in zip(parts, first, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            raise BadInputError(
                f"sample {index} of the data set holds {_words(one)}, another {_words(other)}",
                next_step="all have to be of one shape and type",
            )


def _words(part: torch.Tensor) -> str:
    return f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}"


def _parts(sample: Any, index: int) -> Parts:
    if not isinstance(sample, tuple | list) or len(sample) < 2:
        kind = type(sample).__name__
        raise BadInputError(
            f"sample {index} of the data set is a {kind}", next_step="it has to be (input, label)"
        )
    *inputs, label = sample
    if len(inputs) == 1 and isinstance(inputs[0], tuple | list):
        inputs = list(inputs[0])
    return tuple(_tensor(value, index) for value in (*inputs, label))


def _tensor(value: Any, index: int) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray | np.generic | bool | int | float):
        try:
            # an array that was turned round has strides that torch does not take
            return torch.as_tensor(np.asarray(value, order="C"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise BadInputError(f"sample {index} of the data set is no tensor: {error}") from None
    raise BadInputError(
        f"sample {index} of the data set holds a {type(value).__name__}",
        next_step="__getitem__ has to give tensors, arrays or numbers",
    )


def _finite(part: torch.Tensor) -> bool:
    # a sum reads each value once and writes nothing; one that overflows is looked at again
    return bool(part.sum().isfinite()) or bool(part.isfinite().all())


def _same(one: Parts, other: Parts) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _mixed(seed: int, epoch: int, index: int) -> int:
    """A number below 2**63 that looks random, from three."""
    packed = struct.pack("<QQQ", seed, epoch, index)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def _seed_all(number: int) -> None:
    torch.default_generator.manual_seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    random.seed(number)
