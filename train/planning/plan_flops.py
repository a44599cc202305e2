"""The source of a plan's FLOPs: its HLO, checked by the step's jaxpr, or the jaxpr alone.

The HLO says what the devices do, the partitioner's work among it, and what they send. Its text is
the compiler's own and may change; so the jaxpr, which is the step as traced, tells whether it was
read well, and stands in where it was not. Neither ends a plan.
"""

import dataclasses
from typing import Any

from train.planning.hlo import NotUnderstood, Work, work_of
from train.planning.jaxpr_flops import Count, count_flops

HLO, JAXPR = "hlo", "jaxpr"
_DUPLICATED = 1.5  # times the jaxpr's: from there on the devices do the same work several times
_MISSED = 0.9  # times the jaxpr's: below, products were taken for something else


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepWork:
    """The work of a compiled step, as far as it is known; None is what is not.

    Attributes:
      source: "hlo" or "jaxpr"; None where neither was understood.
      per_step, per_chip: FLOPs on all devices, and on one.
      traced: FLOPs of the jaxpr.
      sent: kind of collective -> bytes that a device sends or receives.
      notes: what there is to know of the figures, in sentences.
    """

    source: str | None
    per_step: int | None
    per_chip: int | None
    traced: int | None
    sent: dict[str, int] | None
    notes: tuple[str, ...]


def step_work(text: str | None, counted: Count | None, n_devices: int) -> StepWork:
    """Returns the work of a step, from its HLO if that is understood.

    Args:
      text: the optimised HLO; None where the compiler gives none.
      counted: the count of the step's jaxpr; None where there is none.
      n_devices: how many devices share the step.
    """
    try:
        work = work_of(text or "")
    except NotUnderstood as error:
        return _from_jaxpr(counted, n_devices, str(error))
    return StepWork(
        source=HLO,
        per_step=work.flops * n_devices,
        per_chip=work.flops,
        traced=counted and counted.flops,
        sent=work.sent,
        notes=_compared(work, counted, n_devices),
    )


def count_traced(jaxpr: Any) -> Count | None:
    """Counts the FLOPs of a jaxpr; None where it has equations of another form than is known."""
    try:
        return count_flops(jaxpr)
    except Exception:  # a check, and a later JAX may name anything otherwise: no plan ends by it
        return None


def _from_jaxpr(counted: Count | None, n_devices: int, why: str) -> StepWork:
    note = f"the HLO was not understood ({why}), so that what devices send is not known"
    if counted is None:
        note += ", nor are FLOPs: the jaxpr was not understood either"
    else:
        note += "; FLOPs are those of the step as traced, without what the partitioner adds"
        if not counted.exact:
            note += ", and with loops whose turns are not known counted once"
    return StepWork(
        source=counted and JAXPR,
        per_step=counted and counted.flops,
        per_chip=counted and round(counted.flops / n_devices),
        traced=counted and counted.flops,
        sent=None,
        notes=(note,),
    )


def _compared(work: Work, counted: Count | None, n_devices: int) -> tuple[str, ...]:
    """Returns a note where the two counts are too far apart."""
    if counted is None or not counted.exact or not counted.flops:
        return ()
    ratio = work.flops * n_devices / counted.flops
    if ratio > _DUPLICATED:
        why = "the partitioner has devices do the same work"
    elif ratio < _MISSED:
        why = "some of its products may not have been recognised"
    else:
        return ()
    return (f"the HLO has {ratio:.2f} times the FLOPs of the step as traced: {why}",)
