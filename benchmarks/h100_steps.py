"""Training steps on H100 that nothing was fitted to: predicted against llm-foundry's own table.

    python -m benchmarks.h100_steps

Seconds; needs no data beside the repository's. That attention reaches less of a Hopper
(`suanli.cost.gpu_rates`) was looked for because of these rows; its figure is published.
"""

import math
import statistics
from pathlib import Path

from benchmarks.predictor.errors import parallel
from benchmarks.predictor.layouts import h100_steps
from suanli.cost.parameters import parameters

_OUT = Path(__file__).parent / "results" / "h100-steps.md"


def table() -> tuple[str, list[bool], float]:
    """The table, which rows are inside their 90 % interval, and the median error."""
    lines, speeds, inside = [], [], []
    for row in h100_steps():
        step = parallel(row, parameters()).step_ms
        inside.append(step.lo90 <= 1e3 * row.seconds <= step.hi90)
        speeds.append(1e3 * row.seconds / step.p50)
        lines.append(
            f"| {row.job} | {row.seconds:.2f} | {1e-3 * step.p50:.2f} | {speeds[-1]:.2f} "
            f"| {'yes' if inside[-1] else 'no'} |"
        )
    error = statistics.median(math.exp(abs(math.log(speed))) - 1.0 for speed in speeds)
    text = (
        "MPT (model, length x micro-batch, cards) in bf16 with FSDP on H100 SXM5 80GB; seconds of "
        "a step.\n\n| job | measured | predicted | predicted speed / measured | in 90 % interval |"
        "\n|---|---|---|---|---|\n" + "\n".join(lines) + f"\n\n{len(speeds)} rows, speed "
        f"{min(speeds):.2f} to {max(speeds):.2f}, {statistics.median(speeds):.2f} in the median; "
        f"median error {100 * error:.0f} %, {sum(inside)} inside the interval.\n"
    )
    return text, inside, error


def main() -> None:
    """Write the table."""
    text = table()[0]
    _OUT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
