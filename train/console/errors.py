"""Errors that a user can fix, shown as one paragraph without a traceback."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lora_jax.buckets.copies import shown
from lora_jax.buckets.store import BucketError
from lora_jax.training.errors import Interrupted, TrainingError
from train.console.pipe import closed_pipe

BAD_INPUT = 2  # the exit code of argument parsers, too
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large", "disk is full")
_QUOTED_PATH = re.compile(r"""(["'])(/(?:(?!\1).)+)\1""")


class UserError(TrainingError):
    """A request that cannot be met; the message says what to do instead."""


def read_user_file(path: str | Path, problem: str) -> str:
    """Returns the text of a user's file.

    Raises:
      UserError: the file cannot be read, or is not UTF-8; the message begins with the problem.
    """
    with as_user_errors(OSError, UnicodeDecodeError, prefix=problem):
        return Path(path).expanduser().read_text(encoding="utf-8")


@contextmanager
def as_user_errors(*kinds: type[Exception], prefix: str = "", suffix: str = "") -> Iterator[None]:
    """Turns errors of these kinds into a UserError, with a prefix and a suffix to the message."""
    try:
        yield
    except kinds as error:
        message = error.said(flag) if isinstance(error, TrainingError) else error
        raise UserError(f"{prefix}{message}{suffix}") from error


@contextmanager
def reported() -> Iterator[None]:
    """Turns a `TrainingError` or an interruption into a message and the script's exit code.

    It also ends the script quietly where the reader of standard output has closed it.
    """
    try:
        with closed_pipe():
            yield
    except TrainingError as error:
        _leave(f"error: {error.said(flag)}", BAD_INPUT)
    except Interrupted as error:
        _leave(str(error), error.code)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except Exception as error:
        if problem := file_problem(error):
            _leave(f"error: {problem}", BAD_INPUT)
        raise


def file_problem(error: BaseException) -> str | None:
    """Returns a message if the file system or a bucket caused the error; else None.

    The causes are a full disk, a limit, missing rights, and whatever a bucket refuses.
    """
    for e in (error, error.__cause__):
        if isinstance(e, BucketError):
            return str(e)
        if isinstance(e, OSError) and e.errno in _NO_RIGHTS and e.filename is not None:
            return (
                f"{e.filename} cannot be read or written ({e.strerror}): give this user the "
                "right to it, or name another place: --output for what a run writes, the variable "
                "XDG_CACHE_HOME for all caches"
            )
    if text := no_room(error):
        return (
            f"a file cannot be written ({_file_and_reason(text)}): make room on the disk, or "
            "raise the limit on the size of files or the quota"
        )
    return None


def no_room(error: BaseException) -> str | None:
    """Returns the text of the error, of those that caused one, that a full disk caused, or None."""
    seen: BaseException | None = error
    while seen is not None:
        text = " ".join(str(seen).split())
        is_full = isinstance(seen, OSError) and seen.errno in _FULL
        if is_full or any(word in text for word in _FULL_WORDS):
            return text or type(seen).__name__
        seen = seen.__cause__ or seen.__context__
    return None


def _file_and_reason(text: str) -> str:
    """Returns the last path in an error's text and the reason; the text, where it has no path."""
    reason = next((words for words in _FULL_WORDS if words in text), None)
    paths = [match[2] for match in _QUOTED_PATH.finditer(text)]
    return f"{paths[-1]}: {reason}" if paths and reason else text


def flag(name: str, *value: Any) -> str:
    """Returns an option as a command line has it: "--steps", "--steps 3", or "--resume" if set."""
    values = [str(item) for item in value if item is not True]
    return " ".join([f"--{name.replace('_', '-')}", *values])


def _leave(message: str, code: int) -> NoReturn:
    print(f"\n{shown(message)}", file=sys.stderr, flush=True)
    sys.exit(code)
