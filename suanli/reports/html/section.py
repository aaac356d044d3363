"""One result as a part of a page: what is said first, the figures that matter, then the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

from suanli.base import units
from suanli.base.hardware import DeviceInfo, Environment
from suanli.base.timing import Estimate
from suanli.base.work import SpeedOfLight
from suanli.reports.html.markup import Element, el
from suanli.reports.html.tables import facts

_BUSY = 2.0  # load per core
_SHOWN_LIBRARIES = ("torch", "openvino", "onnxruntime", "tensorrt", "triton", "transformers")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A figure that matters, with its name and one small line below it."""

    name: str
    figure: str
    small: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """What a page shows of one result.

    Attributes:
        verb: Such as "optimize".
        title: What it is about, mostly the workload.
        about: Device, batch and the like in one line.
        verdict: The answer in a sentence.
        tiles: The figures that matter, at most six.
        notes: What a person should know before they believe the rest.
        parts: Pictures and tables, top to bottom.
    """

    verb: str
    title: str
    about: str
    verdict: str
    tiles: Sequence[Tile]
    parts: Sequence[Element | None]
    notes: Sequence[str] = ()

    def body(self, ident: str, level: str = "h2") -> Element:
        """The part of the page, to be found by `ident`."""
        return el(
            "section",
            el("p", f"suanli {self.verb}", class_="kicker"),
            el(level, self.title, id=f"{ident}-title"),
            el("p", self.about, class_="about"),
            el("p", self.verdict, class_="verdict") if self.verdict else None,
            _tiles(self.tiles),
            _notes(self.notes),
            *self.parts,
            class_="result",
            id=ident,
            aria_labelledby=f"{ident}-title",
        )


def card(title: str, about: str, *children: Element | None) -> Element:
    """A table or a list with its title."""
    return el("div", el("h3", title), el("p", about) if about else None, *children, class_="card")


def folded_card(title: str, *children: Element | None) -> Element:
    """The same, closed until it is asked for."""
    return el("details", el("summary", title), *children, class_="card fold")


def setting(environment: Environment, device: DeviceInfo) -> Element:
    """What the figures depend on: the machine and its software."""
    libraries = environment.libraries
    first = [name for name in _SHOWN_LIBRARIES if name in libraries]
    rest = sorted(set(libraries) - set(first))
    load = environment.load_average
    return folded_card(
        "Machine and software",
        facts(
            [
                ("device", f"{device.name}, {device.title}"),
                ("memory", units.size(device.memory_bytes)),
                ("processor", environment.machine),
                ("cores", str(environment.cores)),
                ("system", environment.os),
                ("Python", environment.python),
                ("suanli", environment.suanli),
                ("driver", environment.driver or ""),
                ("load when measured", "" if load is None else f"{load:.2f}"),
                *((name, libraries[name]) for name in [*first, *rest]),
            ]
        ),
    )


def busy(environment: Environment, notes: Sequence[str]) -> list[str]:
    """A note where much else ran on the machine, so that times are longer than they need be.

    The load average counts the work itself too, so that a load of up to twice the cores is usual.
    Where one of the result's own notes says that the machine was busy, that is enough.
    """
    load = environment.load_average
    said = any("machine was busy" in note for note in notes)
    if said or load is None or load <= _BUSY * environment.cores:
        return []
    return [
        f"The machine was busy (load {load:.1f} on {environment.cores} cores): times are longer "
        "than on a quiet one."
    ]


def ratio(estimate: Estimate) -> str:
    """`6.52x`."""
    return f"{estimate.p50:.3g}×" if estimate.p50 < 100 else f"{estimate.p50:.0f}×"


def interval(estimate: Estimate) -> str:
    """`6.41 to 6.60`: what lies around a ratio with 95 % confidence."""
    return f"{estimate.lo95:.3g} to {estimate.hi95:.3g}"


def limit_tile(sol: SpeedOfLight | None) -> Tile | None:
    """How far from the limit; None where that is not known."""
    if sol is None or sol.fraction is None:
        return None
    poor = [mark for mark in sol.marks if mark != "measured"]
    source = f" ({' and '.join(poor)})" if poor else ""
    small = f"the limit is {units.milliseconds(sol.ms)}{source}, bound by {sol.bound_by}"
    return Tile(name="of the speed of light", figure=units.share(sol.fraction), small=small)


def _tiles(tiles: Sequence[Tile]) -> Element | None:
    if not tiles:
        return None
    drawn = [
        el(
            "div",
            el("dt", tile.name),
            el("dd", tile.figure, class_="figure"),
            el("dd", tile.small, class_="small") if tile.small else None,
            class_="tile",
        )
        for tile in tiles
    ]
    return el("dl", *drawn, class_="tiles")


def _notes(notes: Sequence[str]) -> Element | None:
    if not notes:
        return None
    return el("ul", *(el("li", note) for note in notes), class_="notes", aria_label="Notes")
