"""What stands between a search's winner and a saved engine: the folder, and what was confirmed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from suanli.base.files import cache_dir
from suanli.base.leftovers import temporary_folder
from suanli.base.results import Confirmation, OptimizeResult
from suanli.base.trial import Quality, Trial
from suanli.engines.assembly import BuiltVariant, write_engine
from suanli.engines.confirm import Reopened, build_folder
from suanli.engines.finalists import batch_ranges
from suanli.engines.manifest import Numbers
from suanli.engines.request import Request
from suanli.engines.session import Session


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """An engine that held.

    Attributes:
        winner: The trial that serves the asked batch.
        variants: The plans in the engine.
        variant_of: Batch size -> which of them serves it.
        confirmations: The races.
        quality: On the acceptance samples; None without labelled data.
        reopened: What a fresh process found.
    """

    winner: Trial
    variants: tuple[Trial, ...]
    variant_of: dict[int, int]
    confirmations: tuple[Confirmation, ...]
    quality: Quality | None
    reopened: Reopened


def write_variants(
    session: Session,
    folder: Path,
    variants: Sequence[Trial],
    variant_of: dict[int, int],
    *,
    numbers: Numbers,
    temporary: bool,
    notes: Sequence[str] = (),
) -> None:
    """Write an engine of the plans that serve.

    Args:
        session: The captured program and the folder of what was built.
        folder: Where the engine goes.
        variants: The plans' trials, each built.
        variant_of: Batch size -> index among them.
        numbers: What was measured.
        temporary: See `write_engine`.
        notes: What the engine's user should know.

    Raises:
        SuanliError: It cannot be written.
    """
    ranges = batch_ranges(variant_of, session.program.signature.max_batch)
    write_engine(
        folder,
        program=session.program,
        variants=[
            BuiltVariant(
                plan=variants[index].plan,
                folder=build_folder(variants[index], session.setting),
                min_batch=first,
                max_batch=last,
            )
            for first, last, index in ranges
        ],
        device=session.wish.device,
        numbers=numbers,
        notes=notes,
        temporary=temporary,
    )


def temporary_engine() -> Path:
    """A folder for an engine that nobody asked to keep.

    Raises:
        OSError: No folder can be made.
    """
    parent = cache_dir() / "engines"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return temporary_folder(parent, "engine-")
    except OSError:
        return temporary_folder(None, "suanli-engine-")


def why_not(reopened: Reopened, session: Session) -> str:
    """Why the reopened engine is not what was measured; "" if it is."""
    if reopened.portable:
        return f"does not open again as built: {'; '.join(reopened.differences)}"
    if reopened.values is not None and not reopened.values.ok:
        return f"wrong after reopening: {reopened.values.reason}"
    if not reopened.quantised:
        return ""
    error, tolerance = reopened.relative_error, session.wish.tolerance
    if error is None:
        return "not finite, or stale, after reopening"
    if session.setting.search is not None:
        return ""  # the acceptance samples decide
    if tolerance is None or error > tolerance:
        allowed = "none" if tolerance is None else f"{tolerance:.3g}"
        return f"relative error {error:.3g} after reopening, {allowed} is allowed"
    return ""


def numbers_of(result: OptimizeResult, request: Request) -> Numbers:
    """What of a result, and of what was asked, the engine carries."""
    return Numbers(
        objective=result.objective,
        batch=result.batch,
        untrained=result.untrained,
        flops=result.flops,
        parameters=result.parameters,
        baseline=result.baseline,
        chosen=result.chosen,
        speedup_vs_eager=result.speedup_vs_eager,
        speedup_vs_best_baseline=result.speedup_vs_best_baseline,
        confirmations=result.confirmations,
        quality=result.quality,
        values=result.values,
        sol=result.sol,
        max_drop=request.budget,
        tolerance=request.tolerance,
        backends=request.backends,
        precision=request.precision,
    )
