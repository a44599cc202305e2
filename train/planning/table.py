"""Plans as a table: a row for each variant, what was asked for first."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from train.planning.compile import Plan
from train.planning.plan_flops import JAXPR
from train.run.report import megabytes

_PARTS = ("base", "adapter", "optimizer", "temporaries", "other", "total")
_UNKNOWN = "–"
_TRACED = "≈ "


def print_plans(
    console: Console,
    facts: Mapping[str, Any],
    plans: Sequence[Plan],
    estimates: Sequence[Mapping[str, float | None]],
) -> None:
    """Prints the memory of each variant, then its work, then what there is to say of them.

    Args:
      console: where to print.
      facts: what all plans are for; see `train.plan.described`.
      plans: one for each variant; what was asked for is the first.
      estimates: of each plan, the seconds of a step, the chip-hours and the cost.
    """
    mesh = ", ".join(f"{axis} {size}" for axis, size in facts["mesh"].items()) or "one device"
    console.print(
        f"{facts['model']} on {facts['topology']} ({facts['devices']} devices: {mesh}), "
        f"{facts['batch_size'] * facts['grad_accum']} × {facts['seq_len']} tokens a step, "
        f"{facts['dtype']}; asked of the {facts['compiler'].upper()} compiler",
        highlight=False,
        soft_wrap=True,
    )
    capacity = _gib(plans[0].per_chip_bytes["capacity"])
    memory = Table(title=f"Memory of a device, in GiB (there are {capacity})")
    memory.add_column("")
    memory.add_column("fits")
    for part in _PARTS:
        memory.add_column(part, justify="right")
    for made in plans:
        sizes = [_gib(made.per_chip_bytes[part]) for part in _PARTS]
        memory.add_row(made.name, "yes" if made.fits else "no", *sizes)
    console.print(memory)

    work = Table(title="Work and time")
    work.add_column("")
    for name in ("TFLOP", "by hand", "GB sent", "step", "chip-hours"):
        work.add_column(name, justify="right")
    with_cost = facts["price"] is not None
    names = ("cost",) if with_cost else ()
    for name in (*names, "adapter", "checkpoint"):
        work.add_column(name, justify="right")
    for made, guess in zip(plans, estimates, strict=True):
        sent = None if made.collective_bytes is None else sum(made.collective_bytes.values())
        work.add_row(
            made.name,
            _mark(made) + _in(made.flops_per_step, 1e12),
            _in(made.flops_closed_form, 1e12),
            _in(sent, 1e9),
            _number(guess["step_seconds"], " s"),
            _number(guess["chip_hours"]),
            *([_number(guess["cost"])] if with_cost else []),
            megabytes(made.adapter_bytes),
            megabytes(made.checkpoint_bytes),
        )
    console.print(work)
    for made in plans:
        if made.refused:
            console.print(f"{made.name}: {made.refused}", highlight=False, soft_wrap=True)
        for note in made.notes:
            console.print(f"{_mark(made)}{made.name}: {note}", highlight=False, soft_wrap=True)
    console.print(_notes(facts), highlight=False, soft_wrap=True)


def _mark(made: Plan) -> str:
    """Returns a sign for FLOPs that are not those of the compiled step."""
    return _TRACED if made.flops_source == JAXPR else ""


def _notes(facts: Mapping[str, Any]) -> str:
    notes = (
        "base: what is frozen; adapter: what trains; other: the batch, padding, the program. "
        "TFLOP: of a step on all devices, read from the optimised HLO, and counted by hand. "
        "GB sent: by a device in a step."
    )
    if facts["peak_flops_per_device"] is not None:
        peak = facts["peak_flops_per_device"] / 1e12
        notes += (
            f" A step's time assumes that {100 * facts['utilisation']:g} % of the published peak, "
            f"{peak:,.0f} TFLOP/s, are reached (--utilisation)"
        )
        notes += "." if facts["tokens"] else "; --tokens gives chip-hours."
    else:
        notes += " A step's time needs --peak-tflops."
    return notes


def _gib(size: int | None) -> str:
    return _UNKNOWN if size is None else f"{size / 2**30:,.2f}"


def _in(value: int | None, unit: float) -> str:
    return _UNKNOWN if value is None else f"{value / unit:,.2f}"


def _number(value: float | None, unit: str = "") -> str:
    return _UNKNOWN if value is None else f"{value:,.2f}{unit}"
