"""An engine's manifest as the result that made it, where nothing else of the search was kept."""

from pathlib import Path

from suanli.base import schema
from suanli.base.errors import ArtefactError, BadInputError
from suanli.base.results import OptimizeResult
from suanli.engines.manifest import read_manifest


def result_of_engine(folder: Path) -> OptimizeResult:
    """What the engine's signed manifest says was measured; its trials are not in it.

    Raises:
        BadInputError: It is damaged, or was made without numbers.
    """
    try:
        manifest, _ = read_manifest(folder)
    except ArtefactError as error:
        raise BadInputError(str(error)) from None
    numbers = manifest.numbers
    eager, best = numbers.speedup_vs_eager, numbers.speedup_vs_best_baseline
    if numbers.chosen is None or numbers.baseline is None or eager is None or best is None:
        raise BadInputError(f"{folder.name} carries no measurements")
    return OptimizeResult(
        schema=schema.name("optimize"),
        verb="optimize",
        workload=manifest.name,
        device=manifest.device,
        environment=manifest.environment,
        objective=numbers.objective,
        batch=numbers.batch,
        max_batch=manifest.max_batch,
        untrained=numbers.untrained,
        baseline=numbers.baseline,
        chosen=numbers.chosen,
        speedup_vs_eager=eager,
        speedup_vs_best_baseline=best,
        quality=numbers.quality,
        values=numbers.values,
        sol=numbers.sol,
        trials=(),
        confirmations=numbers.confirmations,
        engine_dir=str(folder),
        ceilings=(),
        flops=numbers.flops or 0,
        parameters=numbers.parameters or 0,
        seconds_spent=0.0,
        notes=manifest.notes,
    )
