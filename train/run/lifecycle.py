"""The life of a run in its folder: how it begins, its log, and what is kept and reported of it."""

import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from rich.console import Console

import lora_jax as lj
from lora_jax import subspace
from lora_jax.training.clock import StepTimes
from lora_jax.training.data.order import Batches
from lora_jax.training.layout import Layout
from lora_jax.training.losses import HELD_OUT, SCORE, Loss
from lora_jax.training.optimizer import takes_from_base
from lora_jax.training.processes import is_first, wait_for_all
from lora_jax.training.ready import TrainingStart, make_start, resume_start
from lora_jax.training.run.best import BEST, Best
from lora_jax.training.run.checkpoints import Checkpoints
from lora_jax.training.run.stop import Stop
from train.adapters.source import find_adapter
from train.console.errors import as_user_errors, flag
from train.console.output import tell
from train.console.program import program
from train.options.common import Options
from train.options.optim import make_optimizer, make_schedule, optimizer_line
from train.processes.memory import peak_bytes
from train.reporters.files import SAMPLES, read_json, read_lines
from train.reporters.registry import trackers
from train.reporters.reporting import Reporting
from train.run import output
from train.run.intrinsic import space_of
from train.run.log import QuietLog, RunLog, draw_curve, draw_progress, read_metrics
from train.run.pretrained import ModelInfo
from train.run.report import print_best, versions
from train.run.rules import rules
from train.settings.files import effective_options

