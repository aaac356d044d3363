"""Records to a page: which verb shows what, and writing it."""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from suanli.base.errors import BadInputError
from suanli.base.files import write_atomic
from suanli.base.kernel_results import KernelCheckResult, KernelExplainResult, KernelTuneResult
from suanli.base.predict_results import ChooseResult, PredictResult
from suanli.base.profile_results import ProfileResult
from suanli.base.results import DoctorResult, OptimizeResult
from suanli.base.train_results import TrainResult
from suanli.reports.html.page import LIMIT_BYTES, page
from suanli.reports.html.section import Section
from suanli.reports.html.verbs import kernel, machine, optimize, predict, profile, train
from suanli.reports.subjects import Subject

_FEWEST_ROWS = 50  # of a profile's operators: fewer would say too little

_SECTIONS: dict[type[Any], Callable[[Any], Section]] = {
    DoctorResult: machine.section,
    OptimizeResult: optimize.section,
    ProfileResult: profile.section,
    PredictResult: predict.section,
    ChooseResult: predict.ranking,
    KernelExplainResult: kernel.explain,
    KernelCheckResult: kernel.check,
    KernelTuneResult: kernel.tune,
}


def section(subject: Subject) -> Section:
    """What a page shows of one result.

    Raises:
        BadInputError: It holds figures that no measurement gives, such as a step of no time.
    """
    try:
        return _section(subject)
    except (ArithmeticError, ValueError) as error:
        raise BadInputError(
            f"{subject.source or 'the result'} holds figures that cannot be shown: {error}",
            next_step="make it again",
        ) from error


def _section(subject: Subject) -> Section:
    if isinstance(subject.record, TrainResult):
        return train.section(subject.record, subject.history)
    return _SECTIONS[type(subject.record)](subject.record)


def html(subjects: Sequence[Subject], *, made: datetime.datetime | None = None) -> str:
    """One page of some results; profiles keep their largest rows where all would make it too large.

    Args:
        subjects: Top to bottom.
        made: When; now where it is not given.
    """
    when = f"{made or datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    text = page([section(s) for s in subjects], made=when)
    profiles = [s.record for s in subjects if isinstance(s.record, ProfileResult)]
    most = max((len(record.operators) for record in profiles), default=0)
    while len(text.encode()) >= LIMIT_BYTES and most > _FEWEST_ROWS:
        most = max(_FEWEST_ROWS, most // 2)
        text = page([section(_shortened(s, most)) for s in subjects], made=when)
    return text


def _shortened(subject: Subject, most: int) -> Subject:
    if not isinstance(subject.record, ProfileResult):
        return subject
    return replace(subject, record=profile.shortened(subject.record, most))


def write(subjects: Sequence[Subject], target: Path) -> int:
    """Write one page, whole or not at all.

    Returns:
        Its size in bytes.

    Raises:
        BadInputError: The file cannot be written.
    """
    check_target(target)
    content = html(subjects).encode()
    try:
        write_atomic(target, content)
    except OSError as error:
        raise BadInputError(f"cannot write {target}: {error.strerror or error}") from None
    return len(content)


def check_target(target: Path) -> None:
    """Refuse a place that no page can be written to, before any work is done.

    Raises:
        BadInputError: It is a folder, or no page's name.
    """
    if target.is_dir():
        raise BadInputError(f"{target} is a folder", next_step="give a file such as report.html")
    if target.suffix.lower() not in (".html", ".htm"):
        raise BadInputError(f"{target} must end in .html", next_step="such as report.html")
