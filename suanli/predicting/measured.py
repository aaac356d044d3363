"""What `suanli doctor` measured on a card wins over its datasheet."""

import re
from collections.abc import Callable
from dataclasses import replace

from suanli.base.gpu_sheet import GpuSheet, Source
from suanli.base.hardware import Ceiling, Ceilings
from suanli.base.work import Operator, Work
from suanli.cost.predictor import predict_operators
from suanli.measure.ceilings import kept_for_card

_SIDES = re.compile(r"(\d+)x(\d+)x(\d+)")
_ROUNDS = 6
_WIDTH = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


def as_measured(sheet: GpuSheet) -> GpuSheet:
    """The sheet with what was measured of this very card on this machine, where it was.

    The rates are set so that the model gives back the product that `suanli doctor` timed, and the
    bandwidth so that it gives back the copy. A card under a power or clock limit is then
    predicted as it runs, not as it is printed. Of the links to other cards the slowest counts.
    """
    for name in sheet.nvml_names:
        found = kept_for_card(name)
        if found is not None:
            return with_ceilings(sheet, found)
    return sheet


def with_ceilings(sheet: GpuSheet, ceilings: Ceilings) -> GpuSheet:
    """The same for ceilings at hand."""
    fitted, figures = sheet, []
    for item in ceilings.items:
        if item.what == "copy" and item.achieved and sheet.memory_gb_per_s:
            fitted = _with_bandwidth(fitted, item)
            figures.append("memory_gb_per_s")
    for item in ceilings.items:
        timed = item.what == "matmul" and item.achieved and item.dtype in sheet.dense_tflops
        if timed and item.dtype and _SIDES.search(item.how):
            fitted = _with_rate(fitted, item.dtype, item)
            figures.append(f"dense_tflops.{item.dtype}")
    links = [item.achieved for item in ceilings.items if item.what == "link" and item.achieved]
    if links:
        fitted = replace(fitted, link_gb_per_s=min(links) / 1e9)
        figures.append("link_gb_per_s")
    if not figures:
        return sheet
    source = Source(
        document=f"measured here by suanli doctor, {ceilings.measured_at}", figures=tuple(figures)
    )
    return replace(fitted, mark="measured", sources=(source, *fitted.sources))


def _with_rate(sheet: GpuSheet, dtype: str, item: Ceiling) -> GpuSheet:
    sides = _SIDES.search(item.how)
    if sides is None or item.achieved is None:
        return sheet
    m, n, k = map(int, sides.groups())
    work = _product(m, n, k, dtype)
    measured_ms = 2e3 * m * n * k / item.achieved
    # Marked while it is solved for: a measured rate has the clock in it.
    source = Source(document="being solved for", figures=(f"dense_tflops.{dtype}",))
    solved = _solved(
        replace(sheet, mark="measured", sources=(source,)),
        work,
        dtype,
        measured_ms,
        lambda s, f: replace(s, dense_tflops={**s.dense_tflops, dtype: s.dense_tflops[dtype] * f}),
    )
    return replace(sheet, dense_tflops=solved.dense_tflops)


def _with_bandwidth(sheet: GpuSheet, item: Ceiling) -> GpuSheet:
    """`achieved` counts the bytes read and those written."""
    elements = 256 * 2**20
    moved = Operator(
        name="clone",
        bytes_read=4 * elements,
        bytes_written=4 * elements,
        input_shapes=((elements,),),
        output_shapes=((elements,),),
    )
    work = _work(moved)
    measured_ms = 8e3 * elements / (item.achieved or 1.0)
    return _solved(
        sheet,
        work,
        "fp32",
        measured_ms,
        lambda s, f: replace(s, memory_gb_per_s=(s.memory_gb_per_s or 0.0) * f),
    )


def _solved(
    sheet: GpuSheet,
    work: Work,
    dtype: str,
    measured_ms: float,
    scaled: Callable[[GpuSheet, float], GpuSheet],
) -> GpuSheet:
    """Scale a figure until the model's time is the measured one; clocks make it not quite even."""
    for _ in range(_ROUNDS):
        sheet = scaled(sheet, _ratio(sheet, work, dtype, measured_ms))
    return sheet


def _ratio(sheet: GpuSheet, work: Work, dtype: str, measured_ms: float) -> float:
    predicted = predict_operators(work, sheet, dtype=dtype, autocast=False)
    return min(4.0, max(0.25, predicted.step_ms.p50 / measured_ms))


def _product(m: int, n: int, k: int, dtype: str) -> Work:
    width = _WIDTH[dtype]
    return _work(
        Operator(
            name="mm",
            dtype=dtype if dtype != "tf32" else "fp32",
            flops=2 * m * n * k,
            bytes_read=width * (m * k + k * n),
            bytes_written=width * m * n,
            input_shapes=((m, k), (k, n)),
            output_shapes=((m, n),),
            matmul=True,
        )
    )


def _work(operator: Operator) -> Work:
    return Work(
        operators=(operator,),
        batch=1,
        parameters=0,
        parameter_bytes=0,
        input_bytes=0,
        output_bytes=0,
    )
