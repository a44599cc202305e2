"""A signal stops a run wherever it comes, and once."""

import gc
import os
import signal
import sys
import threading
import time

import pytest

from lora_jax.training.errors import Interrupted
from lora_jax.training.run.stop import Stop


def term(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(1000))  # handlers run between bytecodes


class Dropped:
    __del__ = term


def collect():
    gc.callbacks.append(term)
    try:
        gc.collect()
    finally:
        gc.callbacks.remove(term)


def forget():
    Dropped()


@pytest.mark.parametrize("moment", [collect, forget])
def test_a_signal_whose_exception_python_drops_comes_again(moment, capfd, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    stop = Stop()
    with pytest.raises(Interrupted, match="interrupted by SIGTERM") as raised, stop.listening():
        moment()  # raises nothing itself
        time.sleep(10)
    assert raised.value.code == 143 and not capfd.readouterr().err


def test_a_dropped_signal_is_still_the_first_one():
    stop = Stop()
    with pytest.raises(Interrupted), stop.listening():
        forget()
        with stop.deferred():
            deadline = time.monotonic() + 10
            while stop.signal is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert stop.signal == signal.SIGTERM  # and nothing was raised
            term()  # the second one


def test_other_dropped_exceptions_are_reported_as_before(monkeypatch):
    class Broken:
        def __del__(self):
            raise ValueError("broken")

    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: said.append(dropped.exc_type))
    with Stop().listening():
        Broken()
    Broken()
    assert said == [ValueError] * 2


def test_nothing_comes_again_once_the_run_has_ended():
    said = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: said.append(number))
    try:
        with Stop().listening():
            forget()
        time.sleep(0.2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not said


def test_a_signal_of_another_process_ends_what_is_dropped_and_nothing_else():
    stop, late = Stop(), threading.Event()
    hearing = threading.Timer(0.1, lambda: (stop.hear(signal.SIGTERM), late.set()))
    with stop.listening(), stop.deferred():
        hearing.start()
        late.wait(10)  # a step is over first
        assert stop.signal is None
        with pytest.raises(Interrupted, match="interrupted by SIGTERM"), stop.dropping():
            raise AssertionError("what begins later is not begun")
    assert stop.code == 143


def test_a_signal_of_another_process_ends_a_wait_and_ones_own_is_still_the_first():
    """As where a scheduler signals all processes at once."""
    stop = Stop()
    hearing = threading.Timer(0.2, stop.hear, (signal.SIGTERM,))
    with stop.listening(), stop.deferred():
        with pytest.raises(Interrupted) as raised, stop.dropping():
            hearing.start()
            threading.Event().wait(10)
        assert raised.value.code == 143
        term()
        stop.hear(signal.SIGTERM)
        with pytest.raises(Interrupted):
            term()  # the second one
