"""Gathers the measures of a comparison: from the folders of its runs, and of the best arms anew."""

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
from train.compare.rungs import rule
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


def collect(sweep: Sweep, inputs: Inputs, command: str, text: str | None) -> Comparison:
    """Returns all measurements; takes those that are left for the end.

    Args:
      sweep: the runs, each trained as far as it goes.
      inputs: inputs of one of the runs.
      command: the command line.
      text: the text outside the task, in words; None for none.
    """
    asked, console, outline = sweep.asked, sweep.console, inputs.read.outline
    first = sweep.trials[0]
    best_value = f"highest {first.task.score}" if first.by_score else "lowest held-out loss"
    # Runs on --demonstrations hold out no prompts of their own.
    rewarded = max(sweep.trials, key=lambda trial: trial.most_questions or 0)
    # The options of an adapter's run, if there is one: over the base as it is.
    config = min(sweep.trials, key=lambda trial: not has_adapter(trial.arm.method)).config
    with doing(console, f"reading the weights of {outline.name}"):
        model, plain, forward = load_base(config, inputs)
    before = None
    if sweep.outside is not None:
        with doing(console, "measuring the base on text outside the task"):
            before = sweep.outside(plain, forward)
    given = config.data.dataset
    comparison = Comparison(
        facts=ComparisonFacts(
            command=command,
            script=f"train.{sweep.kind}",
            model=outline.name,
            dataset=given if isinstance(given, str) else " ".join(given),
            steps=max(trial.steps for trial in sweep.trials),
            loss=first.task.loss(first.config, inputs.layout).label,
            score=first.task.score,
            base_bytes=tree_bytes(plain),
            weights=stand_in(outline.name),
            machine=_machine(),
            date=sweep.record.date,
            versions=versions(),
            outside=text,
            rule=rule(f"the {best_value}") if asked.early_stopping else None,
            baselines=next(filter(None, map(_baselines, sweep.trials)), {}),
            by_score=first.by_score,
            eval_questions=getattr(rewarded.config.run, "eval_questions", None),
            most_questions=rewarded.most_questions,
        ),
        runs=tuple(_run_result(trial, sweep, before) for trial in sweep.trials),
        rungs=sweep.record.rungs,
    )
    best = _best(comparison, sweep.trials)
    if asked.costs and any(trial.arm.method in IN_FULL for trial in best):
        with doing(console, "saving the base as a full model is saved, to count its bytes"):
            size = costs.saved_base_bytes(plain, sweep.folder / COSTS)
        facts = dataclasses.replace(comparison.facts, base_saved_bytes=size)
        comparison = dataclasses.replace(comparison, facts=facts)
    latencies: list[Latency] = []
    for trial in best:
        if asked.costs and has_adapter(trial.arm.method):
            with doing(console, f"timing an answer with {trial.name}"):
                adapted = lj.load_adapter(trial.folder / ADAPTER, plain)
                decodes = sweep.kind != "classify"
                latencies.append(costs.answer_latency(trial.arm, model, plain, adapted, decodes))
    del plain, model
    if asked.costs:
        runs = _add_costs(comparison.runs, best, sweep)
        comparison = dataclasses.replace(comparison, runs=runs, latencies=tuple(latencies))
    if asked.topology is not None:
        length = inputs.read.data.facts["sequence_length"]
        comparison = _add_plans(comparison, asked.topology, best, sweep, length)
    return comparison


def _baselines(trial: Trial) -> dict[str, float]:
    """Returns the scores that need no training; {} where a run has none."""
    scores = read_json(trial.folder / SCORES)
    return trial.task.baselines(scores) if scores else {}


def _machine() -> str:
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} × {devices[0].device_kind}"
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    plural = "" if cores == 1 else "s"
    return f"{platform.machine()} CPU, {cores} core{plural} ({platform.system()})"


def _run_result(trial: Trial, sweep: Sweep, before: float | None) -> RunResult:
    """Returns the result of a run, as far as it went."""
    done = sweep.record.progress(trial.name)
    lines, scores = read_metrics(trial.folder), read_json(trial.folder / SCORES)

    def points(name: str) -> tuple[Point, ...]:
        return tuple(Point(line["step"], line[name]) for line in lines if name in line)

    held_out = points(f"{HELD_OUT}loss")
    status: Status = "stopped early" if sweep.is_over(trial) else "waiting"
    if done.finished or done.error is not None:
        status = "done" if done.error is None else "failed"
    lost = None if before is None or done.outside is None else Forgetting(before, done.outside)
    return RunResult(
        name=trial.name,
        arm=trial.arm,
        seed=trial.seed,
        status=status,
        error=done.error,
        steps=lines[-1]["step"] if lines else 0,
        losses=points("loss"),
        held_out=held_out,
        held_out_loss=held_out[-1].value if held_out else None,
        score=done.score,
        scores=points(trial.measured) if trial.by_score else (),
        divergences=points(f"{SCORE}{KL}"),
        score_error=trial.task.score_error(scores),
        question_scores=tuple(trial.task.question_scores(scores)),
        trained_parameters=trial.trained_parameters,
        saved_bytes=done.saved_bytes,
        side_by_side=done.side_by_side,
        seconds=done.seconds or None,
        forgetting=lost,
        intruders=done.intruders,
    )


def _best(comparison: Comparison, trials: Sequence[Trial]) -> list[Trial]:
    """Returns the best run of the best arm of each method."""
    by_name = {trial.name: trial for trial in trials}
    chosen = []
    for row in tables.best_of_each(tables.rows(comparison), lambda arm: arm.method):
        value_of = row.measure.value
        values = {run.name: x for run in row.runs if (x := value_of(run)) is not None}
        best = (max if row.measure.larger else min)(values, key=values.__getitem__)
        chosen.append(by_name[best])
    return chosen


def _add_costs(
    runs: tuple[RunResult, ...], best: list[Trial], sweep: Sweep
) -> tuple[RunResult, ...]:
    """Returns the runs, those of the best arms with the memory and time of a step."""
    for trial in best:
        try:
            with doing(sweep.console, f"timing {costs.STEPS} steps of {trial.name} alone"):
                cost = costs.step_cost(trial, sweep.folder / COSTS, sweep.session)
        except TrainingError as error:
            tell(sweep.console, f"warning: {error.said(flag)}")
            continue
        runs = tuple(
            dataclasses.replace(run, **cost) if run.arm == trial.arm else run for run in runs
        )
    return runs


def _add_plans(
    comparison: Comparison, topology: str, best: list[Trial], sweep: Sweep, length: int
) -> Comparison:
    """Returns the comparison with plans of the best arms for another machine."""
    plans: list[PlanResult] = []
    words = topology
    for trial in best:
        try:
            with doing(sweep.console, f"planning {trial.name} for {topology}"):
                plan, words = costs.plan_result(trial, topology, sweep.asked.price, length)
        except UserError as error:
            tell(sweep.console, f"warning: {error}")
            continue
        plans.append(plan)
    facts = dataclasses.replace(comparison.facts, planned_on=words)
    return dataclasses.replace(comparison, facts=facts, planned=tuple(plans))
