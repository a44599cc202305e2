"""The best adapter and early stopping: by the record, and the same in a resumed run."""

import os
import shutil
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import training
from lora_jax.training.run.best import Best, Standing
from tests.support import array, assert_identical

# Orbax leaves coroutines behind where a run is broken off.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 5)).astype(np.float32)
Y = RNG.normal(size=(24, 3)).astype(np.float32)  # noise: the held-out loss falls, then rises
PARAMS = {"kernel": array(RNG.normal(size=(5, 3)))}
RULES = [lj.LoraRule(targets=["kernel"], rank=3, alpha=6)]
STEPS = 24


def model(params, x):
    return x @ params["kernel"]


def squares(forward, params, batch, dropout_key):
    error = jnp.sum((forward(params, batch["x"]) - batch["y"]) ** 2)
    return training.Sums(error, jnp.float32(batch["x"].shape[0]), {})


def tuned(folder, *, log=None, **options):
    options = {"steps": STEPS, "lr": 0.05, "schedule": "constant", "warmup": 1, **options}
    options = {"eval_every": 2, "save_every": 5, "keep_best": True, **options}
    data, held_out = {"x": X[:16], "y": Y[:16]}, {"x": X[16:], "y": Y[16:]}
    return training.finetune(
        model,
        PARAMS,
        data,
        RULES,
        loss=squares,
        held_out=held_out,
        folder=folder,
        log=log,
        **options,
    )


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """Runs with the same settings share their compiled step."""
    module = sys.modules["lora_jax.training.finetune"]  # whose name is the function's, too
    compile_step, kept = module.compile_step, {}

    def shared(ready, forward, loss):
        settings = str(ready.facts["settings"] | {"keep_best": None})
        if settings not in kept:
            kept[settings] = compile_step(ready, forward, loss)
        return kept[settings]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "compile_step", shared)
        yield


def measured(lines):
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def held_out_loss(tree):
    error = X[16:] @ np.asarray(lj.merge(tree)["kernel"]) - Y[16:]
    return np.sum(error**2) / 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without a break: (folder, tree, report)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *tuned(folder)


def test_the_best_is_the_least_of_the_record_and_its_adapter_measures_that(whole):
    folder, tree, report = whole
    losses = measured(report.metrics)
    step = min(losses, key=losses.get)
    assert 2 < step < STEPS - 4, "the loss has to fall and rise again"
    assert report.best == {"step": step, "eval_loss": losses[step]}
    assert [*(path.name for path in (folder / "best").iterdir())] == [str(step)]
    kept = lj.load_adapter(folder / "best" / str(step), PARAMS)
    assert_identical(lj.split(kept)[0], lj.split(tree)[0])
    assert_identical(lj.split(lj.load_adapter(report.adapter, PARAMS))[0], lj.split(tree)[0])
    assert held_out_loss(tree) == pytest.approx(losses[step], rel=1e-5)
    assert lj.adapter_info(folder / "best" / str(step)) == report.best
    last, _ = tuned(None, keep_best=False)
    assert not np.array_equal(last["kernel"].b, tree["kernel"].b)


@pytest.mark.slow
def test_of_an_optimiser_that_averages_the_average_is_kept(tmp_path):
    tree, report = tuned(tmp_path, optimizer="schedule-free", steps=8)
    step, loss = report.best["step"], report.best["eval_loss"]
    assert measured(report.metrics)[step] == loss
    kept = lj.load_adapter(tmp_path / "best" / str(step), PARAMS)
    assert_identical(lj.split(kept)[0], lj.split(tree)[0])
    assert held_out_loss(tree) == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_patience_ends_the_run_and_going_on_ends_it_again_or_later(whole, tmp_path):
    _, tree, report = whole
    step = report.best["step"]
    ended, early = tuned(tmp_path, patience=2)
    lines = [line["step"] for line in early.metrics]
    assert max(lines) == step + 4 and max(measured(early.metrics)) == step + 4
    assert_identical(ended, tree)
    assert (tmp_path / "checkpoints" / str(step + 4)).is_dir()
    again, nothing = tuned(tmp_path, patience=2, resume=True)
    assert_identical(again, tree)
    assert nothing.metrics == () and nothing.best == early.best
    longer, rest = tuned(tmp_path, patience=99, resume=True)
    assert_identical(longer, tree)
    assert {**measured(early.metrics), **measured(rest.metrics)} == measured(report.metrics)


class Killed(BaseException):
    pass


