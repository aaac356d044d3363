"""Workers without a process, for tests of what they answer and not of their being apart."""

import importlib
import json
from typing import Any, Self

from suanli.base.errors import SuanliError, TrialFailedError


class WorkerHere:
    """As `suanli.measure.isolation.Worker`: arguments and answers are JSON, failures its own."""

    pid = 0
    peak_bytes = 1 << 20

    def __init__(self, target: str, setup: dict[str, Any], **_: Any) -> None:
        module, _, name = target.partition(":")
        self._target = getattr(importlib.import_module(module), name)(**_as_json(setup))
        self.alive = True

    def call(self, method: str, *, timeout_s: float, **args: Any) -> Any:
        assert self.alive and timeout_s > 0
        try:
            return _as_json(getattr(self._target, method)(**_as_json(args)))
        except SuanliError:
            raise
        except Exception as error:
            raise TrialFailedError(f"{type(error).__name__}: {error}", kind="error") from None

    def pause(self) -> None:
        return None

    def resume(self) -> None:
        return None

    def close(self) -> None:
        self.alive = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))
