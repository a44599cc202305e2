"""Errors that the user can put right, shown as one paragraph without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lora_jax.training.errors import Interrupted, TrainingError

BAD_INPUT = 2  # the exit code that argument parsers use as well


class UserError(TrainingError):
    """Something that the user asked for cannot be done; the message says what to do instead."""


@contextmanager
def as_user_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Errors of these kinds within are the user's to put right."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{prefix}{error}") from error


@contextmanager
def reported() -> Iterator[None]:
    """The boundary of a script: a `TrainingError` or an interruption ends it with its exit code."""
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
