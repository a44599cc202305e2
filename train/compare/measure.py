"""Gathers the measures of a comparison: from its runs' folders, and from new timed runs."""

import dataclasses
import os
import platform
from collections.abc import Sequence

import jax

import lora_jax as lj
from lora_jax.hf.hub import stand_in
from lora_jax.training.errors import TrainingError
from lora_jax.training.losses import HELD_OUT, SCORE
from train.compare import costs
from train.compare.divergence import KL
from train.compare.options import IN_FULL, has_adapter
from train.compare.reporting import tables
from train.compare.result import (
    Comparison,
    ComparisonFacts,
    Forgetting,
    Latency,
    PlanResult,
    Point,
    RunResult,
    Status,
)
from train.compare.rungs import describe_rule
from train.compare.sweep import Sweep
from train.compare.trials import Trial
from train.console.errors import UserError, flag
from train.console.output import tell
from train.reporters.files import read_json
from train.run.costs import tree_bytes, versions
from train.run.log import doing, read_metrics
from train.run.output import ADAPTER, SCORES
from train.stages.begin import load_base
from train.stages.inputs import Inputs

COSTS = "costs"


def collect_measurements(
    sweep: Sweep, inputs: Inputs, command: str, text: str | None
) -> Comparison:
    """Collects the measurements of all runs, and measures the costs of the best arms.

    Args:
      sweep: the runs, each trained as far as it goes.
      inputs: inputs of one of the runs.
      command: the command line.
      text: the text outside the task, in words; None for none.
    """
    config = sweep.config
    console = sweep.console
    outline = inputs.read.outline
    # The options of an adapter's run, if there is one: over the base as it is.
    adapter_trials = [trial for trial in sweep.trials if has_adapter(trial.arm.method)]
    base_trial = adapter_trials[0] if adapter_trials else sweep.trials[0]
    with doing(console, f"reading the weights of {outline.name}"):
        model, base_params, forward = load_base(base_trial.config, inputs)
    base_outside: float | None = None
    if sweep.outside is not None:
        with doing(console, "measuring the base on text outside the task"):
            base_outside = sweep.outside(base_params, forward)
    base_bytes = tree_bytes(base_params)
    comparison = Comparison(
        facts=_collect_facts(sweep, inputs, base_trial, command, text, base_bytes),
        runs=tuple(_run_result(trial, sweep, base_outside) for trial in sweep.trials),
        rungs=sweep.record.rungs,
    )
    best_trials = _best_trials(comparison, sweep.trials)
    if config.costs and any(trial.arm.method in IN_FULL for trial in best_trials):
        with doing(console, "saving the base as a full model is saved, to count its bytes"):
            saved_bytes = costs.saved_base_bytes(base_params, sweep.folder / COSTS)
        facts = dataclasses.replace(comparison.facts, base_saved_bytes=saved_bytes)
        comparison = dataclasses.replace(comparison, facts=facts)
    latencies: list[Latency] = []
    for trial in best_trials:
        if config.costs and has_adapter(trial.arm.method):
            with doing(console, f"timing an answer with {trial.name}"):
                adapted_params = lj.load_adapter(trial.folder / ADAPTER, base_params)
                latency = costs.measure_answer_latency(
                    trial.arm, model, base_params, adapted_params, decodes=sweep.kind != "classify"
                )
                latencies.append(latency)
    del base_params, model
    if config.costs:
        runs = _add_costs(comparison.runs, best_trials, sweep)
        comparison = dataclasses.replace(comparison, runs=runs, latencies=tuple(latencies))
    if config.topology is not None:
        row_tokens = inputs.read.data.facts["sequence_length"]
        comparison = _add_plans(comparison, config.topology, best_trials, sweep, row_tokens)
    return comparison


def _collect_facts(
    sweep: Sweep,
    inputs: Inputs,
    base_trial: Trial,
    command: str,
    text: str | None,
    base_bytes: int,
) -> ComparisonFacts:
    """Returns the facts that all runs share.

    Args:
      sweep, inputs, command, text: see `collect_measurements`.
      base_trial: the run whose options the base is read with.
      base_bytes: bytes of the base's weights in memory.
    """
    trial = sweep.trials[0]
    # Runs on --demonstrations hold out no prompts of their own.
    question_trial = max(sweep.trials, key=lambda trial: trial.most_questions or 0)
    best_value = f"highest {trial.task.score}" if trial.by_score else "lowest held-out loss"
    dataset = base_trial.config.data.dataset
    baselines = [scores for scores in map(_baseline_scores, sweep.trials) if scores]
    return ComparisonFacts(
        command=command,
        script=f"train.{sweep.kind}",
        model=inputs.read.outline.name,
        dataset=dataset if isinstance(dataset, str) else " ".join(dataset),
        steps=max(trial.steps for trial in sweep.trials),
        loss=trial.task.loss(trial.config, inputs.layout).label,
        score=trial.task.score,
        base_bytes=base_bytes,
        weights=stand_in(inputs.read.outline.name),
        machine=_describe_devices(),
        date=sweep.record.date,
        versions=versions(),
        outside=text,
        rule=describe_rule(f"the {best_value}") if sweep.config.early_stopping else None,
        baselines=baselines[0] if baselines else {},
        by_score=trial.by_score,
        eval_questions=getattr(question_trial.config.run, "eval_questions", None),
        most_questions=question_trial.most_questions,
    )


