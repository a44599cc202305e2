"""Starts scripts up to their training, or to the error that ends them."""

import pytest


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
