"""Plans as tables: one row per variant, the requested one first."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from train.plan.compile import STEP, Plan
from train.plan.flops.checked import JAXPR
from train.plan.tasks import SAMPLER, TASKS
from train.run.costs import byte_size, step_time

_USES_OF_STEP = ("base", "adapter", "optimizer", STEP)
_TOTAL_USES = ("other", "total")
_UNKNOWN = "–"
_TRACED = "≈ "
_ASSUMED = "≈ "  # the time of a step without an estimate, among others with one


def print_plans(
    console: Console,
    facts: Mapping[str, Any],
    plans: Sequence[Plan],
    estimates: Sequence[Mapping[str, float | None]],
) -> None:
    """Prints a table of memory, a table of work and time, and notes on both.

    Args:
      console: the console to print to.
      facts: the facts that all plans share; see `train.plan.facts.describe_job`.
      plans: one per variant, the requested one first.
      estimates: for each plan, the seconds of a step, the chip-hours and the cost; see
        `train.plan.__main__.estimate_time_and_cost`.
    """
    console.print(_headline(facts), highlight=False, soft_wrap=True)
    console.print(_memory_table(facts, plans))
    console.print(_work_table(facts, plans, estimates))
    for plan in plans:
        problem = plan.refused or plan.failed
        if problem:
            console.print(f"{plan.name}: {problem}", highlight=False, soft_wrap=True)
        if plan.kernels:
            kernels = ", ".join(plan.kernels)
            console.print(f"{plan.name}: kernels: {kernels}", highlight=False, soft_wrap=True)
        for note in plan.notes:
            console.print(
                f"{_traced_mark(plan)}{plan.name}: {note}", highlight=False, soft_wrap=True
            )
    column_notes = _column_notes(facts, plans)
    for note in (*facts["remarks"], column_notes, *_task_notes(facts, plans[0])):
        console.print(note, highlight=False, soft_wrap=True)


def _headline(facts: Mapping[str, Any]) -> str:
    """Returns the facts that all plans share, in one sentence."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    devices = "one device" if facts["devices"] == 1 else f"{facts['devices']} devices: {mesh}"
    codes = "" if facts["quantize"] == "none" else f" with {facts['quantize']} kernels"
    products = ""
    if facts["collective_matmul"]:
        products = f"collective matmul: {facts['collective_matmul']}, "
    chunk = facts["loss_chunk"]
    predictions = f"{chunk:,} predictions at a time" if chunk else "all predictions at once"
    return (
        f"{facts['model']} on {facts['topology']} ({devices}), "
        f"{facts['rows']} per step, {facts['dtype']}{codes}, attention: {facts['attention']}, "
        f"{products}the head: {predictions}, "
        f"optimizer: {facts['optimizer']}; compiled by the {facts['compiler'].upper()} compiler"
    )


def _needs_host_memory(plans: Sequence[Plan]) -> bool:
    """Returns True if a plan keeps activations in its host's memory."""
    return any(plan.per_chip_bytes["host"] for plan in plans)


def _memory_table(facts: Mapping[str, Any], plans: Sequence[Plan]) -> Table:
    """Returns the table of a device's memory."""
    capacity = _format_gib(plans[0].per_chip_bytes["capacity"])
    table = Table(title=f"Memory per device, in GiB (of {capacity})")
    # One column for the variant's name, and one for each share of the memory.
    table.add_column("")
    for share in facts["memory_shares"]:
        table.add_column(f"fits {share:g}" if facts["compiler"] == "gpu" else "fits")
    # One column for each use of the memory.
    programs_between = TASKS[facts["task"]].between
    memory_uses = [*_USES_OF_STEP, *programs_between, *_TOTAL_USES]
    if _needs_host_memory(plans):
        memory_uses.append("host")
    for memory_use in memory_uses:
        has_other_temporaries = memory_use == STEP and programs_between
        table.add_column("step" if has_other_temporaries else memory_use, justify="right")
    # One row for each variant.
    for plan in plans:
        fit_cells = ["yes" if is_fitting else "no" for is_fitting in plan.fits_share.values()]
        size_cells = [_format_gib(plan.per_chip_bytes.get(use)) for use in memory_uses]
        table.add_row(plan.name, *fit_cells, *size_cells)
    return table


