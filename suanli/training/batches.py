"""The data order: which samples make up the next batch, augmented and brought to the device.

The order depends on the seed alone, never on the plan. A `Place` names where it stands exactly, so
that a resumed run sees the batches that the first one would have seen. Samples are tensors, or are
read from a data set when their turn comes, by worker processes where the plan has them.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from suanli.base.errors import BadInputError
from suanli.base.train_plan import TrainPlan
from suanli.training.augment import augment
from suanli.training.readers import Readers, Share, in_memory
from suanli.training.recipe import Recipe, Tensors
from suanli.workloads.record import Samples
from suanli.workloads.stream import Stream


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the order stands, before a batch or between two.

    Attributes:
        epoch: Whole epochs before this place.
        position: Batches of the present epoch before this place.
        at_start: State of the generator at the epoch's start, uint8 [N].
        now: State of the generator here.
    """

    epoch: int
    position: int
    at_start: torch.Tensor
    now: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch on the device.

    Attributes:
        after: The place behind it.
    """

    inputs: Tensors
    labels: torch.Tensor
    after: Place

    def __len__(self) -> int:
        return int(self.labels.shape[0])


class Batches:
    """Gives one batch after the other, epoch after epoch, without an end.

    Attributes:
        given_up: Asked while a sample of a data set is long in coming; True ends the waiting.
    """

    def __init__(
        self,
        train: Samples,
        recipe: Recipe,
        plan: TrainPlan,
        seed: int,
        share: Share | None = None,
    ) -> None:
        """Prepare the first epoch.

        Args:
            train: What is learnt from; a stream that the plan keeps resident is read here.
            recipe: Its settings say the batch and the augmentation.
            plan: Where samples lie, and who reads them.
            seed: Of the order, and of what is drawn.
            share: Which samples of a batch of so many this process looks at: of a stream the others
                are not read, and their values are undefined.

        Raises:
            BadInputError: There are no samples, or no labels, or the plan does not fit them.
        """
        if len(train) == 0:
            raise BadInputError("there are no training samples")
        self._recipe, self._plan, self._size = recipe, plan, recipe.settings.batch
        self._count, self._seed, self._share = len(train), seed, share
        self._images = all(part.dim() == 4 for part in train.head(1).inputs)
        self._generator = torch.Generator().manual_seed(seed)
        self._stream: Stream | None = None
        self._inputs: Tensors = ()
        self._labels = torch.empty(0)
        if isinstance(train, Stream) and plan.data == "streamed":
            if recipe.arrange is not None:
                raise BadInputError(
                    f"{recipe.name} arranges whole epochs, which a data set that is read sample by "
                    "sample has not in memory"
                )
            self._stream = train
        else:
            self._keep(_all_of(train))
        start = self._generator.get_state()
        self._place = Place(epoch=0, position=0, at_start=start, now=start)
        self._epoch_inputs: Tensors = ()
        self._order: tuple[torch.Tensor, ...] = ()
        self._arranged, self._first_now = -1, start
        self._ahead: _Ahead | None = None
        self._readers: Readers | None = None
        self.given_up: Callable[[], bool] | None = None
        self._asked = 0  # batches of the arranged epoch that the readers were asked for

    @property
    def per_epoch(self) -> int:
        """Batches of one epoch; the last may be smaller."""
        return -(-self._count // self._size)

    @property
    def place(self) -> Place:
        """The place behind the batch that was given last."""
        return self._place

    def move_to(self, place: Place) -> None:
        """Go on at a place of this order."""
        self.close()
        self._place, self._arranged = place, -1

    def next(self) -> Batch:
        """The next batch."""
        if self._stream or not self._plan.prefetch or self._plan.data == "resident":
            batch = self._make(self._place)
        else:
            if self._ahead is None:
                self._ahead = _Ahead(self._make, self._place, self._plan.prefetch)
            batch = self._ahead.next()
        self._place = batch.after
        return batch

    def close(self) -> None:
        """End what prepares batches ahead; the order can still be gone on with."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
        if self._readers is not None:
            self._readers.close()
            self._readers = None

    def _make(self, place: Place) -> Batch:
        place = self._entered(place)
        if self._stream is not None:
            taken = self._read(self._stream, place)
            inputs, labels = list(taken.inputs), taken.labels
            assert labels is not None
        else:
            rows = self._order[place.position]
            labels = _taken(self._labels, rows)
            inputs = [_taken(part, rows) for part in self._epoch_inputs]
        now, kinds = place.now, self._recipe.settings.augmentation
        if self._images and kinds and self._recipe.arrange is None:
            self._generator.set_state(now)
            inputs = [augment(part, kinds, self._generator) for part in inputs]
            now = self._generator.get_state()
        after = replace(place, position=place.position + 1, now=now)
        if self._readers is not None:
            # the next epoch's order is known now: its first batches are read during this step
            self._ask_on(self._entered(after).epoch)
        placed = tuple(self._brought(part) for part in inputs)
        return Batch(inputs=placed, labels=self._brought(labels), after=after)

    def _read(self, stream: Stream, place: Place) -> Samples:
        """The samples of a batch, read by the plan's workers, who go on with the next ones."""
        if self._readers is None:
            self._readers = Readers(
                stream,
                size=self._size,
                seed=self._seed,
                workers=self._plan.workers,
                ahead=self._plan.prefetch,
                share=self._share,
            )
            if self.given_up is not None:
                self._readers.given_up = self.given_up
            self._asked = place.position
        self._ask_on(place.epoch)
        return self._readers.take()

    def _ask_on(self, epoch: int) -> None:
        assert self._readers is not None
        while self._asked < len(self._order) and not self._readers.full:
            self._readers.ask(epoch, self._order[self._asked])
            self._asked += 1

    def _entered(self, place: Place) -> Place:
        """The place itself, or the next epoch's start; that epoch's order is there afterwards."""
        if place.position >= self.per_epoch:
            place = Place(epoch=place.epoch + 1, position=0, at_start=place.now, now=place.now)
        if self._arranged != place.epoch:
            self._generator.set_state(place.at_start)
            order = torch.randperm(self._count, generator=self._generator)
            self._order, self._asked = torch.split(order, self._size), 0
            arrange = self._recipe.arrange
            if arrange is not None:
                self._epoch_inputs = arrange(self._inputs, place.epoch, self._generator)
            else:
                self._epoch_inputs = self._inputs
            self._arranged, self._first_now = place.epoch, self._generator.get_state()
        return replace(place, now=self._first_now) if place.position == 0 else place

    def _keep(self, train: Samples) -> None:
        if train.labels is None:
            raise BadInputError("training needs labels")
        resident = self._plan.device if self._plan.data == "resident" else "cpu"
        self._inputs = tuple(self._stored(part, resident) for part in train.inputs)
        self._labels = train.labels.to(resident)

    def _stored(self, part: torch.Tensor, where: str) -> torch.Tensor:
        channels_last = part.dim() == 4 and self._plan.memory_layout == "channels_last"
        if channels_last and self._plan.data == "resident":
            return part.to(where, memory_format=torch.channels_last)
        return part.to(where)

    def _brought(self, part: torch.Tensor) -> torch.Tensor:
        if self._plan.pinned and part.device.type == "cpu":
            part = part.pin_memory()
        layout = torch.preserve_format
        if part.dim() == 4:
            last = self._plan.memory_layout == "channels_last"
            layout = torch.channels_last if last else torch.contiguous_format
        moved = part.to(self._plan.device, non_blocking=self._plan.pinned)
        return moved if layout is torch.preserve_format else moved.contiguous(memory_format=layout)


