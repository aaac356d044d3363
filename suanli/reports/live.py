"""The live view of long work, on standard error."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live as Animation
from rich.text import Text

from suanli.base import units
from suanli.base.events import Event
from suanli.base.train_results import TrainProgress
from suanli.base.trial import Trial

STYLES = {"verified": "green", "rejected": "yellow", "failed": "red", "skipped": "dim"}
_FRAMES, _PLAIN_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "|/-\\"
_FRAMES_PER_S = 4  # the view must not take the time of what is measured beside it
_PROGRESS_EVERY_S = 10.0  # in a log, between two lines of a run that goes on
_SETTLED_S = 5.0  # in a log, a step that lasts less than this is not worth a line


class Live:
    """Shows events as they come: a line per trial and note, and the present step.

    On a terminal the step stands below with its seconds and goes when the next one comes. Where
    standard error is no terminal, a step gets a line only once it has lasted for five seconds, so
    that a log shows what takes long and little else.

    While it is shown, what Python prints goes to standard error as well: a person's own file and
    model may print, and standard output belongs to the answer.

    Args:
        quiet: Show nothing but the step on a terminal, which leaves no trace.
        console: Where to; standard error by default.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._step = _Step()
        self._progress_said = -_PROGRESS_EVERY_S
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._animation: Animation | None = None
        self._watch: threading.Thread | None = None
        self._prints = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if _animated(self._console):
            self._animation = Animation(
                _Line(self._step),
                console=self._console,
                refresh_per_second=_FRAMES_PER_S,
                transient=True,
                redirect_stdout=False,
            )
            self._animation.start()
        elif not self._quiet:
            self._watch = threading.Thread(target=self._watch_steps, daemon=True)
            self._watch.start()
        # after the animation, which puts lines of standard error above itself
        self._prints.enter_context(contextlib.redirect_stdout(sys.stderr))
        return self

    def __exit__(self, *_: object) -> None:
        self._prints.close()
        self._ended.set()
        if self._animation is not None:
            self._animation.stop()
        if self._watch is not None:
            self._watch.join()

    def event(self, event: Event) -> None:
        """Show one event."""
        with self._lock:
            self._step.take(event)
            if self._quiet:
                return
            if event.trial is not None:
                self._print(trial_line(event.trial, self._step.spent_s()))
            elif event.progress is not None:
                self._print_progress(event.progress)
            elif event.kind == "note":
                self._print(Text.assemble(("note: ", "yellow"), event.text))

    def _print_progress(self, progress: TrainProgress) -> None:
        """In a log a line now and then; on a terminal the step's own line shows it."""
        due = time.monotonic() - self._progress_said >= _PROGRESS_EVERY_S
        if self._animation is None and (due or progress.done >= 1.0):
            self._progress_said = time.monotonic()
            self._print(Text(f"{self._step.spent_s():4.0f} s  {progress_line(progress)}"))

    def _print(self, line: Text) -> None:
        """One line: cut at the edge of a terminal, whole in a log."""
        if self._animation is not None:
            line.truncate(self._console.width - 1, overflow="ellipsis")
        self._console.print(line, soft_wrap=True)

    def _watch_steps(self) -> None:
        while not self._ended.wait(0.5):
            with self._lock:
                step = self._step
                if step.text and not step.said and step.lasted_s() >= _SETTLED_S:
                    step.said = True
                    self._print(Text(step.line()))


class _Step:
    """What is being done now, and since when.

    A step may have parts: "measuring: this" and "measuring: that" are one step. A search says
    "trying <plan>" and then what the trial is doing, so until the trial is done the texts that
    follow are parts of it.
    """

    def __init__(self) -> None:
        self._since = self._told = time.monotonic()
        self._spent_s = 0.0
        self._budget_s: float | None = None
        self._whole, self._trying = "", False
        self.text, self.said = "starting", True

    def take(self, event: Event) -> None:
        """Go on to what an event says."""
        if event.spent_s is not None:
            self._spent_s, self._told = event.spent_s, time.monotonic()
        self._budget_s = event.budget_s or self._budget_s
        if event.progress is not None:
            self._whole = self.text = progress_line(event.progress)
            self.said = True  # the view prints these lines itself
        elif event.kind == "trial":
            self._trying = False
            self._begin("", "")
        elif event.kind == "step":
            starts = event.text.startswith("trying ")
            if self._trying and not starts:
                self.text = f"{self._whole}: {event.text}"
                return
            self._trying = starts
            self._begin(event.text if starts else event.text.partition(": ")[0], event.text)

    def _begin(self, whole: str, text: str) -> None:
        if whole != self._whole:
            self._since, self.said = time.monotonic(), not whole
        self._whole, self.text = whole, text

    def lasted_s(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._since

    def spent_s(self) -> float:
        """Seconds since the whole began."""
        return self._spent_s + time.monotonic() - self._told

    def line(self) -> str:
        """Clock and text."""
        total = f"/{self._budget_s:.0f}" if self._budget_s else ""
        return f"{self.spent_s():4.0f}{total} s  {self.text}"


class _Line:
    """The step as a line that fits, drawn anew with every frame."""

    def __init__(self, step: _Step) -> None:
        self._step = step

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        frames = _PLAIN_FRAMES if options.ascii_only else _FRAMES
        frame = frames[int(time.monotonic() * _FRAMES_PER_S) % len(frames)]
        line = Text.assemble((frame, "cyan"), " ", self._step.line())
        line.truncate(options.max_width - 1, overflow="ellipsis")
        yield line


def _animated(console: Console) -> bool:
    """Whether lines can be drawn over: colour that is forced upon a log is not enough."""
    isatty = getattr(console.file, "isatty", None)
    return bool(isatty and isatty()) and not console.is_dumb_terminal


def trial_line(trial: Trial, spent_s: float) -> Text:
    """One trial that is done: when, its status, its step, its plan, and why."""
    figure = units.milliseconds(trial.step_ms.p50) if trial.step_ms else ""
    line = Text.assemble(
        f"{spent_s:4.0f} s  ",
        (f"{trial.status:8}", STYLES[trial.status]),
        f" {figure:>8}  {trial.plan.title}",
    )
    if trial.baseline:
        line.append(", baseline")
    if trial.resumed:
        line.append(", from an earlier search", "dim")
    if trial.reason:
        line.append(f": {' '.join(trial.reason.split())}", "dim")
    return line


def progress_line(at: TrainProgress) -> str:
    """One line of a run that goes on: epoch, loss, quality, rate, share of the limit, time left."""
    parts = [f"epoch {at.epoch}/{at.epochs}", f"{at.done * 100:.0f} %", f"loss {at.loss:.4g}"]
    if at.quality is not None:
        parts.append(f"quality {at.quality:.4g}")
    parts.append(f"{units.rate(at.samples_per_s)} samples/s")
    if at.sol_fraction is not None:
        parts.append(f"{units.share(at.sol_fraction)} of SOL")
    if at.mfu is not None:
        parts.append(f"MFU {units.share(at.mfu)}")
    if at.left_s is not None and at.done < 1:
        parts.append(f"{_duration(at.left_s)} left")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
