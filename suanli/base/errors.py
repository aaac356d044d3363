"""Errors that a person sees as one line, and the exit code they lead to."""

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1


class SuanliError(Exception):
    """A failure with a one-line reason and, where there is one, the next step.

    Attributes:
        exit_code: What the command returns to the shell.
        next_step: What the person can do about it, or "".
    """

    exit_code = EXIT_FAILED

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.next_step = next_step

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.next_step})" if self.next_step else message


class BadInputError(SuanliError):
    """What the person gave cannot be used: an unknown name, a wrong shape, a broken file."""

    exit_code = EXIT_BAD_INPUT


class CaptureError(BadInputError):
    """A model could not be captured as a graph; `operator` names where it stopped."""

    def __init__(self, message: str, *, operator: str = "", next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.operator = operator


class ArtefactError(BadInputError):
    """A saved artefact is damaged, incomplete or not from here."""


class UntrustedError(ArtefactError):
    """An artefact holds code that this user's keys do not vouch for."""


class MissingBackendError(SuanliError):
    """An optional package is absent; `install` is the command that brings it."""

    def __init__(self, what: str, install: str) -> None:
        super().__init__(f"{what} is not installed", next_step=install)
        self.install = install


class TrialFailedError(SuanliError):
    """An isolated piece of work crashed, hung or outgrew its memory.

    Attributes:
        kind: One of "crash", "timeout", "memory", "error".
    """

    def __init__(self, message: str, *, kind: str) -> None:
        super().__init__(message)
        self.kind = kind
