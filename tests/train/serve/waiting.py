"""Waits that end: a test that hangs fails, and says for what it waited."""

import contextlib
import signal
import time
import traceback
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)


def until(holds, what, seconds=120.0):
    """Waits until something holds; returns what `holds` returned.

    Args:
        holds: A function that is called again and again.
        what: It, in words, for the message of the failure.
        seconds: The longest wait.
    """
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"after {seconds:g} s it does not hold that {what}"
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def bounded(seconds):
    """Fails what runs inside, in the main thread, where it waits once the time is over.

    So are all waits for futures, threads, pipes and processes bounded, and those of clients that
    take no timeout. Where that is cleaned up, time begins anew.
    """

    def fail(number, frame):
        lines = traceback.extract_stack(frame)
        ours = [line for line in lines if line.filename.startswith(HERE)] or lines
        places = "".join(f"\n  {Path(one.filename).name}:{one.lineno} {one.line}" for one in ours)
        pytest.fail(f"it waits for more than {seconds:g} s at{places}")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
