"""Searches the policy of --remat auto for a plan, and shows the search."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import lora_jax as lj
from lora_jax.training.remat import (
    GIB,
    Attempt,
    RematSearch,
    countable_layers,
    expected_bytes,
    rungs_for,
)
from lora_jax.training.setup import Setup
from train.console.errors import UserError
from train.options.common import AdapterConfig, OptimConfig
from train.options.optim import make_optimizer, make_schedule
from train.plan.compile import Plan
from train.plan.job import PlanJob, PlanVariant, abstract_params, batch_shapes, bytes_per_device
from train.processes.apart import ProcessCrash

_UNKNOWN = "–"
_REMARK = "A run compiles on its own devices, so it may choose another policy."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
    """The policies of --remat auto, with the plans of the compiled ones.

    Attributes:
      search: the search.
      attempts: the policies in the order of their compilation.
      plans: the plan of each policy that was compiled.
    """

    search: RematSearch
    attempts: Sequence[Attempt]
    plans: dict[str, Plan]

    @property
    def remat(self) -> str:
        """The policy that the search chose; the last one if none fits."""
        best = self.search.best(self.attempts)
        return (best or self.attempts[-1]).remat

    @property
    def crashed(self) -> set[str]:
        """The policies on which the compiler crashed."""
        return {attempt.remat for attempt in self.attempts if attempt.crashed}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRung:
    """A policy of the ladder and its compiled step; None for unknown values.

    Attributes:
      remat: its name.
      chosen: whether the search ended with it.
      compiled_bytes: bytes of a device as compiled.
      fits: whether the compiled step fits.
      seconds: the estimate of a step.
      mfu: share of the peak.
    """

    remat: str
    chosen: bool
    compiled_bytes: int | None = None
    fits: bool | None = None
    seconds: float | None = None
    mfu: float | None = None


def search_policies(
    job: PlanJob,
    adapter: AdapterConfig,
    optim: OptimConfig,
    make_plan: Callable[[PlanVariant], Plan],
    notice: Callable[[str], object] = lambda line: None,
    first: str | None = None,
    counts_layers: bool = True,
) -> Ladder:
    """Compiles the policies that a run would compile.

    Args:
      job: the model, the machine, and the batch.
      adapter: the parameters that train.
      optim: the optimiser's options.
      make_plan: compiles a variant.
      notice: is told why another policy is compiled.
      first: the policy to begin with; None for the likeliest one.
      counts_layers: whether some of the layers may get a faster policy at the end.

    Raises:
      UserError: the compiler failed, and not for want of memory; or it crashed on all policies.
    """
    plans: dict[str, Plan] = {}

    def attempt(remat: str) -> Attempt:
        """Compiles a policy, and returns the attempt for the search."""
        variant = PlanVariant(adapter, remat)
        start_time = time.perf_counter()
        try:
            plan = make_plan(variant)
        except ProcessCrash:
            seconds = time.perf_counter() - start_time
            return Attempt(remat=remat, size=None, refused=False, crashed=True, seconds=seconds)
        plans[remat] = plan
        if plan.failed:
            raise UserError(f"{variant.name}: {plan.failed}")
        return Attempt(
            remat=remat,
            size=None if plan.refused else plan.per_chip_bytes["total"],
            refused=plan.refused is not None,
            seconds=plan.compile_seconds,
        )

    search = _begin_search(job, adapter, optim)
    if first is not None:
        search = dataclasses.replace(search, first=first)
    if not counts_layers:
        search = dataclasses.replace(search, n_layers=0)
    ladder = Ladder(search=search, attempts=search.run(attempt, notice), plans=plans)
    if ladder.remat in ladder.crashed:
        raise UserError(
            f"{search.describe(ladder.attempts)}. Pass another policy, such as --remat full, or "
            "change --batch-size or --seq-len."
        )
    return ladder


def _begin_search(job: PlanJob, adapter: AdapterConfig, optim: OptimConfig) -> RematSearch:
    """Returns the search of a plan before its first compilation; see `search_policies`."""
    outline = job.outline
    params = abstract_params(job, PlanVariant(adapter, "full"))
    schedule = make_schedule(optim, 1e-4, 1000)  # the memory depends on neither
    optimizer = make_optimizer(optim, schedule, params)
    trained, _ = lj.split(params)
    state = Setup.make(job.layout, params, optimizer, schedule).abstract_state(trained)
    ids = batch_shapes(job)["ids"]
    device_shape = ids.sharding.shard_shape(ids.shape)
    expected = expected_bytes(
        outline.config,
        outline.params,
        outline.kinds,
        tokens=math.prod(device_shape[1:]),
        itemsize=jnp.dtype(job.dtype).itemsize,
        arguments=bytes_per_device((params, state.opt_state)),
    )
    rungs = rungs_for(job.layout.platform, job.attention_choice.name)
    capacity = int(job.machine.shares[0] * job.machine.capacity)
    n_layers = 0 if adapter.full else countable_layers(outline.config)
    return RematSearch.begin(rungs, capacity, expected, n_layers=n_layers)


def planned_rungs(ladder: Ladder) -> list[PlannedRung]:
    """Returns all policies, with the results of those that were compiled."""

    def rung(remat: str) -> PlannedRung:
        """Returns the record of one policy."""
        is_chosen = remat == ladder.remat
        plan = ladder.plans.get(remat)
        if plan is None:
            return PlannedRung(remat=remat, chosen=is_chosen)
        clock = plan.clocks.get("step")
        return PlannedRung(
            remat=remat,
            chosen=is_chosen,
            compiled_bytes=plan.per_chip_bytes["total"],
            fits=plan.fits,
            seconds=clock.seconds if clock else None,
            mfu=clock.mfu if clock else None,
        )

    policies = {*ladder.search.rungs, *ladder.plans}  # the compiled ones may have numbers of layers
    return [rung(remat) for remat in sorted(policies, key=ladder.search.position)]


def print_ladder(console: Console, ladder: Ladder) -> None:
    """Prints the policies as a table, and the chosen one with its reason."""
    rungs = planned_rungs(ladder)
    is_timed = any(rung.seconds is not None for rung in rungs)
    time_columns = ("ms", "MFU") if is_timed else ()
    table = Table(title="--remat auto, in GiB per device")
    table.add_column("")
    for column in ("compiled", "fits", *time_columns):
        table.add_column(column, justify="right")
    answers = {None: _UNKNOWN, True: "yes", False: "no"}
    for rung in rungs:
        name = f"{rung.remat} (chosen)" if rung.chosen else rung.remat
        cells = [name, _format_scaled(rung.compiled_bytes, GIB), answers[rung.fits]]
        if is_timed:
            cells.append(_format_scaled(rung.seconds, 1e-3, digits=0))
            cells.append(_format_scaled(rung.mfu, 1e-2, digits=1, suffix=" %"))
        table.add_row(*cells)
    console.print(table)
    line = f"{ladder.search.describe(ladder.attempts)}. {_REMARK}"
    console.print(line, highlight=False, soft_wrap=True)


def _format_scaled(value: float | None, unit: float, digits: int = 2, suffix: str = "") -> str:
    return _UNKNOWN if value is None else f"{value / unit:,.{digits}f}{suffix}"
