"""Runs a script as `python -m` does, in a process that ends by SIGKILL at a moment of its own.

    python tests/train/killed.py MODULE:FUNCTION NTH WHEN SCRIPT OPTIONS…

The moment is the NTH call of a function: "before", "after", or "in" it (soon after it begins).
"""

import functools
import os
import pkgutil
import runpy
import signal
import sys
import threading

SOON = 0.02  # seconds


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_at(where: str, nth: int, when: str) -> None:
    """Puts a function that kills this process in the place of another."""
    owner, _, name = where.replace(":", ".").rpartition(".")
    place, calls = pkgutil.resolve_name(owner), 0
    real = getattr(place, name)

    @functools.wraps(real)
    def deadly(*args, **options):
        nonlocal calls
        calls += 1
        if calls == nth and when == "before":
            kill()
        if calls == nth and when == "in":
            threading.Timer(SOON, kill).start()
        found = real(*args, **options)
        if calls == nth:
            kill()
        return found

    setattr(place, name, deadly)


if __name__ == "__main__":
    where, nth, when, script, *sys.argv[1:] = sys.argv[1:]
    end_at(where, int(nth), when)
    runpy.run_module(script, run_name="__main__", alter_sys=True)
