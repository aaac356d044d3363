"""What a page shows of `suanli kernel explain`, `check` and `tune`."""

from collections.abc import Sequence

from suanli.base import units
from suanli.base.kernel_results import (
    CopyOverlap,
    KernelCheckResult,
    KernelExplainResult,
    KernelFinding,
    KernelTuneResult,
)
from suanli.reports.html.markup import Element, el
from suanli.reports.html.pictures.bars import Bar, bars
from suanli.reports.html.pictures.timeline import Lane, Slice, timeline
from suanli.reports.html.section import Section, Tile, card, interval, ratio, setting
from suanli.reports.html.tables import Column, Figure, Row, table

_COPIES = {
    "host_to_device": ("copy to the device", "c1"),
    "kernel": ("kernel", "c0"),
    "device_to_host": ("copy back", "c2"),
}
_STATUS = {"verified": "verified", "compiled": "verified", "rejected": "rejected",
           "failed": "failed", "refused": "skipped", "skipped": "skipped",
           "pruned": "skipped", "ranked": "skipped"}  # fmt: skip


def explain(result: KernelExplainResult) -> Section:
    """Compilers' figures, the limiter, what costs time, simulated streams."""
    limiter = result.limiter
    return Section(
        verb="kernel explain",
        title=result.kernel,
        about=f"{result.language}, {result.dtype}, {_config(result.sizes)}; nothing was timed",
        verdict=f"Limited by {limiter.name} on {limiter.gpu}: {limiter.text}" if limiter else "",
        tiles=[],
        notes=result.notes,
        parts=[
            _units(limiter.unit_ms) if limiter and limiter.unit_ms else None,
            _archs(result),
            _findings(result.findings),
            *(_overlap(overlap) for overlap in result.overlap),
            setting(result.environment, result.device),
        ],
    )


def check(result: KernelCheckResult) -> Section:
    """Every case with its outcome."""
    columns = [
        Column(name="outcome"),
        Column(name="sizes"),
        Column(name="type"),
        Column(name="configuration"),
        Column(name="where"),
        Column(name="error / bound", number=True),
        Column(name="reason", wide=True),
    ]
    rows: list[Row] = [
        [
            _status(case.status),
            _config(case.sizes),
            case.dtype,
            _config(case.config),
            case.where,
            Figure.of(case.error_share, f"{case.error_share or 0:.3g}"),
            case.reason,
        ]
        for case in result.cases
    ]
    found = [finding for case in result.cases for finding in case.findings]
    return Section(
        verb="kernel check",
        title=result.kernel,
        about=result.language,
        verdict="Every case that could be judged is right." if result.ok else "It is not right.",
        tiles=[],
        notes=result.notes,
        parts=[
            card("Cases", "", table("Cases", columns, rows)),
            _findings(found),
            setting(result.environment, result.device),
        ],
    )


def tune(result: KernelTuneResult) -> Section:
    """The winner, its rivals and every configuration."""
    columns = [
        Column(name="configuration", wide=True),
        Column(name="outcome"),
        Column(name="step", number=True),
        Column(name="static model", number=True),
        Column(name="occupancy", number=True),
        Column(name="reason", wide=True),
    ]
    rows: list[Row] = [
        [
            _config(t.config),
            _status(t.status),
            Figure.of(
                t.step_ms.p50 if t.step_ms else None, _ms(t.step_ms.p50 if t.step_ms else None)
            ),
            Figure.of(t.predicted_ms, _ms(t.predicted_ms)),
            Figure.of(t.occupancy, units.share(t.occupancy or 0.0)),
            t.reason,
        ]
        for t in result.trials
    ]
    tiles = [
        Tile(name=f"over {rival.name}", figure=ratio(rival.speedup),
             small=f"{interval(rival.speedup)} (95 %)")
        for rival in result.rivals
    ]  # fmt: skip
    words = "ranked by a static model, not timed" if result.ranking else "verified and timed"
    return Section(
        verb="kernel tune",
        title=result.kernel,
        about=f"{result.dtype}, {_config(result.sizes)}, {result.where}",
        verdict=f"{_config(result.config)}: {words}." if result.config else "Nothing can be used.",
        tiles=tiles,
        notes=result.notes,
        parts=[
            card("Configurations", "", table("Configurations", columns, rows)),
            setting(result.environment, result.device),
        ],
    )


