"""Starts scripts up to their training, or to the error that ends them."""

import pytest

from train.run.log import read_metrics


class Begun(BaseException):
    """Holds the adapted tree of a run that is about to train."""


def begun(script, *args):
    """Returns the adapted tree that a script begins to train; nothing is compiled for it."""

    def stop(run, params, key):
        raise Begun(params)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Begun) as caught:
        patch.setattr("train.stages.begin.begin_state", stop)
        script([str(arg) for arg in args])
    return caught.value.args[0]


def exit_code(run, *args):
    """Runs a script to its end; returns its exit code."""
    try:
        run([str(arg) for arg in args])
    except SystemExit as error:
        return error.code
    return 0


def lines_of(run):
    """The metrics of a run, without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in ("time", "tokens_per_s")}
        for line in read_metrics(run)
    ]


def files_of(folder):
    """The content and the time of the last change of each file in a folder, but for its lock."""
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def fails(capsys, run, *args):
    """Returns what a script says before it ends with the code for bad input."""
    with pytest.raises(SystemExit) as caught:
        run([str(arg) for arg in args])
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and "Traceback" not in said
    return said.removeprefix("error: ")
