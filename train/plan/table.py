"""Plans as tables: one row per variant, the requested one first."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from train.plan.compile import STEP, Plan
from train.plan.flops.checked import JAXPR
from train.plan.tasks import SAMPLER, TASKS
from train.run.costs import byte_size, step_time

_HELD, _REST = ("base", "adapter", "optimizer", STEP), ("other", "total")
_UNKNOWN = "–"
_TRACED = "≈ "


def print_plans(
    console: Console,
    facts: Mapping[str, Any],
    plans: Sequence[Plan],
    estimates: Sequence[Mapping[str, float | None]],
) -> None:
    """Prints a table of memory, a table of work and time, and notes.

    Args:
      console: the console to print to.
      facts: the facts that all plans share; see `train.plan.__main__.described`.
      plans: one per variant, the requested one first.
      estimates: for each plan, the seconds of a step, the chip-hours and the cost; see
        `train.plan.__main__.estimate`.
    """
    mesh = ", ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    codes = "" if facts["quantize"] == "none" else f" with {facts['quantize']} kernels"
    products = facts["collective_matmul"]
    products = f"collective matmul: {products}, " if products else ""
    chunk = facts["loss_chunk"]
    predictions = f"{chunk:,} predictions at a time" if chunk else "all predictions at once"
    devices = "one device" if facts["devices"] == 1 else f"{facts['devices']} devices: {mesh}"
    console.print(
        f"{facts['model']} on {facts['topology']} ({devices}), "
        f"{facts['rows']} per step, {facts['dtype']}{codes}, attention: {facts['attention']}, "
        f"{products}the head: {predictions}, "
        f"optimizer: {facts['optimizer']}; compiled by the {facts['compiler'].upper()} compiler",
        highlight=False,
        soft_wrap=True,
    )
    capacity = _gib(plans[0].per_chip_bytes["capacity"])
    memory = Table(title=f"Memory per device, in GiB (of {capacity})")
    memory.add_column("")
    for share in facts["memory_shares"]:
        memory.add_column(f"fits {share:g}" if facts["compiler"] == "gpu" else "fits")
    to_host = any(made.per_chip_bytes["host"] for made in plans)
    between = TASKS[facts["task"]].between
    parts = (*_HELD, *between, *_REST, *(["host"] * to_host))
    for part in parts:
        memory.add_column("step" if part == STEP and between else part, justify="right")
    for made in plans:
        sizes = [_gib(made.per_chip_bytes.get(part)) for part in parts]
        fits = ["yes" if one else "no" for one in made.fits_share.values()]
        memory.add_row(made.name, *fits, *sizes)
    console.print(memory)

    work = Table(title="Work and time")
    work.add_column("")
    over_slices = ("GB between",) * (facts["slices"] > 1)
    for name in ("TFLOP", "GB sent", *over_slices, "step", "chip-hours"):
        work.add_column(name, justify="right")
    with_cost = facts["price"] is not None
    names = ("cost",) if with_cost else ()
    for name in (*names, "adapter", "checkpoint"):
        work.add_column(name, justify="right")
    for made, guess in zip(plans, estimates, strict=True):
        sent, leaving = map(_sum, (made.collective_bytes, made.between_slices_bytes))
        seconds = guess["step_seconds"]
        work.add_row(
            made.name,
            _mark(made) + _scaled(made.flops_per_step, 1e12),
            _scaled(sent, 1e9),
            *([_scaled(leaving, 1e9, digits=4)] if over_slices else []),
            _UNKNOWN if seconds is None else step_time(seconds),
            _number(guess["chip_hours"]),
            *([_number(guess["cost"])] if with_cost else []),
            byte_size(made.adapter_bytes),
            byte_size(made.checkpoint_bytes),
        )
    console.print(work)
    for made in plans:
        if problem := made.refused or made.failed:
            console.print(f"{made.name}: {problem}", highlight=False, soft_wrap=True)
        if made.kernels:
            kernels = ", ".join(made.kernels)
            console.print(f"{made.name}: kernels: {kernels}", highlight=False, soft_wrap=True)
        for note in made.notes:
            console.print(f"{_mark(made)}{made.name}: {note}", highlight=False, soft_wrap=True)
    for note in (*facts["remarks"], _notes(facts, to_host), *_task_notes(facts, plans[0])):
        console.print(note, highlight=False, soft_wrap=True)


def _mark(made: Plan) -> str:
    """Returns a mark for FLOPs that do not come from the compiled step."""
    return _TRACED if made.flops_source == JAXPR else ""


def _notes(facts: Mapping[str, Any], to_host: bool) -> str:
    of = "as traced" if facts["compiler"] == "gpu" else "from the optimised HLO"
    notes = (
        "base: frozen parameters; adapter: trained parameters; other: the batch, padding, the "
        f"program. TFLOP: per step on all devices, {of}. "
        "GB sent: per device and step."
    )
    if facts["slices"] > 1:
        what = "hosts" if facts["compiler"] == "gpu" else "slices"
        notes += f" GB between: the part of it that goes between the {facts['slices']} {what}."
    if to_host:
        notes += " host: memory of a device's host that the layers' inputs take, not in the total."
    if facts["compiler"] == "gpu":
        notes += (
            f" fits {facts['memory_shares'][0]:g}: within that share of the memory, which JAX "
            "reserves (XLA_PYTHON_CLIENT_MEM_FRACTION). Temporaries are the larger of those with "
            "Triton's products and with cuBLAS's. A plan does not see what lies outside of XLA's "
            "buffers: CUDA's context, NCCL's buffers, cuDNN's workspaces."
        )
    if facts["peak_flops_per_device"] is not None:
        peak = facts["peak_flops_per_device"] / 1e12
        notes += (
            f" The time of a step assumes {100 * facts['utilisation']:g} % of the published peak, "
            f"{peak:,g} TFLOP/s (--utilisation)"
        )
        notes += "." if facts["tokens"] else "; --tokens gives chip-hours."
    else:
        notes += " For the time of a step, give --peak-tflops."
    return notes


def _task_notes(facts: Mapping[str, Any], made: Plan) -> Iterator[str]:
    """Yields lines on the programs between steps."""
    between = TASKS[facts["task"]].between
    if between:
        yield (
            f"{', '.join(('step', *between))}: temporaries of each program, one of which runs at a "
            f"time; the total has the largest. TFLOP and time are of a step and its {between[0]}."
        )
    if SAMPLER in between:
        token = made.sampled_token_flops
        a_token = _scaled(token and facts["grad_accum"] * token, 1e12, digits=3)
        yield (
            f"The sampler's have the cache of keys and values, {_gib(made.cache_bytes)} GiB on all "
            f"devices. Its work comes on top: {a_token} TFLOP for a token of each completion "
            f"of a step, and up to {facts['max_new_tokens']} tokens."
        )


def _gib(size: int | None) -> str:
    return _UNKNOWN if size is None else f"{size / 2**30:,.2f}"


def _sum(sizes: Mapping[str, int] | None) -> int | None:
    return None if sizes is None else sum(sizes.values())


def _scaled(value: int | None, unit: float, digits: int = 2) -> str:
    return _UNKNOWN if value is None else f"{value / unit:,.{digits}f}"


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:,.2f}"