# Measured while steps are taken.
_OF_STEPS = ("median_step_seconds", "step_seconds_quartiles", "peak_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Holds the options, folder and data of a run."""

    script: str  # "train.sft"
    config: Options
    place: output.OutputFolder
    console: Console
    stop: Stop
    feed: Batches
    steps: int
    last: int  # the step to end or to pause after
    rate: float  # the highest learning rate
    layout: Layout
    about: dict[str, Any]  # what the saved adapter says of its base
    hint: str  # tells an interrupted user how to go on
    score: str | None = None  # the name of the task's score
    watched: Mapping[str, str] = dataclasses.field(default_factory=dict)  # see `Task`

    @property
    def folder(self) -> Path:
        """The folder of its files; of one in a bucket, the working copy."""
        return self.place.path

    @property
    def pauses(self) -> bool:
        """True if it is saved before its last step, to go on later."""
        return self.last < self.steps


def adapt_base(
    config: Options, outline: ModelInfo, plain: Any, folder: Path, key: jax.Array
) -> Any:
    """Returns the parameters with --init-adapter's adapter, a resumed run's first, or a new one.

    With --intrinsic, the numbers of the subspace stand beside them.
    """
    if (space := space_of(config, plain)) is not None:
        return subspace.tree_of(space, plain)
    mismatch = config.adapter.allow_base_mismatch
    if config.adapter.init_adapter is not None:
        source = find_adapter(config.adapter.init_adapter, "--init-adapter")
        return source.load(outline, plain, outline.name, allow_base_mismatch=mismatch)
    with as_user_errors(ValueError):
        if config.run.resume and (folder / output.START).exists():
            return lj.load_adapter(folder / output.START, plain, allow_base_mismatch=mismatch)
        chosen = rules(config.adapter, outline)
        return lj.lorafy(plain, chosen, key=key, kinds=outline.kinds)


def begin_run(run: Run, params: Any, key: jax.Array, facts: dict[str, Any]) -> TrainingStart:
    """Returns the state to train from, new or resumed, and writes the run's configuration.

    Args:
      run: its options, data and folder.
      params: the adapted tree.
      key: random key of dropout.
      facts: facts about the examples, for facts.json.

    Raises:
      TrainingError: the checkpoint in the folder belongs to another run.
    """
    optim = run.config.optim
    summary = lj.summary(params, in_training=True)
    params = run.layout.placed(params)
    tell(run.console, summary, optimizer_line(optim, params))
    schedule = make_schedule(optim, run.rate, run.steps)
    ready = make_start(
        params,
        run.feed,
        layout=run.layout,
        optimizer=make_optimizer(optim, schedule, params),
        schedule=schedule,
        key=key,
        checkpoints=Checkpoints(
            run.folder / output.CHECKPOINTS,
            run.config.run.keep,
            before_record=run.place.send,
            notice=functools.partial(tell, run.console),
        ),
        best=_best(run),
        noise=optim.neftune,
    )
    if space := run.about.get(subspace.FACTS):
        ready = dataclasses.replace(ready, facts=ready.facts | {"settings": {"subspace": space}})
    if run.config.run.resume:
        ready = resume_start(ready, run.steps)
        done = int(ready.state.step)
        text = f"going on after step {done}" if done else "no checkpoint yet: beginning at step 0"
        tell(run.console, text, *_moved(run, schedule, done))
    # Of packed rows, an example of the feed is a sequence of several.
    n_rows = facts.get("rows", run.feed.n_examples)
    resolved = {"steps": run.steps, "examples": n_rows, "lr": run.rate}
    facts = {"resolved": resolved, **facts, "summary": summary, "versions": versions()}
    wait_for_all("the options of all processes are checked")
    if is_first():
        output.begin(run.place, run.config, run.script, facts)
    else:
        output.clear_copy(run.folder, run.config)
    wait_for_all("the run has begun")
    if takes_from_base(params) and not (run.folder / output.START).exists():
        # So that --resume decomposes nothing again.
        lj.save_adapter(run.folder / output.START, params, about=run.about)
    return ready


def _moved(run: Run, schedule: optax.Schedule, done: int) -> tuple[str, ...]:
    """Returns a line of warning if a new number of steps changes the learning rate from here on."""
    began = read_json(run.folder / output.FACTS).get("resolved", {})
    optim = run.config.optim
    if not done or not {"steps", "lr"} <= began.keys():
        return ()
    was = make_schedule(optim, began["lr"], began["steps"])
    here, there = float(was(done)), float(schedule(done))
    if began["steps"] == run.steps or math.isclose(here, there, rel_tol=1e-6):
        return ()
    return (
        f"warning: the run began with {began['steps']} steps and now has {run.steps}, so its "
        f"{optim.schedule} schedule is another one: the learning rate goes on at {there:.2e}, not "
        f"at {here:.2e}. To go on without this jump, give {flag('steps', began['steps'])}; for a "
        "length that may change, begin a run with --schedule constant or wsd",
    )


def _best(run: Run) -> Best | None:
    """Returns the keeper of the best adapter; None without --keep-best."""
    asked = run.config.run
    if asked.keep_best is None:
        return None
    is_loss = asked.keep_best == "loss"
    return Best(
        run.folder / BEST,
        f"{HELD_OUT}loss" if is_loss else f"{SCORE}{run.score}",
        goal="min" if is_loss else "max",
        patience=asked.patience,
        about=run.about,
    )


@contextlib.contextmanager
def open_run_log(run: Run, ready: TrainingStart, done: int) -> Iterator[RunLog | QuietLog]:
    """Opens the reporters of --report-to and yields the run's log, which the loop opens.

    Args:
      run: its options, data and folder.
      ready: the state that it begins with.
      done: the number of steps before.
    """
    if not is_first():
        yield QuietLog()
        return
    facts = read_json(run.folder / output.FACTS)
    reporting = Reporting(
        run.folder,
        {name: tracker.reporter for name, tracker in trackers(run.config.run.report_to).items()},
        config=effective_options(run.config) | {"summary": facts.get("summary")},
        project=run.config.run.report_project,
        lines=read_metrics(run.folder),
        samples=read_lines(run.folder / SAMPLES),
        warn=functools.partial(tell, run.console),
    )
    with reporting:
        yield RunLog(
            run.folder,
            run.console,
            first=done,
            last=run.steps,
            owed=ready.owed,
            reporting=reporting,
            watched=run.watched,
        )


def keep_adapter(run: Run, ready: TrainingStart, trained: Any) -> None:
    """Saves the adapter of a run that is over."""
    best = {} if ready.best is None else ready.best.about
    lj.save_adapter(run.folder / output.ADAPTER, trained, about=run.about | best, overwrite=True)


def make_report(
    run: Run,
    ready: TrainingStart,
    trained: Any,
    loss: Loss,
    step_times: StepTimes | None,
    last_step: int,
) -> dict[str, Any]:
    """Draws the curve and prints the best; returns the report, but for the compiled step.

    A process that took no step keeps what the one before it measured of its steps.
    """
    metrics = read_metrics(run.folder)
    if is_first():
        draw_curve(run.folder, metrics, loss.label)
        if drawn := draw_progress(run.folder, metrics, run.watched):
            tell(run.console, drawn)
    report = {
        "summary": lj.summary(trained, in_training=True),
        "steps": run.steps,
        "last_step": last_step,
        "kept_step": (ready.best.about if ready.best else {}).get("step", last_step),
        "skipped_steps": [line["step"] for line in metrics if "skipped" in line],
        "skip_reasons": {line["step"]: line["reason"] for line in metrics if "reason" in line},
        "median_step_seconds": None if step_times is None else step_times.median,
        "step_seconds_quartiles": None if step_times is None else [step_times.low, step_times.high],
        "peak_bytes": peak_bytes(),
        "adapter_bytes": output.folder_bytes(run.folder / output.ADAPTER),
    }
    if ready.best is not None:
        print_best(run.console, ready.best, run.config.run.patience)
        report |= {"best": ready.best.about, "ended_early": ready.best.is_over}
    earlier = read_json(run.folder / output.REPORT)
    if step_times is None and earlier.get("last_step") == last_step:
        report |= {name: earlier[name] for name in _OF_STEPS if name in earlier}
    return report


def is_finished(run: Run) -> bool:
    """Returns True for a resumed run that is over, if its options ask for nothing longer.

    Its report and scores are written, and its newest checkpoint is whole and of these data. All
    processes have to call this.
    """
    options, adapter = run.config.run, run.folder / output.ADAPTER
    if run.pauses or not options.resume or not adapter.exists():
        return False
    report = read_json(run.folder / output.REPORT)
    if "scores" not in report or not report["last_step"] <= run.steps <= report["steps"]:
        return False
    checkpoints = Checkpoints(run.folder / output.CHECKPOINTS, options.keep)
    is_last = checkpoints.steps()[-1:] == [report["last_step"]]
    saved = checkpoints.run_of_newest() if is_last else None
    checkpoints.close()
    if saved is None or saved["data"] != run.feed.digest() or saved.get("owed"):
        return False
    waited = saved.get("best", {}).get("waited", 0)
    is_over = options.patience is not None and waited >= options.patience
    return is_over or report["last_step"] == run.steps


def resume_hint(script: str) -> str:
    """Returns the command line of this call, with --resume, in a sentence."""
    options = [arg for arg in sys.argv[1:] if arg not in ("--overwrite", "--resume")]
    return f"Go on with: {program(script, *options, '--resume')}"
