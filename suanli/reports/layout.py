"""How text is laid out in a terminal: tables, and names beside words that fold."""

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_WIDEST = 110  # columns; longer lines are hard to read
_LABEL = 10  # columns of the names on the left

Line = tuple[str, str | Text]


def console() -> Console:
    """Where reports go."""
    return Console(highlight=False, markup=False)


def table(width: int) -> Table:
    """An empty table of at most this many columns of text."""
    return _Ragged(box=box.SIMPLE_HEAD, pad_edge=False, width=min(width, _WIDEST))


def lines(named: Iterable[Line], width: int, style: str = "") -> Padding:
    """Names on the left, words on the right that fold under themselves."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.width = min(width, _WIDEST) - 2
    grid.add_column(width=_LABEL, no_wrap=True)
    grid.add_column(ratio=1, overflow="fold")
    for name, words in named:
        grid.add_row(Text(name), Text(words) if isinstance(words, str) else words, style=style)
    return _RaggedPadding(grid, (0, 0, 0, 2), expand=False)


class _Ragged(Table):
    """A table whose lines end with their last word."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _ragged(super().__rich_console__(console, options))


class _RaggedPadding(Padding):
    """The same of lines."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _ragged(super().__rich_console__(console, options))


def _ragged(segments: RenderResult) -> Iterator[Segment]:
    """Without the blanks that fill lines up to the right edge: they get into logs and copies."""
    for line in Segment.split_lines(part for part in segments if isinstance(part, Segment)):
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            text, style, control = line.pop()
            line.append(Segment(text.rstrip(), style, control))
        yield from line
        yield Segment.line()
