"""How text is laid out in a terminal: tables, and names beside words that fold."""

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.padding import Padding
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
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, width=min(width, _WIDEST))


def lines(named: Iterable[Line], width: int, style: str = "") -> Padding:
    """Names on the left, words on the right that fold under themselves."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.width = min(width, _WIDEST) - 2
    grid.add_column(width=_LABEL, no_wrap=True)
    grid.add_column(ratio=1, overflow="fold")
    for name, words in named:
        grid.add_row(Text(name), Text(words) if isinstance(words, str) else words, style=style)
    return Padding(grid, (0, 0, 0, 2), expand=False)
