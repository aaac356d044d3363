"""PyTorch's caching allocator of GPU memory, replayed: how much it holds beyond what is in use.

It takes segments from the driver, cuts blocks out of them by best fit and never gives a segment
back by itself. The sizes are those of torch's c10/cuda/CUDACachingAllocator (2.11).
"""

import bisect
from collections.abc import Iterable
from dataclasses import dataclass

_STEP = 512
_SMALL = 2**20  # requests up to this come from segments of 2 MiB
_SMALL_SEGMENT = 2 * 2**20
_MIDDLE = 10 * 2**20  # and up to this from segments of 20 MiB
_LARGE_SEGMENT = 20 * 2**20
_ROUND = 2 * 2**20


@dataclass(eq=False)
class _Piece:
    """A run of bytes inside a segment; neighbours are joined when both are free."""

    size: int
    small: bool
    free: bool = False
    before: "_Piece | None" = None
    after: "_Piece | None" = None


class CachingAllocator:
    """Gives and takes back blocks as torch does.

    Attributes:
        reserved: Bytes taken from the driver.
        in_use: Bytes of the live blocks as asked for.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self.in_use = 0
        self._free: dict[bool, list[tuple[int, int, _Piece]]] = {True: [], False: []}
        self._live: dict[int, tuple[_Piece, int]] = {}

    def allocate(self, name: int, size: int) -> None:
        """Take a block; `name` is what `release` is given later."""
        wanted = max(_STEP, -(-size // _STEP) * _STEP)
        small = wanted <= _SMALL
        piece = self._best(wanted, small) or self._segment(wanted, small)
        left = piece.size - wanted
        if left >= _STEP if small else left > _SMALL:
            rest = _Piece(size=left, small=small, before=piece, after=piece.after)
            if piece.after is not None:
                piece.after.before = rest
            piece.after, piece.size = rest, wanted
            self._put(rest)
        piece.free = False
        self._live[name] = (piece, size)
        self.in_use += size

    def release(self, name: int) -> None:
        """Give a block back."""
        piece, size = self._live.pop(name)
        self.in_use -= size
        for other in (piece.before, piece.after):
            if other is not None and other.free:
                self._drop(other)
                piece = _join(piece, other) if other is piece.after else _join(other, piece)
        self._put(piece)

    def _best(self, wanted: int, small: bool) -> _Piece | None:
        pool = self._free[small]
        at = bisect.bisect_left(pool, (wanted, 0))
        if at == len(pool):
            return None
        return pool.pop(at)[2]

    def _segment(self, wanted: int, small: bool) -> _Piece:
        if small:
            size = _SMALL_SEGMENT
        elif wanted < _MIDDLE:
            size = _LARGE_SEGMENT
        else:
            size = -(-wanted // _ROUND) * _ROUND
        self.reserved += size
        return _Piece(size=size, small=small)

    def _put(self, piece: _Piece) -> None:
        piece.free = True
        bisect.insort(self._free[piece.small], (piece.size, id(piece), piece))

    def _drop(self, piece: _Piece) -> None:
        pool = self._free[piece.small]
        pool.pop(bisect.bisect_left(pool, (piece.size, id(piece))))


def _join(first: _Piece, second: _Piece) -> _Piece:
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first


def held_beyond_use(events: Iterable[tuple[int, int]]) -> int:
    """Bytes that the allocator holds at its fullest beyond the most that is in use.

    Args:
        events: (name, size) for a block that comes, (name, -1) for one that goes, in order.
    """
    pool = CachingAllocator()
    most = 0
    for name, size in events:
        if size < 0:
            pool.release(name)
        else:
            pool.allocate(name, size)
            most = max(most, pool.in_use)
    return pool.reserved - most