def _work_table(
    facts: Mapping[str, Any],
    plans: Sequence[Plan],
    estimates: Sequence[Mapping[str, float | None]],
) -> Table:
    """Returns the table of a step's work, time and cost, and of the files' sizes."""
    cells: dict[str, list[str]] = {"": [plan.name for plan in plans]}
    cells["TFLOP"] = [
        _traced_mark(plan) + _format_scaled(plan.flops_per_step, 1e12) for plan in plans
    ]
    cells["GB sent"] = [_format_scaled(_total_bytes(plan.collective_bytes), 1e9) for plan in plans]
    if facts["slices"] > 1:
        cells["GB between"] = [
            _format_scaled(_total_bytes(plan.between_slices_bytes), 1e9, digits=4) for plan in plans
        ]
    has_estimate = any(plan.estimated_seconds is not None for plan in plans)
    cells["step"] = []
    for plan, estimate in zip(plans, estimates, strict=True):
        seconds = estimate["step_seconds"]
        is_assumed = has_estimate and plan.estimated_seconds is None and seconds is not None
        mark = _ASSUMED if is_assumed else ""
        cells["step"].append(_UNKNOWN if seconds is None else mark + step_time(seconds))
    cells["chip-hours"] = [_format_number(estimate["chip_hours"]) for estimate in estimates]
    if facts["price"] is not None:
        cells["cost"] = [_format_number(estimate["cost"]) for estimate in estimates]
    cells["adapter"] = [byte_size(plan.adapter_bytes) for plan in plans]
    cells["checkpoint"] = [byte_size(plan.checkpoint_bytes) for plan in plans]
    table = Table(title="Work and time")
    for column in cells:
        table.add_column(column, justify="right" if column else "left")
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return table


def _traced_mark(plan: Plan) -> str:
    """Returns a mark for FLOPs that were counted in the jaxpr, not in the compiled step."""
    return _TRACED if plan.flops_source == JAXPR else ""


def _column_notes(facts: Mapping[str, Any], plans: Sequence[Plan]) -> str:
    """Explains the columns of the tables, and the assumptions of the figures."""
    flops_source = "as traced" if facts["compiler"] == "gpu" else "from the optimised HLO"
    notes = (
        "base: frozen parameters; adapter: trained parameters; other: the batch, padding, the "
        f"program. TFLOP: per step on all devices, {flops_source}. "
        "GB sent: per device and step."
    )
    if facts["slices"] > 1:
        slice_word = "hosts" if facts["compiler"] == "gpu" else "slices"
        n_slices = facts["slices"]
        notes += f" GB between: the bytes of it that go between the {n_slices} {slice_word}."
    if _needs_host_memory(plans):
        notes += " host: memory of a device's host that the layers' inputs take, not in the total."
    if facts["compiler"] == "gpu":
        notes += (
            f" fits {facts['memory_shares'][0]:g}: within that share of the memory, which JAX "
            "reserves (XLA_PYTHON_CLIENT_MEM_FRACTION). Temporaries are the larger of those with "
            "Triton's products and with cuBLAS's. A plan does not see what lies outside of XLA's "
            "buffers: CUDA's context, NCCL's buffers, cuDNN's workspaces."
        )
    return f"{notes} {_time_note(facts, plans)}"


def _time_note(facts: Mapping[str, Any], plans: Sequence[Plan]) -> str:
    """Returns sentences about the sources of a step's time."""
    has_estimate = any(plan.estimated_seconds is not None for plan in plans)
    lacks_estimate = any(
        plan.estimated_seconds is None and plan.flops_per_chip is not None for plan in plans
    )
    notes: list[str] = []
    if has_estimate:
        notes.append(
            "step: the compiler's estimate of its time; the table of the estimate has its parts."
        )
    if facts["peak_flops_per_device"] is None:
        notes.append("Pass --peak-tflops to see the time of a step.")
    elif lacks_estimate or not has_estimate:
        peak = facts["peak_flops_per_device"] / 1e12
        option = "" if has_estimate else " (--utilisation)"
        mark = _ASSUMED.strip()
        subject = f"step, marked {mark}: its time" if has_estimate else "The time of a step"
        notes.append(
            f"{subject} assumes {100 * facts['utilisation']:g} % of the published peak, "
            f"{peak:,g} TFLOP/s{option}."
        )
    if facts["peak_flops_per_device"] is not None and not facts["tokens"]:
        notes.append("--tokens gives chip-hours.")
    return " ".join(notes)


def _task_notes(facts: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    """Yields lines on the programs between steps."""
    programs = TASKS[facts["task"]].between
    if programs:
        yield (
            f"{', '.join(('step', *programs))}: temporaries of each program, one of which runs at "
            f"a time; the total has the largest. TFLOP and time are of a step and its "
            f"{programs[0]}."
        )
    if SAMPLER in programs:
        flops = plan.sampled_token_flops
        step_flops = None if flops is None else facts["grad_accum"] * flops
        yield (
            "The sampler's temporaries include the cache of keys and values, "
            f"{_format_gib(plan.cache_bytes)} GiB on all devices. The work of the sampler comes on "
            f"top: {_format_scaled(step_flops, 1e12, digits=3)} TFLOP for a token of each "
            f"completion of a step, and up to {facts['max_new_tokens']} tokens."
        )


def _format_gib(size: int | None) -> str:
    return _UNKNOWN if size is None else f"{size / 2**30:,.2f}"


def _total_bytes(sizes: Mapping[str, int] | None) -> int | None:
    return None if sizes is None else sum(sizes.values())


def _format_scaled(value: int | None, unit: float, digits: int = 2) -> str:
    return _UNKNOWN if value is None else f"{value / unit:,.{digits}f}"


def _format_number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:,.2f}"
