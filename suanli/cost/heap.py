"""The C library's allocator, replayed: which memory of a step the system hands out anew.

On a CPU torch and oneDNN keep no memory of their own: every storage is asked of `posix_memalign`.
glibc cuts it out of a heap by best fit, or takes a mapping of its own from the system where no
room is left and the block is large; mappings are given back when they are freed, and the end of
the heap when more than a threshold is free there. What was given back comes again page by page,
and the system clears each page at its first use. The sizes are those of glibc's malloc/malloc.c
(2.36); where another allocator serves the process the replay does not hold. The few bytes that
are cut off for alignment count as joined to their neighbours at once; in glibc the first ones of
each size stay apart for a while, and what is between them cannot grow together.
"""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from suanli.base.memory import Footprint
from suanli.cost.memory import happenings

_PAGE = 4096
_UNIT = 16  # sizes are multiples of it
_HEADER = 8
_ALIGNED = 64 + 32  # asked for besides, to find a multiple of 64 inside: torch's alignment
_LEAST = 32  # what is left of a cut is a block of its own from here on
# mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD at the start of a process: the first rises to the
# largest mapping that was freed, up to its most, the second to twice that.
_MAPPED_FROM = 128 * 2**10
_MAPPED_FROM_MOST = 32 * 2**20
_TOP_PAD = 128 * 2**10  # taken beyond what is needed, and kept at a trim
_TRIM_AFTER = 64 * 2**10  # only the release of that much looks at the end of the heap
_ROUNDS = 6  # steps until they are alike; two or three were enough wherever it was tried
# Thresholds of the heap's end that come anew in a step at most: from counts of page faults in 19
# cases of built-in workloads, each in a process of its own. Any figure between 8 and 16 does.
_MOST_ENDS = 10


@dataclass(eq=False)
class _Piece:
    """A run of bytes of the heap; neighbours are joined when both are free."""

    start: int
    size: int
    free: bool = False
    before: "_Piece | None" = None
    after: "_Piece | None" = None


class Heap:
    """Gives and takes back blocks as glibc does for a process of one thread that allocates.

    Attributes:
        mapped: Bytes so far of mappings of their own.
        grown: Bytes so far of the heap's end that were used for the first time since it was taken
            from the system.
        threshold: Blocks of this size get a mapping of their own where there is no room.
    """

    def __init__(self) -> None:
        self.mapped = self.grown = 0
        self.threshold = self._trim = _MAPPED_FROM
        self._top = self._end = self._touched = 0
        self._last: _Piece | None = None  # the one below the top
        self._free: list[tuple[int, int, _Piece]] = []
        self._live: dict[int, _Piece | int] = {}

    def allocate(self, name: int, size: int) -> None:
        """Take a block and fill it; `name` is what `release` is given later."""
        wanted = -(-(size + _HEADER) // _UNIT) * _UNIT + _ALIGNED
        piece = self._best(wanted)
        room = self._end - self._top
        if piece is None and room < wanted + _LEAST and wanted >= self.threshold:
            taken = -(-(wanted + _HEADER) // _PAGE) * _PAGE
            self.mapped += taken
            self._live[name] = taken
            return
        self._live[name] = piece or self._from_top(wanted)

    def release(self, name: int) -> None:
        """Give a block back; nothing happens where there is none of that name."""
        piece = self._live.pop(name, None)
        if piece is None:
            return
        if isinstance(piece, int):
            if self.threshold < piece <= _MAPPED_FROM_MOST:
                self.threshold, self._trim = piece, 2 * piece
            return
        for other in (piece.before, piece.after):
            if other is not None and other.free:
                self._free.pop(bisect.bisect_left(self._free, (other.size, other.start)))
                piece = self._join(*sorted((piece, other), key=lambda p: p.start))
        size = piece.size
        if piece is self._last:
            self._top, self._last = piece.start, piece.before
            if self._last is not None:
                self._last.after = None
            size = self._end - self._top
        else:
            self._put(piece)
        if size >= _TRIM_AFTER and self._end - self._top >= self._trim:
            spare = self._end - self._top - _LEAST - 1 - _TOP_PAD
            self._end -= max(0, spare) // _PAGE * _PAGE
            self._touched = min(self._touched, self._end)

    def _best(self, wanted: int) -> _Piece | None:
        """The smallest free piece that holds it, cut to size."""
        at = bisect.bisect_left(self._free, (wanted, 0))
        if at == len(self._free):
            return None
        piece = self._free.pop(at)[2]
        piece.free = False
        left = piece.size - wanted
        if left >= _LEAST:
            rest = _Piece(start=piece.start + wanted, size=left, before=piece, after=piece.after)
            if rest.after is not None:
                rest.after.before = rest
            else:
                self._last = rest
            piece.after, piece.size = rest, wanted
            self._put(rest)
        return piece

    def _from_top(self, wanted: int) -> _Piece:
        room = self._end - self._top
        if room < wanted + _LEAST:
            self._end += -(-(wanted + _TOP_PAD + _LEAST - room) // _PAGE) * _PAGE
        piece = _Piece(start=self._top, size=wanted, before=self._last)
        if self._last is not None:
            self._last.after = piece
        self._last = piece
        self._top += wanted
        self.grown += max(0, self._top - self._touched)
        self._touched = max(self._touched, self._top)
        return piece

    def _put(self, piece: _Piece) -> None:
        piece.free = True
        bisect.insort(self._free, (piece.size, piece.start, piece))

    def _join(self, first: _Piece, second: _Piece) -> _Piece:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        if self._last is second:
            self._last = first
        return first


def handed_out_anew(footprint: Footprint) -> float:
    """Bytes that the system hands out anew in each step, after some steps alike.

    Mappings come anew in every step. Of the heap's end no more than some thresholds do, however
    often the replay gives it back: in a process that has run for some steps, small blocks of
    Python and of the libraries' caches lie between, below which nothing is given back.

    Args:
        footprint: Of the step on a CPU. Gradients stay until the next step begins; what else is
            there at its end goes before.
    """
    heap = Heap()
    events = list(_events(footprint))
    for name, block in enumerate(footprint.blocks):
        if not block.born:
            heap.allocate(name, block.size_bytes)
    for _ in range(_ROUNDS):
        mapped, grown = heap.mapped, heap.grown
        for name, size in events:
            if size < 0:
                heap.release(name)
            else:
                heap.allocate(name, size)
    return heap.mapped - mapped + min(heap.grown - grown, _MOST_ENDS * heap.threshold)


def _events(footprint: Footprint) -> Iterator[tuple[int, int]]:
    """(name, size) for a block that comes in a step, (name, -1) for one that goes, in order."""
    made = [(name, block) for name, block in enumerate(footprint.blocks) if block.born]
    stay = [(name, block.kind) for name, block in made if block.dies is None]
    yield from ((name, -1) for name, kind in stay if kind == "gradients")
    for name, sign in happenings(footprint):
        block = footprint.blocks[name]
        if block.born:
            yield name, block.size_bytes if sign > 0 else -1
    yield from ((name, -1) for name, kind in stay if kind != "gradients")
