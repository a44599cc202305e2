"""The policies of rematerialisation that --remat auto chooses from, as a plan shows them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from lora_jax.training.memory.ladder import (
    GIB,
    RematChoice,
    choose_remat,
    next_choice,
    rungs_for,
)
from lora_jax.training.memory.live import predicted_bytes
from train.options.common import AdapterConfig, OptimConfig
from train.plan.compile import Plan, trace_step
from train.plan.job import PlanJob, PlanVariant

_UNKNOWN = "–"


class Ladder(NamedTuple):
    """The predicted memory of each policy, and the one that a run is compiled with first.

    Attributes:
      choice: the policy.
      predicted: bytes of a device of each, from the fastest to the leanest.
      names: their plans' names.
    """

    choice: RematChoice
    predicted: dict[str, int]
    names: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRung:
    """A policy of the ladder; None for what was not compiled, or what the compiler does not say.

    Attributes:
      remat: its name.
      chosen: whether a run is compiled with it first.
      predicted_bytes: bytes of a device before compiling.
      compiled_bytes: bytes of a device as compiled.
      fits: whether the compiled step fits.
      seconds: the estimate of a step.
      mfu: share of the peak.
    """

    remat: str
    chosen: bool
    predicted_bytes: int
    compiled_bytes: int | None
    fits: bool | None
    seconds: float | None
    mfu: float | None


def find_ladder(job: PlanJob, adapter: AdapterConfig, optim: OptimConfig) -> Ladder:
    """Predicts the memory of a step with each policy; compiles nothing.

    Args:
      job: the model, the machine, and the batch.
      adapter: the parameters that train.
      optim: the optimiser's options.
    """
    variants = {
        remat: PlanVariant(adapter, remat)
        for remat in rungs_for(job.layout.platform, job.chosen.name)
    }

    def predict(remat: str) -> int:
        step = trace_step(job, variants[remat], optim)
        return predicted_bytes(step.traced, job.layout, step.state, step.base, step.batch)

    predicted = {remat: predict(remat) for remat in variants}
    capacity = int(job.machine.shares[0] * job.machine.capacity)
    choice = choose_remat([*predicted], predicted.__getitem__, capacity)
    return Ladder(choice, predicted, {remat: one.name for remat, one in variants.items()})


def next_variants(refused: PlanVariant, ladder: Ladder) -> list[PlanVariant]:
    """Returns the variant that a run compiles after one that the compiler refused, if there is."""
    choice: RematChoice | None = ladder.choice
    while choice is not None and choice.remat != refused.remat:
        choice = next_choice(choice, None)
    choice = choice and next_choice(choice, None)
    return [dataclasses.replace(refused, remat=choice.remat)] if choice else []


def rungs_of(ladder: Ladder, plans: Sequence[Plan]) -> list[PlannedRung]:
    """Returns the policies with what their plans say, those that were compiled."""
    by_name = {made.name: made for made in plans}

    def rung(remat: str, predicted: int) -> PlannedRung:
        made = by_name.get(ladder.names[remat])
        clock = made.clocks.get("step") if made else None
        return PlannedRung(
            remat=remat,
            chosen=remat == ladder.choice.remat,
            predicted_bytes=predicted,
            compiled_bytes=made.per_chip_bytes["total"] if made else None,
            fits=made.fits if made else None,
            seconds=clock.seconds if clock else None,
            mfu=clock.mfu if clock else None,
        )

    return [rung(remat, predicted) for remat, predicted in ladder.predicted.items()]


def print_ladder(console: Console, ladder: Ladder, rungs: Sequence[PlannedRung]) -> None:
    """Prints the policies as a table, and the choice with its reason."""
    timed = any(rung.seconds is not None for rung in rungs)
    table = Table(title="--remat auto, in GiB per device")
    table.add_column("")
    for column in ("predicted", "compiled", "fits", *(["ms", "MFU"] * timed)):
        table.add_column(column, justify="right")
    for rung in rungs:
        fits = _UNKNOWN if rung.fits is None else "yes" if rung.fits else "no"
        times = [_scaled(rung.seconds, 1e-3, 0), _scaled(rung.mfu, 1e-2, 1, " %")] if timed else []
        table.add_row(
            rung.remat + " (chosen)" * rung.chosen,
            _scaled(rung.predicted_bytes, GIB),
            _scaled(rung.compiled_bytes, GIB),
            fits,
            *times,
        )
    console.print(table)
    console.print(ladder.choice.describe(), highlight=False, soft_wrap=True)


def _scaled(value: float | None, unit: float, digits: int = 2, after: str = "") -> str:
    return _UNKNOWN if value is None else f"{value / unit:,.{digits}f}{after}"
