"""A table of runs over one tiny model: each is what `train.sft` makes of its options alone."""

import csv
import dataclasses
import functools
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax import models
from lora_jax.bank.together.together import Together
from lora_jax.training.losses import token_loss
from tests.support import assert_close, assert_identical
from tests.train.scripts import exit_code, files_of, lines_of
from tests.train.tiny import tokenizer, write_jsonl, write_model, write_rows
from train.run.log import read_metrics
from train.run.output import OutputFolder
from train.sft import main
from train.stages import begin, finish

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SMALL = {"rank": 2, "targets": ["q_proj", "v_proj"]}
GOOD = {
    "one": {**SMALL, "dataset": "rows.jsonl", "lr": 3e-3, "steps": 6, "dropout": 0.1},
    # Of one kind with the first, and its batches have other lengths.
    "two": {**SMALL, "dataset": "few.jsonl", "lr": 1e-3, "steps": 4, "seed": 1, "dropout": 0.1}
    | {"eval_every": 2, "eval_questions": 1, "keep_best": "loss"},
    "three": {**SMALL, "dataset": "few.jsonl", "lr": 2e-3, "steps": 5, "schedule": "constant"}
    | {"batch_size": 2, "grad_accum": 2, "dropout": 0.0, "loss": "dft", "eval_every": 2}
    | {"eval_questions": 1},
}
BAD = {"bad": {**SMALL, "dataset": "bad.jsonl", "lr": 2e-3, "steps": 6}}
# Adam divides a gradient by its size: a large eps keeps rounding as small as it is.
LINE = ["--batch-size", "4", "--eps", "1e-4", "--save-every", "3"]


@functools.cache
def poisoned(name, **options):
    """The loss, infinite where a batch has the marked token."""
    (marked,) = tokenizer()("~")["input_ids"]
    loss = token_loss(name, **options)

    def sums(forward, params, batch, dropout_key=None):
        sums = loss(forward, params, batch, dropout_key)
        factor = jnp.where(jnp.any(batch["ids"] == marked), jnp.inf, 1)
        return sums._replace(total=sums.total * factor)

    return dataclasses.replace(loss, sums=sums)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model, three files of rows, and a table of runs, of which one diverges."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "few.jsonl", 14)
    bad = [{"prompt": f"{n}~" * (n + 1), "completion": "12345"} for n in range(9)]
    write_jsonl(folder / "bad.jsonl", bad)
    table = [{"name": name, **placed(folder, row)} for name, row in (GOOD | BAD).items()]
    (folder / "runs.json").write_text(json.dumps(table))
    return folder


def placed(folder, options):
    return {**options, "dataset": str(folder / options["dataset"])}


def many(folder, output, *args):
    """Runs the table; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.tasks.chats.token_loss", poisoned)
        line = ["--many", str(folder / "runs.json"), "--model", str(folder / "model"), *LINE]
        return exit_code(main, *line, "--output", output, *args)


def alone(folder, output, name, *args):
    line = ["--model", str(folder / "model"), *LINE, "--output", str(output), *args]
    for option, value in placed(folder, GOOD[name]).items():
        values = value if isinstance(value, list) else [value]
        line += [f"--{option.replace('_', '-')}", *map(str, values)]
    main(line)


def adapter_of(folder, run):
    _, params = models.from_pretrained(str(folder / "model"))
    return lj.split(lj.load_adapter(run / "adapter", params))[0]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        assert many(folder, output) == 1  # a run failed
    return output


@pytest.mark.parametrize("name", GOOD)
def test_each_run_is_what_it_is_alone(folder, whole, tmp_path, name):
    alone(folder, tmp_path, name)
    assert_close(adapter_of(folder, whole / name), adapter_of(folder, tmp_path), 1e-5)
    for mine, theirs in zip(lines_of(whole / name), lines_of(tmp_path), strict=True):
        assert mine.keys() == theirs.keys()
        assert_close(mine, theirs, 1e-5)
    left_out = {"log.txt"}
    names = {path.name for path in (whole / name).iterdir()} - left_out
    assert names == {path.name for path in tmp_path.iterdir()}
    ours, theirs = ((run / "config.yaml").read_text() for run in (whole / name, tmp_path))
    assert ours.replace(str(whole / name), str(tmp_path)) == theirs
    moved = [parts["b"] for parts in adapter_of(folder, whole / name).values()]  # from zero
    assert max(float(jnp.abs(b).max()) for b in moved) > 1e-3


def test_the_results_say_which_run_failed(whole):
    with (whole / "runs.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in rows.items()} == {
        **dict.fromkeys(GOOD, "done"),
        "bad": "failed",
    }
    for column in ("steps", "kept_step", "loss_step"):
        assert [rows[name][column] for name in GOOD] == ["6", "4", "5"], column
    two = rows["two"]
    (measured,) = [
        line["eval_loss"]
        for line in read_metrics(whole / "two")
        if "eval_loss" in line and line["step"] == int(two["held_out_step"])
    ]
    assert float(two["held_out_loss"]) == measured
    assert float(rows["two"]["held_out_loss"]) > 0 and rows["one"]["held_out_loss"] == ""
    why = (whole / "bad" / "error.txt").read_text()
    assert "steps in a row were skipped" in why and "row" in why
    assert rows["bad"]["error"].startswith("--max-skipped 3") and not rows["bad"]["adapter"]
    assert not (whole / "bad" / "adapter").exists()


def test_finished_runs_of_a_table_are_left_as_they_are(folder, whole, tmp_path, capsys):
    """The run that failed is tried again; the others' results are those of before."""
    output = tmp_path / "many"
    shutil.copytree(whole, output)
    before = {name: files_of(output / name) for name in GOOD}
    assert many(folder, output, "--resume") == 1
    said = capsys.readouterr().out
    assert all(f"{name}: finished\n" in said for name in GOOD)
    assert {name: files_of(output / name) for name in GOOD} == before
    rows = [(run / "runs.csv").read_text().replace(str(run), "") for run in (whole, output)]
    assert rows[0] == rows[1]


