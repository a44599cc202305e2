"""The seconds of steps alone: neither evaluations nor compilations nor other runs' work count."""

import contextlib
import time

import jax.monitoring
import numpy as np
import pytest

from lora_jax.bank.together.side_by_side import DrivenRun, side_by_side
from lora_jax.training.clock import StepClock, StepTimes
from lora_jax.training.loop import Hooks, PeriodicMeasure, train, training_steps
from lora_jax.training.run.log import Recorder
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import State
from train.options.common import RunConfig

TOKENS = 60
COMPILE = "/jax/core/compile/backend_compile_duration"
TRACE = "/jax/core/compile/jaxpr_trace_duration"


@pytest.fixture
def world(monkeypatch):
    """Returns a function that lets seconds pass, on the only clock there is."""
    now = [100.0]

    def wait(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return wait


def metrics():
    names = ("loss", "count", "grad_norm", "lr", "skipped")
    return dict.fromkeys(names, np.float32(1.0)) | {"skipped": np.float32(0.0)}


def hooks(world, **others):
    """A run that is measured for a hundred seconds after two steps, and saved for seven."""

    def take(state):
        world(100.0)
        return {"loss": 1.0}

    measure = PeriodicMeasure(every=2, prefix="eval_", take=take)
    return Hooks(
        **{
            "batch": lambda number, state: {},
            "placed": lambda batch: batch,
            "tokens": lambda batch: TOKENS,
            "save": lambda state, owed: world(7.0),
            "rows": lambda number: "rows",
            "resume_hint": "",
            "measures": [measure],
            **others,
        }
    )


def state(step=0):
    return State({}, (), np.int32(step), None)


def run_config(log_every):
    return RunConfig(output="", log_every=log_every, save_every=5)


@pytest.mark.parametrize("log_every", [1, 3, 20])
def test_steps_alone_are_measured(world, log_every):
    """Steps of known length, with long evaluations, saves and compilations between them."""
    lengths = [0.5, 0.25, 0.25, 0.75, 0.25, 0.25, 0.25, 1.0, 0.25]
    log = Recorder(None)

    def step(state, base, batch):
        number = int(state.step)
        if number in (0, 4):  # a shape that comes for the first time
            world(30.0)
            jax.monitoring.record_event_duration_secs(TRACE, 10.0)  # within the next one
            jax.monitoring.record_event_duration_secs(COMPILE, 30.0)
        world(lengths[number])
        return state._replace(step=state.step + 1), metrics()

    stop = Stop()
    _, times = train(
        step, state(), {}, len(lengths), run_config(log_every), hooks(world), log, stop
    )
    assert times.median == 0.25
    if log_every == 1:  # else two steps may end together, as the host runs ahead
        assert times == StepTimes(median=0.25, low=0.25, high=0.5)
    lines = [line for line in log.lines if "loss" in line]
    assert lines[-1]["step"] == len(lengths)
    windows = np.split(lengths, [line["step"] for line in lines[:-1]])
    for line, seconds in zip(lines, windows, strict=True):
        assert line["tokens_per_s"] == pytest.approx(TOKENS * len(seconds) / sum(seconds), abs=0.1)


def test_runs_side_by_side_count_no_work_of_each_other(world):
    """A turn takes two seconds; one run is measured for long, the other is not, and ends later."""
    logs = {"measured": Recorder(None), "plain": Recorder(None)}
    done = dict.fromkeys(logs, 0)
    medians = {}
    clock = StepClock()

    def step(batches):
        world(2.0)
        for name in batches:
            done[name] += 1
        return {name: metrics() for name in batches}

    def running(name, steps, **others):
        def turns():
            run = hooks(world, **others)
            medians[name] = yield from training_steps(
                lambda: state(done[name]), steps, run_config(2), run, logs[name], Stop(), clock
            )
            with clock.paused():
                world(50.0)  # saves its adapter

        return DrivenRun(turns=turns(), batch=lambda number: {}, tokens=lambda batch: TOKENS)

    with clock:
        endings = side_by_side(
            step, {"measured": running("measured", 4), "plain": running("plain", 6, measures=())}
        )
    assert all(ending.error is None for ending in endings.values())
    assert {name: times.median for name, times in medians.items()} == dict.fromkeys(logs, 2.0)
    for log in logs.values():
        speeds = [line["tokens_per_s"] for line in log.lines if "loss" in line]
        assert speeds == [TOKENS / 2.0] * len(speeds) and speeds


def test_compilations_count_once_and_not_in_pauses_or_other_threads(world):
    clock, note = StepClock(), jax.monitoring.record_event_duration_secs
    with clock:
        world(30.0)
        note(TRACE, 5.0)
        world(1.0)
        note(COMPILE, 20.0)  # the five seconds are among them
        note("/jax/checkpoint/write", 9.0)
        assert clock.compile_seconds == 20.0
        world(4.0)
        note(COMPILE, 3.0)
        assert clock.compile_seconds == 23.0
        before = clock.now()
        with contextlib.suppress(ZeroDivisionError), clock.paused():
            world(60.0)
            note(COMPILE, 50.0)
            raise ZeroDivisionError
        assert (clock.now(), clock.compile_seconds) == (before, 23.0)
        world(2.0)
        assert clock.now() == before + 2.0
    world(9.0)
    note(COMPILE, 9.0)  # nobody listens any more
    assert clock.compile_seconds == 23.0


def test_a_step_during_which_the_next_one_compiles_has_no_length(world):
    """The host runs ahead: what the device does meanwhile is not seen."""
    log = Recorder(None)

    class Result:
        """Metrics whose device takes three seconds, once somebody waits for them."""

        def block_until_ready(self):
            world(3.0)
            return self

        def __float__(self):
            return 1.0

    def step(state, base, batch):
        if int(state.step) == 1:
            world(30.0)
            jax.monitoring.record_event_duration_secs(COMPILE, 30.0)
        return state._replace(step=state.step + 1), metrics() | {"loss": Result()}

    run = hooks(world, measures=())
    _, times = train(step, state(), {}, 3, run_config(3), run, log, Stop())
    assert times.median == 3.0
    (line,) = log.lines
    assert line["tokens_per_s"] == TOKENS / 3.0