def _baseline_scores(trial: Trial) -> dict[str, float]:
    """Returns the scores of the task's baselines; {} for a run without scores."""
    scores = read_json(trial.folder / SCORES)
    return trial.task.baselines(scores) if scores else {}


def _describe_devices() -> str:
    """Returns a description of the devices: "8 × TPU v5e" or "x86_64 CPU, 2 cores (Linux)"."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} × {devices[0].device_kind}"
    has_affinity = hasattr(os, "sched_getaffinity")
    n_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    plural = "" if n_cores == 1 else "s"
    return f"{platform.machine()} CPU, {n_cores} core{plural} ({platform.system()})"


def _run_result(trial: Trial, sweep: Sweep, base_outside: float | None) -> RunResult:
    """Returns the result of a run, which may have stopped early.

    Args:
      trial: the run.
      sweep: all runs.
      base_outside: the base's loss on text outside the task; None where it was not measured.
    """
    progress = sweep.record.progress(trial.name)
    lines = read_metrics(trial.folder)
    scores = read_json(trial.folder / SCORES)

    def points(metric: str) -> tuple[Point, ...]:
        return tuple(Point(line["step"], line[metric]) for line in lines if metric in line)

    held_out = points(f"{HELD_OUT}loss")
    status: Status = "waiting"
    if progress.error is not None:
        status = "failed"
    elif progress.finished:
        status = "done"
    elif sweep.is_over(trial):
        status = "stopped early"
    forgetting: Forgetting | None = None
    if base_outside is not None and progress.outside is not None:
        forgetting = Forgetting(before=base_outside, after=progress.outside)
    return RunResult(
        name=trial.name,
        arm=trial.arm,
        seed=trial.seed,
        status=status,
        error=progress.error,
        steps=lines[-1]["step"] if lines else 0,
        losses=points("loss"),
        held_out=held_out,
        held_out_loss=held_out[-1].value if held_out else None,
        score=progress.score,
        scores=points(trial.measured) if trial.by_score else (),
        divergences=points(f"{SCORE}{KL}"),
        score_error=trial.task.score_error(scores),
        question_scores=tuple(trial.task.question_scores(scores)),
        trained_parameters=trial.trained_parameters,
        saved_bytes=progress.saved_bytes,
        side_by_side=progress.side_by_side,
        seconds=progress.seconds or None,
        forgetting=forgetting,
        intruders=progress.intruders,
    )


def _best_trials(comparison: Comparison, trials: Sequence[Trial]) -> list[Trial]:
    """Returns the best run of the best arm of each method."""
    trial_of_name = {trial.name: trial for trial in trials}
    best_trials: list[Trial] = []
    for row in tables.best_of_each(tables.rows(comparison), lambda arm: arm.method):
        values: dict[str, float] = {}
        for run in row.runs:
            value = row.measure.value(run)
            if value is not None:
                values[run.name] = value
        best_of = max if row.measure.larger else min
        best_name = best_of(values, key=values.__getitem__)
        best_trials.append(trial_of_name[best_name])
    return best_trials


def _add_costs(
    runs: tuple[RunResult, ...], best_trials: list[Trial], sweep: Sweep
) -> tuple[RunResult, ...]:
    """Adds the memory and time of a step to the runs of the best arms."""
    for trial in best_trials:
        try:
            with doing(sweep.console, f"timing {costs.TIMED_STEPS} steps of {trial.name} alone"):
                cost = costs.measure_step_cost(trial, sweep.folder / COSTS, sweep.session)
        except TrainingError as error:
            tell(sweep.console, f"warning: {error.said(flag)}")
            continue
        runs = tuple(
            dataclasses.replace(run, **cost) if run.arm == trial.arm else run for run in runs
        )
    return runs


def _add_plans(
    comparison: Comparison, topology: str, best_trials: list[Trial], sweep: Sweep, row_tokens: int
) -> Comparison:
    """Adds plans of the best arms for another machine to a comparison."""
    plans: list[PlanResult] = []
    machine = topology
    price = sweep.config.price
    for trial in best_trials:
        try:
            with doing(sweep.console, f"planning {trial.name} for {topology}"):
                plan, machine = costs.plan_for_topology(trial, topology, price, row_tokens)
        except UserError as error:
            tell(sweep.console, f"warning: {error}")
            continue
        plans.append(plan)
    facts = dataclasses.replace(comparison.facts, planned_on=machine)
    return dataclasses.replace(comparison, facts=facts, planned=tuple(plans))
