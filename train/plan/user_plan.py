"""The plan of a function that a user wrote, and its tables."""

import dataclasses
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from train.plan.clock.summary import Clock
from train.plan.clock.table import print_clocks
from train.plan.flops.checked import JAXPR, StepWork
from train.plan.machines import Machine

_MEMORY_USES = ("arguments", "outputs", "temporaries", "program", "total")
_UNKNOWN = "–"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LargeArray:
    """An array that a function computes.

    Attributes:
      dtype, shape: dtype and shape of the whole array, on all devices.
      n_bytes: its bytes, on all devices.
      line: the user's line that computes it.
    """

    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    line: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionPlan:
    """The resources that a function needs on a machine; None for unknown ones.

    Attributes:
      name: name of the function.
      machine: the devices.
      mesh: the size of each axis of the mesh.
      fits_share: each share of a device's memory -> whether the function fits into it.
      memory: bytes of one device: arguments, outputs (without donated arguments that they
        replace), temporaries, program, total, capacity.
      refused: the compiler's message if it refused the function for want of memory.
      failed: the compiler's message if it failed for another reason.
      work: FLOPs, and bytes over links.
      clock: the compiler's estimate of the time, by groups.
      largest_arrays: the largest arrays that the function computes, if it does not fit.
      unused_donations: donated inputs, by path, that no output can replace, with their bytes.
      compile_seconds: time of the compilation.
      notes: remarks, in sentences.
    """

    name: str
    machine: Machine
    mesh: dict[str, int]
    fits_share: dict[str, bool]
    memory: dict[str, int | None]
    refused: str | None
    failed: str | None
    work: StepWork
    clock: Clock | None
    largest_arrays: tuple[LargeArray, ...]
    unused_donations: dict[str, int]
    compile_seconds: float
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """True if the function fits into the first share of a device's memory."""
        return next(iter(self.fits_share.values()))

    def show(self) -> None:
        """Prints the plan as tables."""
        _print_function_plan(self)

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as values for JSON."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "machine"
        }
        fields["topology"] = self.machine.name
        for name in ("work", "clock"):
            if fields[name] is not None:
                fields[name] = dataclasses.asdict(fields[name])
        fields["largest_arrays"] = [dataclasses.asdict(array) for array in self.largest_arrays]
        return fields


def _print_function_plan(plan: FunctionPlan) -> None:
    """Prints memory, work, the time by groups, and remarks."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    n_devices = len(plan.machine.devices)
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    devices = "one device" if n_devices == 1 else f"{n_devices} devices: {mesh}"
    compiler = plan.machine.platform.upper()
    headline = (
        f"{plan.name} on {plan.machine.name} ({devices}), compiled by the {compiler} compiler in "
        f"{plan.compile_seconds:.0f} s"
    )
    console.print(headline, highlight=False, soft_wrap=True)
    console.print(_memory_table(plan))
    console.print(_work_table(plan))
    for line in _remarks(plan):
        console.print(line, highlight=False, soft_wrap=True)
    if plan.clock is not None:
        print_clocks(console, plan.machine, [(plan.name, plan.clock)])


def _memory_table(plan: FunctionPlan) -> Table:
    """Returns the table of a device's memory, by use."""
    capacity = _gib(plan.memory["capacity"])
    table = Table(title=f"Memory per device, in GiB (of {capacity})")
    for share in plan.fits_share:
        table.add_column("fits" if len(plan.fits_share) == 1 else f"fits {share}")
    for use in _MEMORY_USES:
        table.add_column(use, justify="right")
    fits = ["yes" if is_fitting else "no" for is_fitting in plan.fits_share.values()]
    table.add_row(*fits, *(_gib(plan.memory.get(use)) for use in _MEMORY_USES))
    return table


def _work_table(plan: FunctionPlan) -> Table:
    """Returns the table of FLOPs and of bytes over links."""
    work = plan.work
    table = Table(title="Work")
    for column in ("TFLOP", "TFLOP per device", "GB sent per device"):
        table.add_column(column, justify="right")
    mark = "≈ " if work.source == JAXPR else ""
    sent = None if work.sent is None else sum(work.sent.values())
    table.add_row(
        mark + _scaled(work.per_step, 1e12),
        mark + _scaled(work.per_chip, 1e12),
        _scaled(sent, 1e9),
    )
    return table


def _remarks(plan: FunctionPlan) -> list[str]:
    """Returns lines about a failure, lost donations, kernels and figures."""
    lines: list[str] = []
    if plan.refused:
        lines.append(f"The compiler refused it for want of memory: {plan.refused}")
    if plan.failed:
        lines.append(f"The compiler failed: {plan.failed}")
    if plan.largest_arrays:
        lines.append("The largest arrays that it computes, on all devices together:")
    for array in plan.largest_arrays:
        shape = ", ".join(map(str, array.shape))
        lines.append(f"  {_gib(array.n_bytes)} GiB  {array.dtype}[{shape}]  {array.line}")
    if plan.unused_donations:
        total = _gib(sum(plan.unused_donations.values()))
        paths = ", ".join(plan.unused_donations)
        lines.append(
            f"No output can replace {total} GiB of donated inputs ({paths}). Give these inputs and "
            "outputs the same dtype, shape and sharding (out_shardings=), or do not donate them."
        )
    if plan.work.kernels:
        lines.append(
            f"kernels: {', '.join(plan.work.kernels)}. The MFU is not known, because a kernel "
            "does not show what it recomputes."
        )
    return [*lines, *plan.notes]


def _gib(n_bytes: int | None) -> str:
    return _UNKNOWN if n_bytes is None else f"{n_bytes / 2**30:,.2f}"


def _scaled(value: int | None, unit: float) -> str:
    return _UNKNOWN if value is None else f"{value / unit:,.3f}"
