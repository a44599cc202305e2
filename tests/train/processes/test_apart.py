"""A function in a process of its own: its result, its error, and its crash."""

import os

import pytest

from train.processes.apart import ProcessCrash, run_apart


def test_the_result_and_the_error_come_back():
    assert run_apart(divmod, 17, 5) == (3, 2)
    assert run_apart(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        run_apart(divmod, 1, 0)


def test_a_crash_ends_the_other_process_alone():
    with pytest.raises(ProcessCrash, match="terminated abruptly"):
        run_apart(os.abort)
