"""Where a run's backup may lie, and whose it is: copies must cost nobody anything."""

from pathlib import Path
from typing import TYPE_CHECKING

from suanli.base.errors import BadInputError

if TYPE_CHECKING:
    from suanli.training.run_folder import RunRecord

# What makes two runs of one workload different ones; epochs may change on the way.
_WHOSE = ("workload", "seed", "start", "frozen", "prune", "teacher", "encrypted")


def check_apart(folder: Path, backup: Path) -> None:
    """Refuse a backup in the run's own folder, where a copy would take its original's place.

    Raises:
        BadInputError: It is the run's folder, or lies in it.
    """
    if backup.resolve().is_relative_to(folder.resolve()):
        raise BadInputError(
            f"the backup {backup} lies in the run's folder {folder}",
            next_step="give a folder elsewhere with --backup, best on another disk",
        )


def check_unused(backup: Path, names: tuple[str, ...]) -> None:
    """Refuse a backup that holds files which a new run would write over.

    Raises:
        BadInputError: There is one.
    """
    for name in names:
        if (backup / name).exists():
            raise BadInputError(
                f"{backup} holds a {name} already",
                next_step="give a folder of its own with --backup",
            )


def check_same_run(record: "RunRecord", kept: "RunRecord", backup: Path) -> None:
    """Refuse a backup of another run, whose checkpoints would be taken for this one's.

    Raises:
        BadInputError: It is one.
    """
    for name in _WHOSE:
        if getattr(record, name) != getattr(kept, name):
            raise BadInputError(
                f"{backup} is the backup of another run: its {name} is "
                f"{getattr(kept, name)!r}, and not {getattr(record, name)!r}",
                next_step="give this run's own with --backup, or a new folder",
            )
