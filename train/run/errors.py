"""What the user can put right is shown as one paragraph, without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

BAD_INPUT = 2  # the exit code that argument parsers use as well


class UserError(Exception):
    """Something that the user asked for cannot be done; the message says what to do instead."""


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, once there is nothing left to save. `code` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def as_user_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Errors of these kinds within are the user's to put right."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{prefix}{error}") from error


@contextmanager
def reported() -> Iterator[None]:
    """The boundary of a script: a `UserError` or an interruption ends it with its exit code."""
    try:
        yield
    except UserError as error:
        _leave(f"error: {error}", BAD_INPUT)
    except Interrupted as error:
        _leave(str(error), error.code)
    except KeyboardInterrupt:
        _leave("interrupted", 130)


def _leave(message: str, code: int) -> NoReturn:
    print(f"\n{message}", file=sys.stderr, flush=True)
    sys.exit(code)
