"""What a page shows of `suanli doctor`, and of ceilings wherever they occur."""

from collections.abc import Sequence

from suanli.base import units
from suanli.base.hardware import Ceiling
from suanli.base.results import DoctorResult
from suanli.reports.html.markup import Element, el
from suanli.reports.html.pictures.roofline import peaks, roofline
from suanli.reports.html.section import Section, Tile, card, folded_card, setting
from suanli.reports.html.tables import Column, Figure, Row, facts, table

_NAMES = {
    "matmul": "matrix products",
    "read": "reading",
    "copy": "copying",
    "call_overhead": "one call",
    "host_to_device": "host to device",
    "device_to_host": "device to host",
    "link": "link to another device",
}
MEMORY = {
    "weights_bytes": ("weights", "c0"),
    "gradients_bytes": ("gradients", "c3"),
    "optimizer_bytes": ("optimiser", "c1"),
    "activations_bytes": ("activations", "c2"),
    "workspace_bytes": ("workspace", "c5"),
}
"""Fields of a step's memory: what they are called, and their colour."""


def section(result: DoctorResult) -> Section:
    """Hardware, ceilings, backends and problems."""
    problems = [f"{p.what}. Mend it with: {p.mend}" for p in result.problems]
    return Section(
        verb="doctor",
        title=result.cpu.model if not result.gpus else result.gpus[0].name,
        about=f"{result.device.name}, {result.environment.os}",
        verdict=_verdict(result),
        tiles=_tiles(result),
        notes=problems,
        parts=[
            roofline(
                [],
                result.ceilings,
                "No computation on this machine can lie above the line of its element type; the "
                "slopes are the bandwidths of main memory and, fainter, of the caches.",
                ceiling_table(result.ceilings),
            ),
            _hardware(result),
            _backends(result),
            setting(result.environment, result.device),
        ],
    )


def ceilings(items: Sequence[Ceiling]) -> Element | None:
    """The table of ceilings, folded; None where there are none."""
    if not items:
        return None
    return folded_card("What this machine can do at most", ceiling_table(items))


def ceiling_table(items: Sequence[Ceiling]) -> Element:
    """What was measured, with its spread and where it comes from."""
    columns = [
        Column(name="what"),
        Column(name="hardware", number=True, about="what the units do at most"),
        Column(name="achieved", number=True, about="the best of a library"),
        Column(name="spread", number=True, about="quartile distance over the median"),
        Column(name="mark"),
        Column(name="how", wide=True),
    ]
    rows: list[Row] = [
        [
            ceiling_name(item),
            Figure.of(item.hardware, _rate(item.hardware, item)),
            Figure.of(item.achieved, _rate(item.achieved, item)),
            Figure.of(item.spread, f"{100 * item.spread:.0f} %"),
            item.mark,
            item.how,
        ]
        for item in items
    ]
    return table("Ceilings", columns, rows)


def ceiling_name(item: Ceiling) -> str:
    """Such as "matrix products, bf16" or "reading, 2 MiB"."""
    parts = [_NAMES[item.what], item.dtype or ""]
    if item.working_set_bytes:
        parts.append(units.size(item.working_set_bytes))
    return ", ".join(part for part in parts if part)


def _rate(value: float | None, item: Ceiling) -> str:
    if value is None:
        return ""
    return units.milliseconds(value * 1e3) if item.unit == "s" else units.si(value, item.unit)


def _verdict(result: DoctorResult) -> str:
    tops = peaks(result.ceilings)
    if not tops:
        return "The ceilings of this machine were not measured."
    words = f"At most {units.si(tops[0].value, 'FLOP/s')} in {tops[0].name}"
    fp32 = next((top for top in tops if top.name == "fp32"), None)
    if fp32 is not None and fp32 is not tops[0]:
        words += f", {tops[0].value / fp32.value:.1f} times as much as in fp32"
    return f"{words}."


def _tiles(result: DoctorResult) -> list[Tile]:
    found = [
        Tile(name=f"peak in {top.name}", figure=units.si(top.value, "FLOP/s"))
        for top in peaks(result.ceilings)[:4]
    ]
    memory = [c for c in result.ceilings if c.what == "read" and c.working_set_bytes and c.best]
    if memory:
        largest = max(memory, key=lambda c: c.working_set_bytes or 0)
        found.append(Tile(name="main memory", figure=units.si(largest.best or 0.0, "B/s")))
    return found


def _hardware(result: DoctorResult) -> Element:
    cpu = result.cpu
    caches = ", ".join(f"{name} {units.size(n)}" for name, n in cpu.cache_bytes.items())
    gpus = [
        (f"GPU {gpu.index}", f"{gpu.name}, {units.size(gpu.memory_bytes)}") for gpu in result.gpus
    ]
    return card(
        "Hardware",
        "",
        facts(
            [
                ("processor", cpu.model),
                ("cores", f"{cpu.usable_cores} usable of {cpu.logical_cores}"),
                ("memory", units.size(cpu.memory_bytes)),
                ("caches", caches),
                ("units", ", ".join(cpu.features)),
                *gpus,
                ("compiler", result.compiler or "none"),
                ("measured", result.measured_at.replace("T", " ").replace("+00:00", " UTC")),
            ]
        ),
    )


def _backends(result: DoctorResult) -> Element | None:
    if not result.backends:
        return None
    columns = [
        Column(name="backend"),
        Column(name="state"),
        Column(name="version"),
        Column(name="install with", wide=True, code=True),
    ]
    rows: list[Row] = [
        [
            b.name,
            el("span", "ready" if b.present else "absent",
               class_=f"status {'verified' if b.present else 'skipped'}"),
            b.version or "",
            "" if b.present else b.install,
        ]
        for b in result.backends
    ]  # fmt: skip
    return card("Backends", "", table("Backends", columns, rows))
