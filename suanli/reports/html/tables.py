"""Tables that sort, filter and fold, and lists of facts."""

from collections.abc import Sequence
from dataclasses import dataclass

from suanli.reports.html.markup import Element, el

_FOLDED_FROM = 24  # rows; above that the rest opens on demand
_FOLDED_TO = 15
_LONG = 44  # letters of a fact that take a whole line


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A quantity in a table: what is read, and what is sorted by."""

    shown: str
    value: float | None

    @classmethod
    def of(cls, value: float | None, shown: str) -> "Figure":
        """A figure, or an empty cell where there is none."""
        return cls(shown=shown if value is not None else "", value=value)


Cell = str | Element | Figure | None
Row = list[Cell]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A table's column.

    Attributes:
        name: Its heading.
        number: Whether it holds figures, which stand to the right and sort by value.
        wide: Whether it holds text that may take several lines.
        code: Whether it holds names from a program.
        about: What the heading means, where that is not plain.
    """

    name: str
    number: bool = False
    wide: bool = False
    code: bool = False
    about: str = ""


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    kinds: Sequence[str] = (),
) -> Element:
    """A table whose headings sort it.

    Args:
        caption: What it lists; read out, not shown.
        columns: Left to right.
        rows: A cell per column each.
        kinds: Class of each row; empty for none.

    A column in which nothing stands is left out.
    """
    used = [i for i in range(len(columns)) if i == 0 or any(not _empty(row[i]) for row in rows)]
    columns = [columns[i] for i in used]
    rows = [[row[i] for i in used] for row in rows]
    long = len(rows) > _FOLDED_FROM
    head = el("tr", *(_heading(column) for column in columns))
    body = [
        el(
            "tr",
            *(_cell(cell, column) for cell, column in zip(row, columns, strict=True)),
            class_=(kinds[index] if kinds else "") or None,
        )
        for index, row in enumerate(rows)
    ]
    grid = el(
        "table",
        el("caption", caption),
        el("thead", head),
        el("tbody", *body),
        class_="sortable long" if long else "sortable",
    )
    return el(
        "div",
        _controls(caption, len(rows)) if long else None,
        el("div", grid, class_="scroll", tabindex="0", role="region", aria_label=caption),
        _more(len(rows)) if long else None,
        class_="table",
    )


def facts(entries: Sequence[tuple[str, "str | Element | None"]]) -> Element:
    """Names with what is to be said of them; those of which nothing is known are left out."""
    known = [(name, value) for name, value in entries if value not in (None, "")]
    pairs = [
        el("div", el("dt", name), el("dd", value), class_="long" if _long(value) else None)
        for name, value in known
    ]
    return el("dl", *pairs, class_="facts")


def _long(value: "str | Element | None") -> bool:
    return isinstance(value, str) and len(value) > _LONG


def _empty(cell: Cell) -> bool:
    return cell in (None, "") or (isinstance(cell, Figure) and not cell.shown)


def _heading(column: Column) -> Element:
    button = el("button", column.name, type="button", title=column.about or None, class_="sort")
    return el(
        "th",
        button,
        scope="col",
        aria_sort="none",
        class_="number" if column.number else None,
    )


def _cell(cell: Cell, column: Column) -> Element:
    kind = "number" if column.number else "wide" if column.wide else None
    if isinstance(cell, Figure):
        by = None if cell.value is None else f"{cell.value:.9g}"
        return el("td", cell.shown, data_by=by, class_=kind)
    if isinstance(cell, str) and column.code and cell:
        return el("td", el("code", cell), class_=kind)
    return el("td", cell, class_=kind)


def _controls(caption: str, count: int) -> Element:
    box = el(
        "input",
        type="search",
        class_="filter",
        placeholder=f"Filter {count} rows",
        aria_label=f"Filter: {caption}",
        autocomplete="off",
        spellcheck="false",
    )
    return el("div", box, class_="controls needs-script")


def _more(count: int) -> Element:
    return el(
        "button",
        f"Show all {count} rows",
        type="button",
        class_="more needs-script",
        aria_expanded="false",
        data_fewer=f"Show the first {_FOLDED_TO} rows",
    )