def interrupted(folder, output, monkeypatch, after):
    """Runs the table until a signal that comes during a step."""
    steps = []
    real = Together.step

    def step(self, batches):
        steps.append(batches)
        if len(steps) == after:
            signal.raise_signal(signal.SIGTERM)
        return real(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Together, "step", step)
        assert many(folder, output) == 143


def test_a_stopped_table_goes_on(folder, whole, tmp_path, monkeypatch, capsys):
    """Together, bit by bit; and a run of it alone."""
    interrupted(folder, tmp_path / "many", monkeypatch, after=2)
    assert "stopped 4 of 4 runs, each saved" in capsys.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path / "many" / "one")] == [1, 2]
    shutil.copytree(tmp_path / "many" / "one", tmp_path / "one")
    assert many(folder, tmp_path / "many") == 2
    assert "already contains a run" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "many" / "three")  # begins anew
    assert many(folder, tmp_path / "many", "--resume") == 1
    for name in GOOD:
        assert_identical(*(adapter_of(folder, run / name) for run in (whole, tmp_path / "many")))
        assert lines_of(tmp_path / "many" / name) == lines_of(whole / name)
    alone(folder, tmp_path / "one", "one", "--resume")
    assert "training continues after step 2" in capsys.readouterr().out
    assert_close(adapter_of(folder, tmp_path / "one"), adapter_of(folder, whole / "one"), 1e-5)


def test_a_run_that_fails_before_or_after_training_has_its_line(folder, tmp_path, monkeypatch):
    """The others go on, and the files of each are sent to its bucket."""
    stages = {"begin_state": begin, "make_report": finish}
    failing, sent = {"one": "begin_state", "two": "make_report"}, []

    def failing_at(stage):
        work = getattr(stages[stage], stage)

        def attempt(run, *args):
            opened = getattr(run, "opened", run)
            if failing.get(opened.name) == stage:
                raise OSError(f"no {stage}")
            return work(run, *args)

        return attempt

    for stage, module in stages.items():
        monkeypatch.setattr(module, stage, failing_at(stage))
    monkeypatch.setattr(OutputFolder, "send", lambda place, *_: sent.append(place.path.name))
    table = [{"name": name, **SMALL, "steps": 1} for name in ("one", "two", "three")]
    (tmp_path / "runs.json").write_text(json.dumps(table))
    line = ["--many", str(tmp_path / "runs.json"), "--model", str(folder / "model"), *LINE]
    line += ["--dataset", str(folder / "rows.jsonl")]
    assert exit_code(main, *line, "--output", tmp_path / "many") == 1
    with (tmp_path / "many" / "runs.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert [row["status"] for row in rows.values()] == ["failed", "failed", "done"]
    assert [bool(row["adapter"]) for row in rows.values()] == [False, False, True]
    for name, stage in failing.items():
        assert f"no {stage}" in rows[name]["error"]
        assert f"no {stage}" in (tmp_path / "many" / name / "error.txt").read_text()
    assert sent[-3:] == ["one", "two", "three"]
