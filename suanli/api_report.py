"""Layer 7: the verbs `suanli report` and `suanli ui` in Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.base import schema
from suanli.base.errors import BadInputError
from suanli.base.hardware import DeviceInfo
from suanli.base.results import ReportResult, UiResult

if TYPE_CHECKING:
    from suanli.reports.subjects import Record, Subject
    from suanli.reports.ui.server import Server

    Reportable = Record | str | Path


def report(results: "Reportable | Sequence[Reportable]", out: str | Path) -> ReportResult:
    """Write results as one HTML page that needs nothing else.

    Args:
        results: What a verb gave back, or where it lies: a file that `--json` wrote, an engine's
            folder, a run's folder. One of them, or several for one page.
        out: The page, such as "report.html".

    Raises:
        BadInputError: One is no result, or the page cannot be written.
    """
    from suanli.reports.html import report as pages

    given = (
        list(results)
        if isinstance(results, Sequence | tuple) and not isinstance(results, str)
        else [results]
    )
    if not given:
        raise BadInputError("a report needs a result")
    target = Path(out)
    pages.check_target(target)
    subjects = [_subject(one) for one in given]
    size = pages.write(subjects, target)
    sections = [pages.section(subject) for subject in subjects]
    from suanli.measure.environment import environment

    return ReportResult(
        schema=schema.name("report"),
        verb="report",
        workload=None,
        device=_device(),
        environment=environment(),
        output=str(target),
        size_bytes=size,
        results=tuple(f"{section.verb} {section.title}" for section in sections),
    )


def ui(folder: str | Path, *, port: int = 0) -> "Server":
    """A server of a folder's results on this machine alone; see `Server`.

    Args:
        folder: What to show, with what lies in it.
        port: To listen on; 0 takes a free one.

    Raises:
        BadInputError: There is no such folder, or the port is taken.
    """
    from suanli.reports.ui.server import Server

    return Server(Path(folder), port=port)


def ui_result(server: "Server") -> UiResult:
    """Where a server is, as `suanli ui --json` prints it."""
    from suanli.measure.environment import environment

    return UiResult(
        schema=schema.name("ui"),
        verb="ui",
        workload=None,
        device=_device(),
        environment=environment(),
        url=server.url,
        folder=str(server.folder),
    )


def _subject(result: "Reportable") -> "Subject":
    from suanli.reports import subjects

    if isinstance(result, str | Path):
        return subjects.read(Path(result))
    return subjects.of_record(result)


def _device() -> DeviceInfo:
    from suanli.devices import device

    return device("cpu").info
