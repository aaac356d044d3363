"""How the learning rate goes over a run."""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from suanli.base.errors import BadInputError
from suanli.training.recipe import Recipe

_CYCLE_WARM_UP = 0.25  # share of a cycle in which the rate rises; airbench94 uses 0.23
_COSINE_WARM_UP, _COSINE_END = 0.05, 0.1


def rate(recipe: Recipe, done: float, group: str = "") -> float:
    """What the peak rate of a parameter group is multiplied with.

    Args:
        recipe: Its own `rate` has the word, else its settings' schedule.
        done: Share of the run that is over, 0 to 1.
        group: Name of the parameter group.
    """
    if recipe.rate is not None:
        return recipe.rate(done, group)
    schedule = recipe.settings.schedule
    if schedule == "constant":
        return 1.0
    if schedule == "one_cycle":
        if done < _CYCLE_WARM_UP:
            return 0.1 + 0.9 * done / _CYCLE_WARM_UP
        return (1.0 - done) / (1.0 - _CYCLE_WARM_UP)
    if done < _COSINE_WARM_UP:
        return (1 + 19 * done / _COSINE_WARM_UP) / 20  # the first step is a small one, not none
    over = (done - _COSINE_WARM_UP) / (1.0 - _COSINE_WARM_UP)
    return _COSINE_END + (1.0 - _COSINE_END) * 0.5 * (1.0 + math.cos(math.pi * over))


def triangle(done: float, *, start: float = 0.2, peak: float = 0.23, end: float = 0.07) -> float:
    """Up in a straight line to 1 at `peak`, then down in one; the defaults are airbench94's.

    Args:
        done: Share of the run, 0 to 1.
        start: Value at 0.
        peak: Share at which the value is 1; 0 begins there.
        end: Value at 1.
    """
    if done < peak:
        return start + (1.0 - start) * done / peak
    return 1.0 - (1.0 - end) * (done - peak) / (1.0 - peak)


def factors(given: Mapping[str, float] | Sequence[str]) -> tuple[str, ...]:
    """Patterns and factors as the settings have them.

    Args:
        given: `{"head.*": 10}`, or `["head.*=10"]`.

    Raises:
        BadInputError: One is no pattern with a factor above zero.
    """
    pairs = given.items() if isinstance(given, Mapping) else (_pair(text) for text in given)
    found = []
    for pattern, factor in pairs:
        if not 0 < float(factor) < math.inf:
            raise BadInputError(
                f"--lr-of {pattern} needs a factor above 0, not {float(factor):g}",
                next_step="--freeze leaves parameters as they are",
            )
        found.append(f"{pattern}={float(factor):g}")
    return tuple(found)


def apart(
    optimizer: torch.optim.Optimizer, model: nn.Module, lr_of: Sequence[str]
) -> tuple[str, ...]:
    """Give parameters that match a pattern a group of their own with another peak rate.

    Args:
        optimizer: Changed in place, before its first step; its own groups stay, in their order.
        model: It has the parameters' names.
        lr_of: "PATTERN=FACTOR"; the first that matches counts.

    Returns:
        A line for each pattern: what matched.

    Raises:
        BadInputError: A pattern matches no parameter that is trained.
    """
    pairs = [_pair(text) for text in lr_of]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matched: dict[str, list[str]] = {pattern: [] for pattern, _ in pairs}
    for group in list(optimizer.param_groups):
        split: dict[str, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            pattern = next((p for p in matched if fnmatchcase(name, p)), "")
            split.setdefault(pattern, []).append(parameter)
            if pattern:
                matched[pattern].append(name)
        group["params"] = split.pop("", [])
        for pattern, factor in pairs:
            if pattern in split:
                options: dict[str, Any] = {k: v for k, v in group.items() if k != "params"}
                options["lr"] = factor * float(group["lr"])
                optimizer.add_param_group({**options, "params": split[pattern]})
        if not group["params"]:
            optimizer.param_groups.remove(group)
    for pattern, found in matched.items():
        if not found:
            known = ", ".join(list(names.values())[:4])
            raise BadInputError(
                f"--lr-of {pattern} matches no parameter that is trained",
                next_step=f"they are named {known}, …",
            )
    return tuple(_line(pattern, factor, matched[pattern]) for pattern, factor in pairs)


def _line(pattern: str, factor: float, found: Sequence[str]) -> str:
    few = ", ".join(found[:4]) + (", …" if len(found) > 4 else "")
    return f"{len(found)} tensors that match {pattern} learn at {factor:g} times the rate: {few}"


def _pair(text: str) -> tuple[str, float]:
    pattern, equals, factor = text.rpartition("=")
    try:
        return pattern, float(factor) if equals and pattern else float("nan")
    except ValueError:
        raise BadInputError(
            f"--lr-of takes PATTERN=FACTOR, not {text!r}", next_step="such as 'head.*=10'"
        ) from None
