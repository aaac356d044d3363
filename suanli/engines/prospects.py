"""What may be tried here: the backends asked for, and the situation that plans must fit."""

from suanli.base.errors import BadInputError
from suanli.base.plan import BackendSpec
from suanli.devices import cpu_info, gpu_infos
from suanli.engines.backends import backends, status
from suanli.engines.request import Request
from suanli.engines.session import Session
from suanli.plans.situation import Situation


def usable(request: Request) -> tuple[BackendSpec, ...]:
    """The backends that may be tried; eager always, because it is the reference.

    Raises:
        BadInputError: One that was asked for does not exist.
    """
    table = backends(request.backend_modules)
    unknown = [name for name in request.backends if name not in table]
    if unknown:
        raise BadInputError(
            f"unknown backend {unknown[0]!r}", next_step=f"there are {', '.join(table)}"
        )
    wanted = (*request.backends, "eager") if request.backends else tuple(table)
    return tuple(backend.spec for name, backend in table.items() if name in wanted)


def situation(session: Session, request: Request) -> Situation:
    """The machine, the program and the wish, as the plans need them."""
    signature = session.program.signature
    found = [status(backend) for backend in backends(request.backend_modules).values()]
    return Situation(
        device=request.device,
        cores=cpu_info().usable_cores,
        features=cpu_info().features,
        capability=_capability(request.device),
        objective=request.objective,
        batch=session.batches[0],
        max_batch=signature.max_batch,
        lowest=request.precision,
        dynamic=signature.dynamic,
        exported=session.program.meta.exported,
        images=any(len(spec.shape) == 4 for spec in signature.inputs),
        accepts_quantised=session.setting.search is not None or request.tolerance is not None,
        calibration_samples=session.calibration_samples,
        present=frozenset(row.name for row in found if row.present),
        why_absent={row.name: row.reason for row in found if row.reason},
    )


def _capability(device_name: str) -> str | None:
    """Compute capability of a GPU, where it is known."""
    kind, _, index = device_name.partition(":")
    if kind != "cuda":
        return None
    return next((g.compute_capability for g in gpu_infos() if g.index == int(index or 0)), None)
