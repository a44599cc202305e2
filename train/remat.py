"""Chooses --remat auto before weights are read; goes one policy down where it does not fit."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.core.types import Forward, Model
from lora_jax.training.memory.ladder import GIB, RematChoice, next_choice
from lora_jax.training.processes import write_text
from lora_jax.training.ready import compile_step
from lora_jax.training.setup import CompiledStep
from train.console.output import tell
from train.options.common import AUTO
from train.options.file import replace_options
from train.plan.local import local_step
from train.plan.remat import choose_for
from train.processes import hosts
from train.run.intrinsic import model_in
from train.run.log import doing
from train.run.report import compiled_bytes
from train.settings.files import CONFIG, options_file
from train.table import TableRun


def choose_remat_of(rows: Sequence[TableRun]) -> RematChoice | None:
    """Chooses --remat of runs over one base, where it is auto, and tells why; None where it is not.

    All processes have to call this.
    """
    if rows[0].run.config.optim.remat != AUTO:
        return None
    steps = [
        local_step(
            row.run.config,
            row.inputs.read.outline,
            row.inputs.layout,
            row.loss,
            row.inputs.feed.first(),
        )
        for row in rows
    ]
    choice = choose_for(steps, rows[0].inputs.attention)
    for row in rows:
        _set_remat(row, choice.remat)
        tell(row.run.console, choice.describe())
    return choice


def compile_row(
    row: TableRun, model: Model, choice: RematChoice | None
) -> tuple[Model, Forward, CompiledStep, float]:
    """Compiles the step of a single run; one that was chosen and does not fit, one policy down.

    A TPU's compiler refuses what does not fit. A GPU's refuses nothing: there the memory that the
    compiled step takes is compared with the card's, before the first step. Where a compiler refuses
    the last policy, it judges one more that was predicted not to fit (`next_choice`).

    Args:
      row: the run.
      model: the model, with the policy of the run's options.
      choice: the policy that was chosen; None where it was asked for.

    Returns:
      The model with the policy of the step, the function that the loss calls, the step, and the
      seconds of compiling.
    """
    began = time.perf_counter()
    while True:
        assert row.start is not None
        forward = row.start.setup.forward(model_in(row.space, model))
        step = None
        with doing(row.run.console, "compiling the step"):
            try:
                step = compile_step(row.start, forward, row.loss)
            except jax.errors.JaxRuntimeError as error:
                if choice is None or choice.is_last or "RESOURCE_EXHAUSTED" not in str(error):
                    raise
        if choice is None or choice.is_last:
            assert step is not None
            return model, forward, step, time.perf_counter() - began
        refused, needed = _compare_processes(step)
        exceeds = bool(choice.lower) and _exceeds(needed, choice.capacity)
        if step is not None and not refused and not exceeds:
            return model, forward, step, time.perf_counter() - began
        other = next_choice(choice, needed)
        assert other is not None
        del step
        tell(row.run.console, _why_next(choice, other, needed))
        choice = other
        _set_remat(row, choice.remat)
        write_text(row.run.folder / CONFIG, options_file(row.run.config, row.run.script))
        model = model.clone(remat=row.run.config.optim.remat_policy)


def _compare_processes(step: CompiledStep | None) -> tuple[bool, int | None]:
    """Compares a step, None where the compiler refused it, over all processes, which go alike.

    Returns:
      True if the compiler of one of them refused; and the bytes of the one that needs most, None if
      one is unknown.
    """
    every = hosts.gather([step is None, None if step is None else step_bytes(step)])
    known = [size for _, size in every if size is not None]
    return any(refused for refused, _ in every), max(known) if len(known) == len(every) else None


def _exceeds(needed: int | None, capacity: int | None) -> bool:
    return needed is not None and capacity is not None and needed > capacity


def step_bytes(step: Any) -> int | None:
    """Returns the bytes of a device that a compiled step takes; None if it is not reported."""
    sizes = compiled_bytes(step)
    return sum(sizes.values()) - 2 * sizes["aliased"] if sizes else None


def _why_next(choice: RematChoice, other: RematChoice, needed: int | None) -> str:
    if needed is None:
        why = "the compiler refuses the step for want of memory"
    else:
        of = "" if choice.capacity is None else f" of {choice.capacity / GIB:,.2f}"
        why = f"the compiled step takes {needed / GIB:,.2f}{of} GiB"
    return f"remat: {choice.remat} does not fit ({why}): compiling anew with {other.remat}"


def _set_remat(row: TableRun, remat: str) -> None:
    config = replace_options(row.run.config, {"remat": remat})
    row.run = dataclasses.replace(row.run, config=config)
