"""Reporters are told everything once: a recorder always, the packages where they are installed."""

import importlib
import io
import json
import threading
import time

import pytest
from rich.console import Console

from lora_jax.training.errors import Interrupted
from tests.train.run.test_log import reporting
from train.console.errors import UserError
from train.reporters import registry
from train.reporters.contract import Sample
from train.reporters.registry import TRACKERS, check_packages
from train.run.log import RunLog

SAMPLES = [Sample("1 + 1?", "2"), Sample("2 + 2?", "4")]


class Recorder:
    """Keeps what it is told, for each run by its number; fails where it is asked to."""

    runs = {}
    fails_at = None

    def __init__(self, start):
        if self.fails_at == "start":
            raise ConnectionError("no way there")
        self.run_id = start.run_id or f"run {len(self.runs)}"
        self.told = self.runs.setdefault(self.run_id, [])
        self.told.append(("start", start.name, dict(start.config)))

    def report(self, step, values, at):
        if self.fails_at == step:
            raise ConnectionError("no way there")
        assert threading.current_thread() is not threading.main_thread()
        self.told += [(step, name, value) for name, value in values.items()]

    def show(self, step, samples, at):
        self.told.append((step, "samples", samples))

    def close(self, how):
        self.told.append(("close", how))


@pytest.fixture
def recorder():
    Recorder.runs, Recorder.fails_at = {}, None
    return Recorder


def line(step, name="loss"):
    if name == "eval_loss":
        return {"step": step, name: 1 / step}
    return {"step": step, name: 1 / step, "lr": 0.1, "count": 5, "tokens_per_s": 7.0}


def run(folder, steps, *, first=0, reporters, error=None, warn=print, eval_at=(), owed=()):
    """One process of a run that logs steps, and ends by an error."""
    folder.mkdir(exist_ok=True)
    console = Console(file=io.StringIO(), force_terminal=False)
    with (
        reporting(folder, reporters, warn) as reports,
        RunLog(folder, console, first=first, last=9, owed=owed, reporting=reports) as log,
    ):
        for step in steps:
            if step > first:
                log.add(line(step))
            if step in eval_at:
                log.add(line(step, "eval_loss"))
                log.sampled(step, SAMPLES)
        if error is not None:
            raise error
    return console.file.getvalue()


def kill(folder):
    """Leaves the ledger as a kill does."""
    ledger = json.loads((folder / "reporters.json").read_text())
    for entry in ledger.values():
        entry |= {"reported": entry.pop("before", {}), "open": True}
    (folder / "reporters.json").write_text(json.dumps(ledger))


def of(told, name):
    return [step for step, what, *_ in told if what == name]


def test_all_that_the_record_has_is_reported_once(recorder, tmp_path):
    shown = run(tmp_path, [1, 2, 3], reporters={"fake": recorder}, eval_at=[2])
    ((run_id, told),) = recorder.runs.items()
    assert told[0] == ("start", tmp_path.name, {"rank": 4, "summary": "few parameters"})
    assert told[-1] == ("close", "finished")
    assert of(told, "loss") == of(told, "lr") == [1, 2, 3]
    assert of(told, "eval_loss") == of(told, "samples") == [2]
    assert (2, "loss", 0.5) in told and (2, "samples", SAMPLES) in told
    assert "step 2: sampled answers\n  > 1 + 1?\n    2\n" in shown
    kept = [json.loads(text) for text in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"], row["answer"]) for row in kept] == [
        (2, sample.prompt, sample.answer) for sample in SAMPLES
    ]


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_run_goes_on_with_the_same_run_and_has_no_step_twice(recorder, tmp_path, killed):
    reporters = {"fake": recorder}
    with pytest.raises(Interrupted):
        run(tmp_path, [1, 2, 3, 4], reporters=reporters, error=Interrupted("", 1), eval_at=[2, 4])
    if killed:
        kill(tmp_path)
    run(
        tmp_path,
        [2, 3, 4, 5],
        first=2,
        reporters=reporters,
        eval_at=[2, 4],
        owed=["eval_", "sample_"],
    )
    ((_, told),) = recorder.runs.items()
    assert [item[1] for item in told if item[0] == "close"] == ["stopped", "finished"]
    assert of(told, "loss") == [1, 2, 3, 4, 5] and of(told, "eval_loss") == [2, 4]
    assert of(told, "samples") == [2, 4]
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4


