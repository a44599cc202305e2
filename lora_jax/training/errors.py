"""Training errors that the user can correct."""

from collections.abc import Callable
from typing import Any

# Returns how a reader writes an option, from its name and perhaps its value.
OptionWriter = Callable[..., str]


def as_argument(name: str, *value: Any) -> str:
    """Returns an option as a Python argument: "steps", or "steps=3"."""
    return "=".join([name, *map(repr, value)])


class TrainingError(Exception):
    """Training cannot start or continue; the message says what to do instead.

    Attributes:
      said: returns the message for readers who write options otherwise than Python does. A script
        gives its options the names of the library's arguments.
    """

    def __init__(self, message: str | Callable[[OptionWriter], str]) -> None:
        self.said = message if callable(message) else lambda written: message
        super().__init__(self.said(as_argument))


class Diverged(TrainingError):
    """Too many consecutive steps had a loss or gradient that is not finite."""


class DamagedCheckpoint(TrainingError):
    """A checkpoint differs from what was saved."""


class Dropped(Exception):
    """A batch could not be made; the run stops before its step, and can resume there.

    Without an argument, as a signal came meanwhile; else as what failed that the argument says.
    """


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM arrived, and nothing needs saving. `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
