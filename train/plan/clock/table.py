"""Tables of where the time of a step goes."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from train.plan.clock.summary import Clock
from train.plan.machines import Machine

_UNKNOWN = "–"


def print_clocks(
    console: Console, machine: Machine, clocks: Sequence[tuple[str, Clock | None]]
) -> None:
    """Prints the estimates of steps, and the work of the first by groups.

    Args:
      console: the console to print to.
      machine: the devices, and what is assumed of them.
      clocks: (name, estimate of a step) of each variant, the requested one first.
    """
    if any(clock and clock.seconds is not None for _, clock in clocks):
        table = Table(title="Estimate of a step, in ms")
        table.add_column("")
        for column in ("fusions", "kernels", "links uncovered", "together", "MFU"):
            table.add_column(column, justify="right")
        for name, clock in clocks:
            table.add_row(name, *(_times(clock) if clock else [_UNKNOWN] * 5))
        console.print(table)
    name, first = clocks[0]
    if first is None:
        return
    timed = first.seconds is not None
    table = Table(title=f"Work of a device by groups: {name}")
    for column in ("", "", *(["ms", "%"] * timed), "TFLOP", "GB"):
        table.add_column(column, justify="right" if column else "left")
    for part in first.groups:
        seconds = [_milli(part.seconds), _share(part.seconds, first.seconds)] if timed else []
        flops, moved = f"{part.flops / 1e12:,.2f}", f"{part.bytes / 1e9:,.2f}"
        table.add_row(part.group, part.phase, *seconds, flops, moved)
    console.print(table)
    for note in _notes(machine, first):
        console.print(note, highlight=False, soft_wrap=True)


def _times(clock: Clock) -> list[str]:
    times = (clock.fusions, clock.kernels, clock.uncovered, clock.seconds)
    return [*map(_milli, times), _UNKNOWN if clock.mfu is None else f"{100 * clock.mfu:.1f} %"]


def _notes(machine: Machine, clock: Clock) -> list[str]:
    """Returns remarks on the figures: the assumptions behind them, and omissions."""
    notes = ["GB: bytes of operands and results; of collectives, the bytes that a device sends."]
    if clock.seconds is None or machine.flops is None or machine.link is None:
        notes[0] += " This compiler does not estimate the time that they take."
        return notes
    clock_rate, share = (machine.clock or 0) / 1e9, 100 * machine.kernel_share
    notes[:0] = [
        "Estimates of the compiler, never measured on a chip. Fusions: the cycles that it expects, "
        f"at {clock_rate:g} GHz. Assumed: kernels at {share:g} % of the peak (--kernel-share), and "
        f"links at {machine.link / 1e9:g} GB/s along an axis of the mesh (--link-gbytes), one "
        "collective at a time; links uncovered: what no work between a collective's start and its "
        "end covers. MFU: FLOPs of the base and of attention, forward and backward, without what "
        "is recomputed, over the peak."
    ]
    if clock.unknown:
        kinds = ", ".join(f"{kind} ({n})" for kind, n in clock.unknown.items())
        between = " (send: what goes between slices)" * ("send" in clock.unknown)
        notes.append(f"Without an estimate, and left out: {kinds}{between}.")
    return notes


def _milli(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else f"{1e3 * seconds:,.1f}"


def _share(part: float | None, whole: float | None) -> str:
    return _UNKNOWN if part is None or not whole else f"{100 * part / whole:.1f}"