def test_one_that_joins_late_or_comes_back_is_told_all_it_missed(recorder, tmp_path):
    run(tmp_path, [1, 2], reporters={"fake": recorder})
    kill(tmp_path)
    run(tmp_path, [3, 4], first=2, reporters={})
    run(tmp_path, [5], first=4, reporters={"fake": recorder, "other": recorder}, eval_at=[5])
    first, second = recorder.runs.values()
    assert of(first, "loss") == of(second, "loss") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("at", ["start", 2])
def test_one_that_fails_warns_once_and_the_run_goes_on(recorder, tmp_path, at):
    recorder.fails_at = at
    said = []
    run(tmp_path, [1, 2, 3, 4], reporters={"fake": recorder}, warn=said.append)
    (warning,) = said
    assert warning.startswith("warning: --report-to fake failed, so it gets no more reports")
    assert "ConnectionError: no way there. Training continues" in warning
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    recorder.fails_at = None  # a resumed run tries again, from where it failed
    run(tmp_path, [5], first=4, reporters={"fake": recorder}, warn=said.append)
    told = [item for run_id in recorder.runs for item in recorder.runs[run_id]]
    assert of(told, "loss") == [1, 2, 3, 4, 5] and len(said) == 1


def test_one_that_hangs_holds_up_neither_steps_nor_end(recorder, tmp_path, monkeypatch):
    class Hanging(recorder):
        def report(self, step, values, at):
            event.wait(30)

    class Closed(recorder):
        def __init__(self, start):
            event.wait(30)

    event, said = threading.Event(), []
    for name in ("_OPEN_SECONDS", "_CLOSE_SECONDS"):
        monkeypatch.setattr(f"train.reporters.reporting.{name}", 0.1)
    began = time.monotonic()
    run(tmp_path, [1, 2], reporters={"slow": Hanging, "shut": Closed}, warn=said.append)
    assert time.monotonic() - began < 10
    event.set()
    shut, *busy = [text.removeprefix("warning: --report-to ") for text in said]
    assert shut == "shut did not start within 0 s. The run continues meanwhile."
    assert [text.partition(".")[0] for text in busy] == [
        f"{name} is still busy after 0 s" for name in ("slow", "shut")
    ]


def test_a_package_that_is_missing_or_broken_is_named_with_its_extra(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def broken(name):
        raise RuntimeError("built for another Python")

    monkeypatch.setattr(registry.importlib, "import_module", missing)
    with pytest.raises(
        UserError, match=r"wandb, which is missing. Install the extra wandb \(pip install"
    ):
        check_packages(["wandb"])
    monkeypatch.setattr(registry.importlib, "import_module", broken)
    with pytest.raises(UserError, match="mlflow, which cannot be imported .* another Python"):
        check_packages(["mlflow"])
    check_packages(["none"])


def two_processes(folder, name):
    """A run that is killed after step 4 and goes on after its checkpoint of step 2."""
    said = []
    how = {"reporters": {name: TRACKERS[name].reporter}, "warn": said.append, "eval_at": [2, 4]}
    with pytest.raises(Interrupted):
        run(folder, [1, 2, 3, 4], error=Interrupted("", 1), **how)
    run(folder, [3, 4, 5], first=2, **how)
    assert said == []
    return json.loads((folder / "reporters.json").read_text())[name]["run"]


LOSSES = [(step, pytest.approx(1 / step)) for step in range(1, 6)]
# Of the packages themselves.
WARNINGS = ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


@pytest.mark.slow
@pytest.mark.filterwarnings(*WARNINGS)
def test_mlflow_has_every_step_once(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # where MLflow puts files
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "an experiment")
    run_id = two_processes(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.params["rank"] == "4"
    experiment = client.get_experiment_by_name("an experiment")
    assert [one.info.run_id for one in client.search_runs([experiment.experiment_id])] == [run_id]
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "loss")] == LOSSES
    assert [m.step for m in client.get_metric_history(run_id, "eval_loss")] == [2, 4]
    assert len(client.list_artifacts(run_id, "samples")) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings(*WARNINGS)
def test_trackio_has_every_step_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    name = two_processes(tmp_path / "run", "trackio")
    (found,) = trackio.Api().runs("lora_jax")
    assert found.name == name and found.config["rank"] == 4
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    kept = storage.get_logs("lora_jax", name)
    assert [(row["step"], row["loss"]) for row in kept if "loss" in row] == LOSSES
    assert [row["step"] for row in kept if "samples" in row] == [2, 4]


@pytest.mark.slow
@pytest.mark.filterwarnings(*WARNINGS)
def test_wandb_takes_a_run_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id = two_processes(tmp_path / "run", "wandb")
    files = [*(tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/*.wandb")]
    assert len(files) == 2 and all(path.stat().st_size for path in files)
