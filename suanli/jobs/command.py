"""A job's command: which words mean what, and how it is started again."""

import json
import math
from pathlib import Path

from suanli.base.errors import BadInputError

# Verbs that end by themselves and take a device.
VERBS = ("train", "optimize")
_RESUMABLE = "train"
# Words that do not change what a command needs: where its results go, and chance.
_ASIDE = ("-o", "--out", "--seed", "--backup", "--key", "--checkpoint")
_FLAGS = ("--resume", "--json", "--fresh", "--keep")


def checked(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command, without what the queue itself decides.

    Raises:
        BadInputError: It is no verb that can be queued, or it asks for what the queue decides.
    """
    if not command or command[0] not in VERBS:
        found = repr(command[0]) if command else "nothing"
        raise BadInputError(
            f"a job is a command of {' or '.join(VERBS)}, not {found}",
            next_step="suanli queue add train digits-resnet",
        )
    if len(command) < 2 or command[1].startswith("-"):
        raise BadInputError(f"a job names its workload first: {command[0]} WORKLOAD ...")
    if value_of(command, "--device") not in (None, "auto"):
        raise BadInputError(
            "the queue places a job on a device",
            next_step="suanli queue add --device NAME " + command[0],
        )
    if "--resume" in command:
        raise BadInputError("the queue resumes a run itself: leave --resume out")
    return command


def value_of(command: tuple[str, ...], *names: str) -> str | None:
    """The value of an option, as `--name value`, `--name=value` or `-nVALUE`; the last counts."""
    found = None
    for place, word in enumerate(command):
        for name in names:
            if word == name and place + 1 < len(command):
                found = command[place + 1]
            elif word.startswith(f"{name}=") and name.startswith("--"):
                found = word.partition("=")[2]
            elif len(name) == 2 and word.startswith(name) and len(word) > 2:
                found = word[2:]  # -oDIR
    return found


def number_of(command: tuple[str, ...], name: str) -> float | None:
    """The value of an option that is a number more than 0; None where it is not given.

    Raises:
        BadInputError: It is no such number.
    """
    text = value_of(command, name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise BadInputError(f"{name} must be a number more than 0, not {text!r}")
    return value


def out_of(command: tuple[str, ...]) -> str:
    """The run's folder as it is written; "" where none is given."""
    return value_of(command, "-o", "--out") or ""


def with_out(command: tuple[str, ...], number: int, folder: Path) -> tuple[str, ...]:
    """The command with a folder of its own, so that it can be gone on with.

    Args:
        command: The words.
        number: Of the job.
        folder: Where it runs; a run that lies there already is never taken for this one.
    """
    if command[0] != _RESUMABLE or out_of(command):
        return command
    name = Path(command[1].partition("?")[0]).name.replace(":", "-")
    plain = f"runs/{name}-job{number}"
    names = (plain, *(f"{plain}-{i}" for i in range(2, 1000)))
    return (*command, "-o", next(n for n in names if not (folder / n).exists()))


def to_start(command: tuple[str, ...], folder: Path, device: str) -> tuple[str, ...]:
    """The words of the next start: on this device, and resumed where a run was begun."""
    words = (*command, "--device", device)
    out = out_of(command)
    if command[0] == _RESUMABLE and out and (folder / out / "run.json").is_file():
        words = (*words, "--resume")
    return words


def finished(out: str, folder: Path) -> bool:
    """Whether a run's folder holds one that has come to its end."""
    try:
        data = json.loads((folder / out / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(out) and isinstance(data, dict) and data.get("interrupted") is False


def about(command: tuple[str, ...]) -> tuple[str, ...]:
    """What decides time and memory: jobs with equal values need the same."""
    kept, words = [], iter(command)
    for word in words:
        if word in _ASIDE:
            next(words, None)
        elif word not in _FLAGS and not word.startswith(("-o", *(f"{a}=" for a in _ASIDE[1:]))):
            kept.append(word)
    return tuple(kept)
