"""Errors that a user can fix, shown as one paragraph without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lora_jax.training.errors import Interrupted, TrainingError

BAD_INPUT = 2  # the exit code of argument parsers, too


class UserError(TrainingError):
    """A request that cannot be met; the message says what to do instead."""


@contextmanager
def as_user_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Turns errors of these kinds into a UserError, with a prefix to the message."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{prefix}{error}") from error


@contextmanager
def reported() -> Iterator[None]:
    """Turns a `TrainingError` or an interruption into a message and the script's exit code."""
    try:
        yield
    except TrainingError as error:
        _leave(f"error: {error.said(flag)}", BAD_INPUT)
    except Interrupted as error:
        _leave(str(error), error.code)
    except KeyboardInterrupt:
        _leave("interrupted", 130)


def flag(name: str, *value: Any) -> str:
    """Returns an option as a command line has it: "--steps", "--steps 3", or "--resume" if set."""
    values = [str(one) for one in value if one is not True]
    return " ".join([f"--{name.replace('_', '-')}", *values])


def _leave(message: str, code: int) -> NoReturn:
    print(f"\n{message}", file=sys.stderr, flush=True)
    sys.exit(code)
