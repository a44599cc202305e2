"""Handles a closed standard output, such as a pipe to `head`."""

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def closed_pipe() -> Iterator[None]:
    """Exits quietly with code 1 if the reader of standard output has closed it."""
    try:
        try:
            yield
        except SystemExit:
            _flush()
            raise
        _flush()
    except BrokenPipeError:
        if not _reader_is_gone():  # a connection broke, which is no output
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        sys.exit(1)


def _flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def _reader_is_gone() -> bool:
    """Returns True if standard output is a pipe without a reader."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # there is none, or it is no file: a notebook's
        return False
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(output, 0)
    return bool(poll.poll(0))
