"""What a search found so far, on disk: Ctrl-C, a crash or a short budget lose nothing of it."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from suanli.base import codec
from suanli.base.errors import SuanliError
from suanli.base.files import cache_dir
from suanli.kernels.tuning import TuneTrial, trial_key


class SearchLog:
    """Trials of one search, a line of JSON each, written as they come.

    A line that is damaged, as the last one of a killed process, counts as absent. Where the file
    cannot be written the search goes on without.

    Args:
        kernel: The kernel's name.
        facts: All that decides what a trial is worth: source, shape, dtype, device, compiler. A
            search with other facts has another file.
    """

    def __init__(self, kernel: str, facts: Mapping[str, object]) -> None:
        text = json.dumps({"kernel": kernel, **facts}, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.path: Path = cache_dir() / "kernels" / f"search-{kernel}-{digest}.jsonl"

    def known(self) -> dict[str, TuneTrial]:
        """The trials that stand there; of one configuration the last one."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        found: dict[str, TuneTrial] = {}
        for line in lines:
            with contextlib.suppress(SuanliError, ValueError):
                trial = codec.from_json(TuneTrial, json.loads(line))
                found[trial_key(trial.config)] = trial
        return found

    def add(self, trial: TuneTrial) -> None:
        """Append one."""
        line = json.dumps(codec.to_json(trial), allow_nan=False)
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def done(self) -> None:
        """Remove the file."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
