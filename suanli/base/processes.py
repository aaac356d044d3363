"""Which of several processes this one is, as torchrun tells it in the environment."""

import os

from suanli.base.errors import BadInputError


def world() -> int:
    """How many processes torchrun started; 1 without it.

    Raises:
        BadInputError: The environment names something that is no such number.
    """
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """This process's number among them; 0 for one alone, whatever the environment says.

    Raises:
        BadInputError: As by `world`.
    """
    return _number("RANK", 0) if world() > 1 else 0


def starts() -> int:
    """How often torchrun has started these processes anew after one of them had ended.

    Raises:
        BadInputError: As by `world`.
    """
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def _number(name: str, none: int) -> int:
    """A number of the environment; `none` where it is absent or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return none
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise BadInputError(
            f"the environment says {name}={text[:40]!r}, which is no number of processes",
            next_step=f"unset {name}; torchrun sets it for each process that it starts",
        )
    return int(text)
