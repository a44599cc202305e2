"""Starts scripts: up to their training, or as processes of their own."""

import sys

import pytest

_WITHOUT_TORCH = """
import runpy, sys
from tests.surroundings import hide_torch
hide_torch()
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def command(script, *args):
    """Returns the words that start `python -m script` with options, without torch."""
    return [sys.executable, "-c", _WITHOUT_TORCH, script, *map(str, args)]


class Begun(BaseException):
    """Holds the adapted tree of a run that is about to train."""


def begun(script, *args):
    """Returns the adapted tree that a script begins to train; nothing is compiled for it."""

    def stop(run, params, key, facts):
        raise Begun(params)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Begun) as caught:
        patch.setattr("train.begin.begin_run", stop)
        script([str(arg) for arg in args])
    return caught.value.args[0]


def fails(capsys, run, *args):
    """Returns what a script says before it ends with the code for bad input."""
    with pytest.raises(SystemExit) as caught:
        run([str(arg) for arg in args])
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and "Traceback" not in said
    return said.removeprefix("error: ")
