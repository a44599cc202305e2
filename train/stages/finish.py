"""Finishes runs: writes their reports, and measures what they have trained."""

import functools
from collections.abc import Mapping
from typing import Any

import lora_jax as lj
from lora_jax.adapt.activate import invocations_of
from lora_jax.training.losses import HELD_OUT, SCORE
from lora_jax.training.processes import write_json
from lora_jax.training.remat import total_bytes
from train.processes.memory import device_peak_bytes, peak_bytes
from train.reporters.files import read_json
from train.run.costs import print_adapter
from train.run.intrinsic import merge_trained
from train.run.log import newest_measurement, read_metrics
from train.run.output import ADAPTER, REPORT, folder_bytes
from train.run.report import RunReport
from train.run.task import EvaluatedModel
from train.stages.arrangement import Arrangement
from train.stages.types import (
    EndedTraining,
    FailedRun,
    FinishedRun,
    RunContext,
    RunEnding,
    SharedModel,
    TrainedRun,
    best_facts,
)

# Measured while steps are taken.
_STEP_MEASURES = (
    "median_step_seconds",
    "step_seconds_quartiles",
    "peak_bytes",
    "device_peak_bytes",
)


def measure_runs(
    runs: Mapping[str, EndedTraining],
    base: SharedModel,
    arrangement: Arrangement,
    context: RunContext,
) -> dict[str, RunEnding]:
    """Writes the reports of runs that ended, and evaluates their trained models.

    After a signal, nothing is evaluated, because a resumed run evaluates everything.

    Args:
      runs: the runs, by name.
      base: the model that they share.
      arrangement: the arrangement of the runs.
      context: receives the trained trees.
    """
    # A run that a signal stopped is "stopped", and one with an error is "failed".
    failed = [run for run in runs.values() if isinstance(run, FailedRun)]
    evaluates = not any(run.state == "stopped" for run in failed)
    endings: dict[str, RunEnding] = {}
    for name, run in runs.items():
        if isinstance(run, TrainedRun):
            work = functools.partial(
                measure_run, run, base, arrangement, context, n_runs=len(runs), evaluates=evaluates
            )
            endings[name] = arrangement.attempt(run.opened, work, run.best)
        else:
            endings[name] = run
        run.opened.place.send()
    return endings


def measure_run(
    run: TrainedRun,
    base: SharedModel,
    arrangement: Arrangement,
    context: RunContext,
    *,
    n_runs: int,
    evaluates: bool,
) -> FinishedRun:
    """Writes the report of a trained run, and evaluates the trained model.

    Args:
      run: the run.
      n_runs: the number of runs over the base.
      evaluates: whether the task scores it.
      base, arrangement, context: see `measure_runs`.
    """
    opened = run.opened
    report_path = opened.folder / REPORT
    arrangement.check_signal(run)
    report = make_report(run, base.n_bytes, n_runs).as_json()
    write_json(report_path, report)
    print_adapter(opened.console, opened.folder / ADAPTER, report)
    tree = run.tree.take()
    scores: dict[str, float] = {}
    if context.on_trained:
        context.on_trained(opened, tree, base.adapted_forward)
    if run.evaluation and evaluates:
        with arrangement.evaluating(opened.name):
            # A merged model would no longer be quantized, and an activated LoRA cannot be merged.
            can_merge = not base.outline.has_codes and not invocations_of(tree)
            forward = base.adapted_forward
            if can_merge:
                forward = base.model.apply
                tree = merge_trained(opened.space, tree)
            scores = run.evaluation.after(EvaluatedModel(base.model, tree, forward))
    if evaluates:
        write_json(report_path, report | {"scores": scores})
    return FinishedRun(opened=opened, report=report, scores=scores)


def make_report(run: TrainedRun, base_bytes: int, n_runs: int) -> RunReport:
    """Returns the report of a trained run.

    If this process took no step, the report keeps the measurements of the earlier process.

    Args:
      run: the run.
      base_bytes: bytes of the base in memory.
      n_runs: the number of runs over the base.
    """
    opened = run.opened
    times = run.step_times
    best = run.best
    metrics = read_metrics(opened.folder)
    step_measures: dict[str, Any] = {
        "median_step_seconds": None if times is None else times.median,
        "step_seconds_quartiles": None if times is None else [times.low, times.high],
        "peak_bytes": peak_bytes(),
        "device_peak_bytes": device_peak_bytes(opened.inputs.layout.mesh.local_devices),
    }
    earlier_report = read_json(opened.folder / REPORT)
    if times is None and earlier_report.get("last_step") == run.last_step:
        for name in _STEP_MEASURES:
            if name in earlier_report:
                step_measures[name] = earlier_report[name]
    compilation = run.compilation
    estimate = compilation.estimate if compilation else None
    return RunReport(
        summary=lj.summary(run.tree.content, in_training=True),
        steps=opened.inputs.steps,
        last_step=run.last_step,
        kept_step=best_facts(best).get("step", run.last_step),
        skipped_steps=[line["step"] for line in metrics if "skipped" in line],
        skip_reasons={line["step"]: line["reason"] for line in metrics if "reason" in line},
        **step_measures,
        adapter_bytes=folder_bytes(opened.folder / ADAPTER),
        best=best.about if best else None,
        ended_early=best.is_over if best else None,
        compile_seconds=compilation.seconds if compilation else None,
        further_compile_seconds=compilation.further_seconds if compilation else None,
        compiled_bytes=compilation.sizes if compilation else None,
        compiled_step_bytes=total_bytes(compilation.sizes) if compilation else None,
        estimated_step_seconds=estimate.seconds if estimate else None,
        side_by_side=None if compilation else n_runs,
        base_bytes=base_bytes,
    )


def result_of(ending: RunEnding) -> dict[str, Any]:
    """Returns the row of a run in the table of results."""
    opened = ending.opened
    lines = read_metrics(opened.folder)
    last_step = lines[-1]["step"] if lines else 0
    score: float | None = None
    adapter: str | None = None
    if isinstance(ending, FinishedRun):
        last_step = ending.report["last_step"]
        score = ending.score
        adapter = str(opened.folder / ADAPTER)
    # The values of the saved adapter, which is the best or the last one.
    kept_step = ending.best.get("step", last_step)
    loss = newest_measurement(lines, "loss", kept_step)
    held_out = newest_measurement(lines, f"{HELD_OUT}loss", kept_step)
    measured_score = newest_measurement(lines, f"{SCORE}{opened.task.score}", kept_step)
    return {
        "name": opened.name,
        "status": ending.state,
        "steps": last_step,
        "kept_step": kept_step,
        "loss": loss.value,
        "loss_step": loss.step,
        "held_out_loss": held_out.value,
        "held_out_step": held_out.step,
        "score": measured_score.value if score is None else score,
        "adapter": adapter,
        "error": ending.reason if isinstance(ending, FailedRun) else None,
    }
