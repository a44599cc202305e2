"""Tables of the time that the parts of a step take."""

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
            table.add_row(name, *(_time_cells(clock) if clock else [_UNKNOWN] * 5))
        console.print(table)
    requested_name, requested_clock = clocks[0]
    if requested_clock is None:
        return
    console.print(_group_table(requested_name, requested_clock))
    for note in _figure_notes(machine, requested_clock):
        console.print(note, highlight=False, soft_wrap=True)


def _group_table(name: str, clock: Clock) -> Table:
    """Returns the table of a step's work by groups, with times if they are estimated."""
    is_timed = clock.seconds is not None
    time_columns = ("ms", "%", "ms by HBM") if is_timed else ()
    table = Table(title=f"Work of a device by groups: {name}")
    for column in ("", "", *time_columns, "TFLOP", "GB"):
        table.add_column(column, justify="right" if column else "left")
    for work in clock.groups:
        cells = [work.group, work.phase]
        if is_timed:
            cells += [
                _format_milliseconds(work.seconds),
                _format_percent(work.seconds, clock.seconds),
                _format_milliseconds(work.memory_seconds),
            ]
        cells += [f"{work.flops / 1e12:,.2f}", f"{work.bytes / 1e9:,.2f}"]
        table.add_row(*cells)
    return table


def _time_cells(clock: Clock) -> list[str]:
    """Returns the cells of a step's estimate: milliseconds by source, their sum, and the MFU."""
    seconds = (clock.fusions, clock.kernels, clock.uncovered, clock.seconds)
    mfu = _UNKNOWN if clock.mfu is None else f"{100 * clock.mfu:.1f} %"
    return [*map(_format_milliseconds, seconds), mfu]


def _figure_notes(machine: Machine, clock: Clock) -> list[str]:
    """Returns remarks on the figures: the assumptions behind them, and omissions."""
    bytes_note = "GB: bytes of operands and results; of collectives, the bytes that a device sends."
    if clock.seconds is None or machine.flops is None or machine.link is None:
        return [f"{bytes_note} This compiler does not estimate the time that they take."]
    clock_ghz = (machine.clock or 0) / 1e9
    kernel_percent = 100 * machine.kernel_share
    time_note = (
        "Estimates of the compiler, never measured on a chip. Fusions: the cycles that it expects, "
        f"at {clock_ghz:g} GHz. Assumed: kernels at {kernel_percent:g} % of the peak "
        f"(--kernel-share), and links at {machine.link / 1e9:g} GB/s along an axis of the mesh "
        "(--link-gbytes), one collective at a time; links uncovered: what no work between a "
        "collective's start and its end covers. MFU: FLOPs of the base and of attention, forward "
        "and backward, without what is recomputed, over the peak."
    )
    memory_ms = _format_milliseconds(clock.memory)
    memory_note = (
        "The column ms by HBM has the time that HBM takes to move the bytes of a group at "
        f"{(machine.bandwidth or 0) / 1e9:,g} GB/s, {memory_ms} ms in all. It includes work "
        "without an estimate, such as gathers. The compiler expects a lower rate of passes that "
        "only move bytes, so the true time lies between the two figures."
    )
    notes = [time_note, bytes_note, memory_note]
    if clock.unknown:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in clock.unknown.items())
        send_note = " (send: what goes between slices)" if "send" in clock.unknown else ""
        notes.append(
            f"Without an estimate, and left out of all but the time by HBM: {kinds}{send_note}."
        )
    return notes


def _format_milliseconds(seconds: float | None) -> str:
    return _UNKNOWN if seconds is None else f"{1e3 * seconds:,.1f}"


def _format_percent(seconds: float | None, step_seconds: float | None) -> str:
    return (
        _UNKNOWN if seconds is None or not step_seconds else f"{100 * seconds / step_seconds:.1f}"
    )