def _all_of(train: Samples) -> Samples:
    """All samples in memory.

    Raises:
        BadInputError: They are read from a data set that gives other ones in each epoch.
    """
    if isinstance(train, Stream) and not train.nature().fixed:
        raise BadInputError(
            "the plan keeps all samples resident, but the data set gives other ones each time it "
            "is asked (an augmentation in __getitem__)",
            next_step='"data": "streamed" in the plan',
        )
    return in_memory(train)


def _taken(part: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some samples, copied in the order in which they lie in memory."""
    rows = rows.to(part.device)
    # images of one channel are contiguous in either way, and keep the strides that they have
    last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
    if last and not part.is_contiguous():
        return part.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return part.index_select(0, rows)


class _Ahead:
    """A thread that makes batches in order, at most so many ahead of the one asked for."""

    def __init__(self, make: Callable[[Place], Batch], place: Place, depth: int) -> None:
        self._make, self._place = make, place
        self._made: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="suanli-batches", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        assert isinstance(made, Batch)
        return made

    def close(self) -> None:
        self._ended.set()
        while self._thread.is_alive():
            try:
                self._made.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _run(self) -> None:
        place = self._place
        while not self._ended.is_set():
            try:
                made: Batch | BaseException = self._make(place)
            except BaseException as error:
                made = error
            while not self._ended.is_set():
                try:
                    self._made.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(made, BaseException):
                return
            place = made.after