PATIENT = {"patience": 4, "log_every": 1}


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """Runs the same with patience; returns (folder, report)."""
    folder = tmp_path_factory.mktemp("patient")
    return folder, tuned(folder, **PATIENT)[1]


@pytest.mark.slow
@pytest.mark.parametrize("at", [4, 9, 16])
def test_a_run_killed_anywhere_comes_to_the_same_best(whole, patient, tmp_path, at):
    """After `at` steps: before a checkpoint, between a new best and its checkpoint, and later."""

    def kill(line):
        if line["step"] == at and "loss" in line:
            raise Killed

    with pytest.raises(Killed):
        tuned(tmp_path, log=kill, **PATIENT)
    tree, report = tuned(tmp_path, resume=True, **PATIENT)
    folder, expected = patient
    assert_identical(tree, whole[1])
    assert report.best == expected.best == whole[2].best
    assert max(measured(report.metrics)) == max(measured(expected.metrics))
    for name in ("best", "checkpoints"):
        here, there = ({path.name for path in (at / name).iterdir()} for at in (tmp_path, folder))
        assert here == there


@pytest.mark.slow
def test_a_signal_before_a_measurement_leaves_it_to_the_resumed_run(whole, tmp_path):
    def interrupt(line):
        if line["step"] == 5 and "loss" in line:
            os.kill(os.getpid(), signal.SIGINT)

    folder, options = tmp_path / "run", {"eval_every": 3, "log_every": 1}
    _, expected = tuned(tmp_path / "whole", **options)
    with pytest.raises(training.Interrupted, match="stopped after step 6"):
        tuned(folder, log=interrupt, **options)
    tree, report = tuned(folder, resume=True, **options)
    first = [line for line in report.metrics if line["step"] == 6]
    assert [*first[0]] == ["step", "eval_loss"] and len(first) == 1
    assert measured(report.metrics).items() <= measured(expected.metrics).items()
    assert report.best == expected.best


@pytest.mark.slow
def test_an_earlier_checkpoint_finds_what_was_the_best_there(whole, tmp_path):
    """As after a damaged checkpoint is deleted: the run goes on from the one before it."""
    _, expected = tuned(tmp_path / "a", steps=10)
    later = expected.best["step"]
    assert later > 5, "the best has to be newer than the checkpoint of step 5"
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "10")
    tree, report = tuned(tmp_path / "a", resume=True)
    assert_identical(tree, whole[1])
    assert report.best == whole[2].best


def test_what_is_not_known_any_more_is_refused(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "best")
    with pytest.raises(training.TrainingError, match="the best adapter .* is missing"):
        tuned(tmp_path / "run", steps=30, resume=True)
    tuned(tmp_path / "plain", steps=5, keep_best=False)
    with pytest.raises(training.TrainingError, match="keep_best was False and is now True"):
        tuned(tmp_path / "plain", resume=True)
    best = Best(tmp_path / "best", "eval_loss")
    with pytest.raises(training.TrainingError, match="went on for 5 steps without it"):
        best.go_on_from(5, None)
    with pytest.raises(training.TrainingError, match="by score_accuracy, not by eval_loss"):
        best.go_on_from(5, {**best.as_json(), "metric": "score_accuracy"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2, "keep_best": False}, "patience=2 .* Add keep_best=True"),
        ({"patience": 0}, "patience=0 is out of range. Pass a number of at least 1"),
        ({"folder": None}, "saves adapters in the run's folder"),
    ],
)
def test_bad_input(options, message, tmp_path):
    with pytest.raises(training.TrainingError, match=message):
        tuned(**{"folder": tmp_path, **options})


def test_of_equal_ones_the_first_is_the_best_and_none_is_better_than_a_number():
    standing = Standing()
    for step, value in enumerate([float("nan"), 2.0, 2.0, float("nan"), 3.0], start=1):
        standing = standing.after(step, value, goal="min")
    assert standing == Standing(2.0, 2, 3)
    assert standing.after(6, 3.0, goal="max") == Standing(3.0, 6, 0)


def test_rotation_keeps_what_each_checkpoint_needs(tmp_path):
    best = Best(tmp_path / "best", "eval_loss")
    for step in (3, 7, 8, 12):
        (tmp_path / "best" / str(step)).mkdir(parents=True)
    (tmp_path / "best" / ".12.partial").mkdir()
    best.standing = Standing(1.0, 12)
    best.keep_for([5, 10])
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["12", "3", "8"]
    best.go_on_from(10, {"metric": "eval_loss", "value": 2.0, "step": 8, "waited": 1})
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["3", "8"]
    assert best.standing == Standing(2.0, 8, 1)
