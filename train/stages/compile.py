"""Compiles the step of runs that have begun, and chooses the policy of --remat auto."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

from lora_jax.core.types import Model, Tree
from lora_jax.training.processes import write_text
from train.console.output import tell
from train.options.common import OptimConfig
from train.options.file import replace_options
from train.run.log import doing
from train.settings.files import CONFIG, options_file
from train.stages.arrangement import Arrangement
from train.stages.remat import settle_step
from train.stages.types import (
    BegunRun,
    CompiledRun,
    CompiledRuns,
    Handover,
    OpenedRun,
    SharedModel,
)


def compile_runs(
    runs: Mapping[str, BegunRun],
    base: SharedModel,
    weights: Handover[Tree],
    arrangement: Arrangement,
) -> CompiledRuns:
    """Compiles the common step of runs for their largest batches, and settles --remat auto.

    Args:
      runs: the runs, by name.
      base: the model.
      weights: the model's parameters, which are taken.
      arrangement: the arrangement of the runs, which compiles the step.

    Raises:
      UserError: with --remat auto, no policy fits, or the compiler failed.
    """
    start_time = time.perf_counter()
    compile_for = arrangement.step_compiler(runs, base, weights)

    def compile_rung(remat: str) -> tuple[Any, int | None]:
        with doing(arrangement.console, "compiling the step"):
            return compile_for(with_remat(base.model, remat))

    begun_runs = list(runs.values())
    first_run = begun_runs[0].opened
    starts = [run.start.content for run in begun_runs]
    remat, driver = settle_step(
        first_run.config,
        first_run.inputs,
        [run.batch for run in begun_runs],
        starts[0].base,
        [start.state for start in starts],
        compile_rung,
        functools.partial(tell, arrangement.console),
    )
    compiled_runs = {
        name: CompiledRun(
            opened=settled_run(run.opened, remat),
            evaluation=run.evaluation,
            best=run.best,
            start=run.start,
        )
        for name, run in runs.items()
    }
    return CompiledRuns(
        runs=compiled_runs,
        driver=Handover(driver),
        base=base._replace(model=with_remat(base.model, remat)),
        seconds=time.perf_counter() - start_time,
    )


def with_remat(model: Model, remat: str) -> Model:
    """Returns a model with the rematerialisation policy of a value of --remat."""
    changed: Model = model.clone(remat=OptimConfig(remat=remat).remat_policy)
    return changed


def settled_run(run: OpenedRun, remat: str) -> OpenedRun:
    """Returns a run with its rematerialisation policy, which is written to its config.yaml."""
    if run.config.optim.remat == remat:
        return run
    config = replace_options(run.config, {"remat": remat})
    write_text(run.folder / CONFIG, options_file(config, run.script))
    return dataclasses.replace(run, config=config)
