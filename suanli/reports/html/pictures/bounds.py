"""How what binds an operator, or the outcome of a trial, is told by colour and by shape alike."""

from collections.abc import Iterable

from suanli.base.trial import Status
from suanli.base.work import BoundBy
from suanli.reports.html.drawing import Legend

CLASS: dict[BoundBy, str] = {
    "compute": "compute",
    "memory": "memory",
    "overhead": "overhead",
    "communication": "communication",
    "data": "datawait",
}
SHAPE: dict[BoundBy, str] = {
    "compute": "circle",
    "memory": "square",
    "overhead": "triangle",
    "communication": "diamond",
    "data": "diamond",
}
STATUS_SHAPE: dict[Status, str] = {
    "verified": "circle",
    "rejected": "triangle",
    "failed": "cross",
    "skipped": "cross",
}


def legend(bounds: Iterable[BoundBy]) -> list[Legend]:
    """The entries for what occurs, in the order of the table."""
    found = set(bounds)
    return [
        Legend(mark=f"{CLASS[bound]} {SHAPE[bound]}", name=f"bound by {bound}")
        for bound in CLASS
        if bound in found
    ]
