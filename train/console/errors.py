"""Errors that a user can fix, shown as one paragraph without a traceback."""

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lora_jax.buckets.copies import replace_copy_paths
from lora_jax.buckets.store import BucketError
from lora_jax.training.errors import Interrupted, TrainingError
from train.console.pipe import closed_pipe

BAD_INPUT = 2  # the exit code of argument parsers, too
_DISK_FULL_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_RIGHTS_CODES = (errno.EACCES, errno.EPERM, errno.EROFS)
_DISK_FULL_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "disk is full",
)
_QUOTED_PATH = re.compile(r"""(["'])(/(?:(?!\1).)+)\1""")


class UserError(TrainingError):
    """The error for a request that cannot be met. The message says what to do instead."""


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
        _print_and_exit(f"error: {error.said(flag)}", BAD_INPUT)
    except Interrupted as error:
        _print_and_exit(str(error), error.code)
    except KeyboardInterrupt:
        _print_and_exit("interrupted", 130)
    except Exception as error:
        problem = file_problem(error)
        if problem:
            _print_and_exit(f"error: {problem}", BAD_INPUT)
        raise


def file_problem(error: BaseException) -> str | None:
    """Returns a message if the file system or a bucket caused the error; else None.

    The causes are a full disk, a limit, missing rights, and whatever a bucket refuses.
    """
    for cause in (error, error.__cause__):
        if isinstance(cause, BucketError):
            return str(cause)
        lacks_rights = isinstance(cause, OSError) and cause.errno in _NO_RIGHTS_CODES
        if isinstance(cause, OSError) and lacks_rights and cause.filename is not None:
            return (
                f"{cause.filename} cannot be read or written ({cause.strerror}). Give this user "
                "the right to it, or use another folder: pass --output for a run's files, or set "
                "XDG_CACHE_HOME for all caches."
            )
    text = disk_full_text(error)
    if text is None:
        return None
    return (
        f"a file cannot be written ({_file_and_reason(text)}). Make room on the disk, or raise "
        "the quota or the limit on the size of files."
    )


def disk_full_text(error: BaseException) -> str | None:
    """Returns the text of a full-disk error among an error and its causes; None without one."""
    cause: BaseException | None = error
    while cause is not None:
        text = " ".join(str(cause).split())
        has_code = isinstance(cause, OSError) and cause.errno in _DISK_FULL_CODES
        if has_code or any(words in text for words in _DISK_FULL_TEXTS):
            return text or type(cause).__name__
        cause = cause.__cause__ or cause.__context__
    return None


def _file_and_reason(text: str) -> str:
    """Returns the last path in an error's text and the reason; only the text without a path."""
    paths = [match[2] for match in _QUOTED_PATH.finditer(text)]
    if not paths:
        return text
    for reason in _DISK_FULL_TEXTS:
        if reason in text:
            return f"{paths[-1]}: {reason}"
    return text


def flag(name: str, *value: Any) -> str:
    """Returns an option as on a command line: "--steps", "--steps 3", or "--resume" for True."""
    values = [str(item) for item in value if item is not True]
    return " ".join([f"--{name.replace('_', '-')}", *values])


def _print_and_exit(message: str, code: int) -> NoReturn:
    """Prints a message, and exits."""
    print(f"\n{replace_copy_paths(message)}", file=sys.stderr, flush=True)
    sys.exit(code)
