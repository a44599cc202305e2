"""The FLOPs of a plan: from its HLO, checked against the step's jaxpr, or from the jaxpr alone.

The HLO states the work and the traffic of the devices, including what the partitioner adds. Its
text is internal to the compiler and may change. The jaxpr, which is the step as traced, is the
check of what was read, and the fallback. A failure of either does not end a plan.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax.models.decoder.dispatch import UNEVEN
from train.plan.clock.work import HloWork, NotUnderstood, work_of
from train.plan.flops.jaxpr import Count, count_flops
from train.plan.hlo.kernels import kernel_lines, unlisted_kernels

HLO, JAXPR = "hlo", "jaxpr"
_MAX_FLOPS_RATIO = 1.5  # times the jaxpr's FLOPs: above, devices repeat each other's work
_UNKNOWN_LOOPS_NOTE = (
    "loops whose length the program does not say, and that have no products, count once"
)
_EVEN_EXPERTS_NOTE = (
    "experts that devices share over the mesh's axis expert count as if tokens chose all of them "
    "equally often; where they run in blocks, the slack of a device's first turn counts, too"
)
_MIN_FLOPS_RATIO = 0.9  # times the jaxpr's FLOPs: below, some products were not recognised


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepWork:
    """The work of a compiled step; None for unknown quantities.

    Attributes:
      source: "hlo" or "jaxpr"; None if neither was understood.
      per_step, per_chip: FLOPs on all devices, and on one.
      traced: FLOPs of the jaxpr.
      sent: kind of collective -> bytes that a device sends.
      between: part of these bytes that leaves a slice, likewise.
      kernels: the kernels in the compiled step, in words.
      notes: remarks on the figures, in sentences.
    """

    source: str | None
    per_step: int | None
    per_chip: int | None
    traced: int | None
    sent: dict[str, int] | None
    between: dict[str, int] | None
    kernels: tuple[str, ...] | None
    notes: tuple[str, ...]


def hlo_text_of(compiled: jax.stages.Compiled) -> str | None:
    """Returns the optimised HLO of a program; None if XLA cannot write it as text."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None


def step_work(
    text: str | None,
    counted: Count | None,
    n_devices: int,
    products_in_hlo: bool = True,
    slices: Sequence[int] = (),
) -> StepWork:
    """Returns the work of a step, from its HLO if it is understood.

    Args:
      text: the optimised HLO; None if there is none.
      counted: the count of the step's jaxpr; None if it was not understood.
      n_devices: the number of devices that share the step.
      products_in_hlo: whether the HLO shows products; if not, their FLOPs are the jaxpr's.
      slices: the slice of each device; see `train.plan.hlo.slices.slices_in_hlo`.
    """
    try:
        if text is None:
            raise NotUnderstood("XLA cannot write it")
        work = work_of(text, slices)
    except NotUnderstood as error:
        return _traced_work(counted, n_devices, str(error))
    figure_notes: list[str] = []
    if UNEVEN in text:
        figure_notes.append(_EVEN_EXPERTS_NOTE)
    if work.loops_counted_once:
        figure_notes.append(_UNKNOWN_LOOPS_NOTE)
    if not products_in_hlo:
        traced_work = _traced_work(counted, n_devices, None)
        return dataclasses.replace(
            traced_work,
            sent=work.sent,
            between=work.between,
            kernels=kernel_lines(work.kernels),
            notes=(*traced_work.notes, *figure_notes),
        )
    return StepWork(
        source=HLO,
        per_step=work.flops * n_devices,
        per_chip=work.flops,
        traced=counted and counted.flops,
        sent=work.sent,
        between=work.between,
        kernels=kernel_lines(work.kernels),
        notes=(*_count_notes(work, counted, n_devices), *figure_notes),
    )


def combine_works(works: Sequence[tuple[int, StepWork]]) -> StepWork:
    """Returns the sum of several programs' work; None for quantities that one program lacks."""

    def total(field: str) -> int | None:
        """Returns the weighted sum of a field of all programs; None if one program lacks it."""
        flops = 0
        for times, work in works:
            program_flops = getattr(work, field)
            if program_flops is None:
                return None
            flops += times * program_flops
        return flops

    def sum_by_kind(field: str) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for times, work in works:
            bytes_of_kind = getattr(work, field) or {}
            totals.update({kind: times * n_bytes for kind, n_bytes in bytes_of_kind.items()})
        return dict(totals)

    sources: set[str | None] = set()
    kernels: list[str] = []
    notes: list[str] = []
    for _, work in works:
        sources.add(work.source)
        kernels += work.kernels or ()
        notes += work.notes
    source: str | None = HLO
    if None in sources:
        source = None
    elif JAXPR in sources:
        source = JAXPR
    is_traffic_known = all(work.sent is not None for _, work in works)
    return StepWork(
        source=source,
        per_step=total("per_step"),
        per_chip=total("per_chip"),
        traced=total("traced"),
        sent=sum_by_kind("sent") if is_traffic_known else None,
        between=sum_by_kind("between") if is_traffic_known else None,
        kernels=tuple(dict.fromkeys(kernels)) if is_traffic_known else None,
        notes=tuple(dict.fromkeys(notes)),
    )


def count_traced(jaxpr: Any) -> Count | None:
    """Counts the FLOPs of a jaxpr; returns None if it has equations of an unknown form."""
    try:
        return count_flops(jaxpr)
    except Exception:  # a check only; a newer JAX may rename anything
        return None


def _traced_work(counted: Count | None, n_devices: int, hlo_problem: str | None) -> StepWork:
    """Returns the work counted in the jaxpr, with a note on its omissions.

    Args:
      counted: the count of the jaxpr; None if it was not understood.
      n_devices: the number of devices.
      hlo_problem: the reason why the HLO is not understood; None on a machine whose HLO never
        shows products.
    """
    note = ""
    if hlo_problem is not None:
        note = (
            f"the HLO was not understood ({hlo_problem}), so the traffic between devices is not "
            "known; "
        )
    if counted is None:
        note += "the FLOPs are not known: the jaxpr was not understood either"
    else:
        note += "the FLOPs are those of the step as traced, without work added by the partitioner"
        if not counted.exact:
            note += ", and loops of unknown length are counted once"
    is_remarkable = hlo_problem is not None or counted is None or not counted.exact
    return StepWork(
        source=counted and JAXPR,
        per_step=counted and counted.flops,
        per_chip=counted and round(counted.flops / n_devices),
        traced=counted and counted.flops,
        sent=None,
        between=None,
        kernels=None,
        notes=(note,) if is_remarkable else (),
    )


def _count_notes(work: HloWork, counted: Count | None, n_devices: int) -> tuple[str, ...]:
    """Returns notes on uncounted kernels, and on counts that differ too much."""
    unknown_kernels = unlisted_kernels(work.kernels)
    if unknown_kernels:
        names = ", ".join(unknown_kernels)
        return (f"the FLOPs leave out kernels that the plan does not know: {names}",)
    if counted is None or not counted.exact or counted.flops == 0:  # nothing to compare with
        return ()
    ratio = work.flops * n_devices / counted.flops
    if _MIN_FLOPS_RATIO <= ratio <= _MAX_FLOPS_RATIO:
        return ()
    cause = "some of its products may not have been recognised"
    if ratio > _MAX_FLOPS_RATIO:
        cause = "the partitioner makes devices repeat each other's work"
    return (f"the HLO has {ratio:.2f} times the FLOPs of the step as traced: {cause}",)
