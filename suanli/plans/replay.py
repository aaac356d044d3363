"""Recorded trials in place of a machine: the same search again, with another budget or order."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from suanli.base import codec
from suanli.base.errors import BadInputError, TrialFailedError
from suanli.base.plan import Plan
from suanli.base.trial import Trial


class ReplayEvaluator:
    """An `evaluate` for the search that answers from a recording, with a clock of its own.

    Each answer moves `clock` by the seconds that the recorded trial took, so a budget means what it
    meant on the machine. Hand both in: `search(plans, replay, clock=replay.clock, …)`.

    Attributes:
        asked: Keys of the plans that were asked for, in order.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        """Take in a recording.

        Args:
            trials: Trials as they were recorded; skipped ones were never run and are left out.
        """
        run = [t for t in trials if t.status != "skipped"]
        self._trials = {_as_asked(t.plan).key: t for t in run} | {t.plan.key: t for t in run}
        self._now_s = 0.0
        self.asked: list[str] = []

    @classmethod
    def from_file(cls, path: Path) -> "ReplayEvaluator":
        """Read a recording: the JSON of `suanli optimize --json`, a list of trials, or a store.

        Raises:
            BadInputError: The file cannot be read, or holds no trials.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInputError(f"cannot read {path.name}: {error}") from None
        return cls([codec.from_json(Trial, item) for item in _items(text, path.name)])

    def clock(self) -> float:
        """Seconds that the replayed trials took so far."""
        return self._now_s

    def __call__(self, plan: Plan, limit_s: float) -> Trial:
        """Give the recorded trial of a plan.

        Raises:
            BadInputError: The plan was never tried in the recording.
            TrialFailedError: It took longer than `limit_s`.
        """
        self.asked.append(plan.key)
        trial = self._trials.get(plan.key)
        if trial is None:
            raise BadInputError(f"{plan.title} is not in the recording")
        self._now_s += min(trial.seconds_spent, limit_s)
        if trial.seconds_spent > limit_s:
            raise TrialFailedError(f"not done after {limit_s:.3g} s", kind="timeout")
        return trial


def _as_asked(plan: Plan) -> Plan:
    """The plan before the build filled in the operators that stay in a higher precision."""
    if plan.quantization is None:
        return plan.with_(float_operators=())
    return plan.with_(float_operators=(), quantization=replace(plan.quantization, keep=()))


def _items(text: str, name: str) -> list[Any]:
    """The trials in one of the three shapes, as parsed JSON."""
    try:
        try:
            data = json.loads(text)
        except ValueError:
            data = [json.loads(line) for line in text.splitlines() if line.strip()]
        if isinstance(data, dict):
            data = data.get("trials", [data])
        return [item.get("trial", item) for item in data]
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise BadInputError(f"{name} holds no trials") from None
