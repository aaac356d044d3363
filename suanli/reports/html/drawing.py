"""What pictures share: the drawing area with its axes, marks that can be read out, and the frame.

A picture is drawn twice, for a wide page and for a phone, and the style sheet shows the one that
fits: letters keep their size, which they would not if one drawing were shrunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suanli.reports.html.markup import Element, el, text
from suanli.reports.html.scales import Scale

WIDE, NARROW = 920.0, 350.0  # of the drawing, in CSS pixels
LETTER = 6.6  # mean width of a letter at the 12 pixels of a picture's text

Draw = Callable[[float], Element]


@dataclass(frozen=True, kw_only=True)
class Legend:
    """One entry below a picture's title: the mark's class, and what it stands for."""

    mark: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A drawing area within a picture.

    Attributes:
        width: Of the picture, in pixels.
        height: The same.
        x: Scale of the horizontal axis.
        y: Scale of the vertical axis.
        left: Room for the figures at the vertical axis.
    """

    width: float
    height: float
    x: Scale
    y: Scale
    left: float = 58.0
    right: float = 14.0
    top: float = 22.0
    bottom: float = 40.0

    @property
    def narrow(self) -> bool:
        """Whether it is drawn for a phone."""
        return self.width < 500

    def px(self, value: float) -> float:
        """Horizontal pixel of a value."""
        return self.left + self.x(value) * (self.width - self.left - self.right)

    def py(self, value: float) -> float:
        """Vertical pixel of a value; high values are at the top."""
        return self.height - self.bottom - self.y(value) * (self.height - self.bottom - self.top)

    def axes(
        self,
        x_title: str,
        y_title: str,
        x_text: Callable[[float], str],
        y_text: Callable[[float], str],
    ) -> list[Element]:
        """Grid, figures and names of both axes."""
        right, base = self.width - self.right, self.height - self.bottom
        drawn: list[Element] = []
        for value in self.y.ticks(6):
            y = self.py(value)
            drawn += [
                el("line", class_="grid", x1=self.left, x2=right, y1=y, y2=y),
                words(self.left - 8, y + 4, y_text(value), anchor="end"),
            ]
        for value in self.x.ticks(4 if self.narrow else 9):
            x = self.px(value)
            drawn += [
                el("line", class_="grid", x1=x, x2=x, y1=self.top, y2=base),
                words(x, base + 17, x_text(value), anchor="middle"),
            ]
        drawn += [
            el("line", class_="axis", x1=self.left, x2=right, y1=base, y2=base),
            words(right, base + 34, x_title, anchor="end", kind="name"),
            words(4, 12, y_title, kind="name"),
        ]
        return drawn


def words(x: float, y: float, shown: str, *, anchor: str = "start", kind: str = "") -> Element:
    """Text in a picture; `kind` is its class beside "t"."""
    return el("text", shown, class_=f"t {kind}".strip(), x=x, y=y, text_anchor=anchor)


def cut(shown: str, room: float) -> str:
    """A text that takes no more than so many pixels, with an ellipsis where it was longer."""
    most = max(2, int(room / LETTER))
    seen = text(shown)
    return seen if len(seen) <= most else f"{seen[: most - 1]}…"


def cut_left(shown: str, room: float) -> str:
    """The same for names whose end says most, such as the path of a module."""
    most = max(2, int(room / LETTER))
    seen = text(shown)
    return seen if len(seen) <= most else f"…{seen[1 - most :]}"


def mark(tip: Sequence[str], *shapes: Element, kind: str = "") -> Element:
    """Something that is pointed at, or reached with the arrow keys, and says what it is.

    Args:
        tip: Its lines; the first is its name.
        *shapes: What is drawn.
        kind: Its class beside "mark".
    """
    return el(
        "g",
        *shapes,
        class_=f"mark {kind}".strip(),
        role="img",
        tabindex="-1",
        aria_label="\n".join(line for line in tip if line),
    )


def dot(x: float, y: float, radius: float, shape: str = "circle") -> Element:
    """A circle, square, diamond, triangle or cross around a place, of about the same area."""
    r = radius
    if shape == "square":
        return el("rect", x=x - r * 0.89, y=y - r * 0.89, width=r * 1.78, height=r * 1.78)
    if shape == "diamond":
        return el("path", d=f"M{x:.2f} {y - r * 1.2:.2f}l{r * 1.2:.2f} {r * 1.2:.2f}"
                  f"l{-r * 1.2:.2f} {r * 1.2:.2f}l{-r * 1.2:.2f} {-r * 1.2:.2f}z")  # fmt: skip
    if shape == "triangle":
        return el("path", d=f"M{x:.2f} {y - r * 1.2:.2f}l{r * 1.2:.2f} {r * 2.1:.2f}"
                  f"h{-r * 2.4:.2f}z")  # fmt: skip
    if shape == "cross":
        d = r * 0.85
        return el("path", class_="stroke", d=f"M{x - d:.2f} {y - d:.2f}l{2 * d:.2f} {2 * d:.2f}"
                  f"m0 {-2 * d:.2f}l{-2 * d:.2f} {2 * d:.2f}")  # fmt: skip
    return el("circle", cx=x, cy=y, r=r)


def whisker(x1: float, x2: float, y: float) -> Element:
    """An interval along the horizontal axis."""
    return el("path", class_="whisker", d=f"M{x1:.2f} {y - 4:.2f}v8m0 -4H{x2:.2f}m0 -4v8")


def line(points: Sequence[tuple[float, float]], kind: str) -> Element:
    """A curve through points."""
    return el("polyline", class_=kind, points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points))


def svg(width: float, height: float, label: str, *children: Element) -> Element:
    """A picture. It is one stop of the Tab key; arrows go from mark to mark."""
    return el(
        "svg",
        *children,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        role="group",
        aria_roledescription="picture",
        aria_label=f"{label} Arrow keys go from mark to mark.",
        tabindex="0",
        class_="drawing",
    )


def figure(
    title: str,
    about: str,
    draw: Draw,
    table: Element | None,
    legend: Sequence[Legend] = (),
) -> Element:
    """A picture in both widths, with its title, what it shows, its legend and its table."""
    return el(
        "figure",
        caption(title, about),
        legend_of(legend),
        el("div", draw(WIDE), class_="wide"),
        el("div", draw(NARROW), class_="narrow"),
        folded(table),
    )


def caption(title: str, about: str) -> Element:
    """Title of a picture, and one or two sentences on how to read it."""
    return el("figcaption", el("h3", title), el("p", about) if about else None)


def folded(table: Element | None) -> Element | None:
    """A picture's table, which opens on demand."""
    if table is None:
        return None
    return el("details", el("summary", "The same as a table"), table, class_="data")


def legend_of(entries: Sequence[Legend]) -> Element | None:
    """What the marks of a picture stand for."""
    if not entries:
        return None
    items = [
        el("li", el("span", class_=f"key {e.mark}", aria_hidden="true"), e.name) for e in entries
    ]
    return el("ul", *items, class_="legend")