def _ms(value: float | None) -> str:
    return "" if value is None else units.milliseconds(value)


def _config(config: dict[str, int] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (config or {}).items())


def _status(status: str) -> Element:
    return el("span", status, class_=f"status {_STATUS.get(status, 'skipped')}")


def _units(unit_ms: dict[str, float]) -> Element:
    ordered = sorted(unit_ms.items(), key=lambda pair: -pair[1])
    columns = [Column(name="unit"), Column(name="time", number=True)]
    rows: list[Row] = [[name, Figure.of(ms, units.milliseconds(ms))] for name, ms in ordered]
    return bars(
        "What each unit would need by itself",
        "By a static model of the card; the longest one limits the kernel.",
        [Bar(name=name, end=ms, kind="chosen" if i == 0 else "c5", strong=i == 0)
         for i, (name, ms) in enumerate(ordered)],
        units.milliseconds,
        table("Time by unit", columns, rows),
    )  # fmt: skip


def _archs(result: KernelExplainResult) -> Element:
    columns = [
        Column(name="function", code=True),
        Column(name="architecture"),
        Column(name="outcome"),
        Column(name="registers", number=True),
        Column(name="spilled", number=True, about="bytes stored and loaded per thread"),
        Column(name="shared memory", number=True),
        Column(name="occupancy", number=True),
        Column(name="limited by"),
        Column(name="reason", wide=True),
    ]
    rows: list[Row] = [
        [
            a.function,
            a.arch,
            _status(a.status),
            Figure.of(a.registers, str(a.registers)),
            Figure.of(a.spill_store_bytes + a.spill_load_bytes,
                      units.size(a.spill_store_bytes + a.spill_load_bytes)),
            Figure.of(a.static_shared_bytes + a.dynamic_shared_bytes,
                      units.size(a.static_shared_bytes + a.dynamic_shared_bytes)),
            Figure.of(a.occupancy.fraction if a.occupancy else None,
                      units.share(a.occupancy.fraction if a.occupancy else 0.0)),
            a.occupancy.limited_by if a.occupancy else "",
            a.reason or (a.occupancy.lift if a.occupancy else ""),
        ]
        for a in result.archs
    ]  # fmt: skip
    return card("By architecture", "", table("Compiled functions", columns, rows))


def _findings(findings: Sequence[KernelFinding]) -> Element | None:
    if not findings:
        return None
    columns = [
        Column(name="severity"),
        Column(name="kind"),
        Column(name="where", code=True),
        Column(name="what", wide=True),
        Column(name="factor", number=True, about="how many times more than needed is moved"),
    ]
    rows: list[Row] = [
        [f.severity, f.kind, f.where, f.text, Figure.of(f.factor, f"{f.factor or 0:.3g}×")]
        for f in findings
    ]
    return card("Findings", "", table("Findings", columns, rows))


def _overlap(overlap: CopyOverlap) -> Element | None:
    streams = sorted({slot.stream for slot in overlap.slots})
    lanes = [
        Lane(
            name=f"stream {stream}",
            slices=[
                Slice(
                    name=f"{_COPIES.get(slot.what, (slot.what, ''))[0]}, part {slot.chunk + 1}",
                    begin_ms=slot.begin_ms,
                    end_ms=slot.end_ms,
                    kind=_COPIES.get(slot.what, ("", "c5"))[1],
                )
                for slot in overlap.slots
                if slot.stream == stream
            ],
        )
        for stream in streams
    ]
    columns = [
        Column(name="stream", number=True),
        Column(name="what"),
        Column(name="begins", number=True),
        Column(name="ends", number=True),
    ]
    rows: list[Row] = [
        [
            Figure.of(slot.stream, str(slot.stream)),
            _COPIES.get(slot.what, (slot.what, ""))[0],
            Figure.of(slot.begin_ms, units.milliseconds(slot.begin_ms)),
            Figure.of(slot.end_ms, units.milliseconds(slot.end_ms)),
        ]
        for slot in overlap.slots
    ]
    return timeline(
        f"Copies and kernel on {overlap.streams} streams, {overlap.gpu}",
        f"Simulated: {units.milliseconds(overlap.total_ms)} instead of "
        f"{units.milliseconds(overlap.serial_ms)} one after the other. {overlap.assumptions}",
        lanes,
        table("Simulated streams", columns, rows),
    )
