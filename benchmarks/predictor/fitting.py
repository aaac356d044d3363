"""Least squares over a few named numbers of the parameter file."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import suanli.cost.parameters
from suanli.base.codec import from_json
from suanli.cost.parameters import Parameters

FILE = Path(suanli.cost.parameters.__file__).with_name("predictor.json")
# Residuals larger than this count by their size, not by their square: some rows are mistakes.
_ROBUST = 0.15


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One number to fit, in logarithms, drawn to its prior.

    Attributes:
        path: Keys from the top of the file.
        prior: Where it is drawn to.
        width: Standard deviation of its logarithm before any data.
    """

    path: tuple[str, ...]
    prior: float
    width: float = 0.5


def stored() -> dict[str, Any]:
    """The parameter file as it lies."""
    data: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return data


def with_values(data: dict[str, Any], knobs: Sequence[Knob], logs: Any) -> dict[str, Any]:
    """A copy with some numbers replaced."""
    changed = copy.deepcopy(data)
    for knob, value in zip(knobs, logs, strict=True):
        place = changed
        for key in knob.path[:-1]:
            place = place.setdefault(key, {})
        place[knob.path[-1]] = float(math.exp(value))
    return changed


def as_parameters(data: dict[str, Any]) -> Parameters:
    """The record of a parameter file."""
    return from_json(Parameters, data)


def robust(errors: Any) -> Any:
    """Residuals whose square grows linearly where they are large (pseudo-Huber)."""
    errors = np.asarray(errors, dtype=float)
    size = np.sqrt(2.0 * (np.sqrt(1.0 + (errors / _ROBUST) ** 2) - 1.0))
    return np.sign(errors) * size


def fit(
    data: dict[str, Any],
    knobs: Sequence[Knob],
    errors: Callable[[Parameters], Sequence[Any]],
    *,
    steps: int = 12,
) -> dict[str, Any]:
    """Parameters that make log(predicted / measured) small, each group of errors counting alike.

    Args:
        data: The file to start from.
        knobs: What to change.
        errors: Groups of log errors under given parameters.
        steps: Largest number of iterations.
    """
    from scipy.optimize import least_squares

    prior = np.array([math.log(knob.prior) for knob in knobs])
    width = np.array([knob.width for knob in knobs])

    def residuals(logs: Any) -> Any:
        groups = errors(as_parameters(with_values(data, knobs, logs)))
        parts = [robust(g) * math.sqrt(8.0 / len(g)) for g in groups if len(g)]
        return np.concatenate([*parts, (logs - prior) / width])

    start = np.array([math.log(_value(data, knob)) for knob in knobs])
    found = least_squares(residuals, start, max_nfev=steps, diff_step=1e-3)
    return with_values(data, knobs, found.x)


def _value(data: dict[str, Any], knob: Knob) -> float:
    place: Any = data
    for key in knob.path:
        place = place.get(key) if isinstance(place, dict) else None
        if place is None:
            return knob.prior
    return float(place)
