"""The work of a compiled step, read from its optimised HLO: FLOPs of products, bytes sent.

XLA's own analysis counts the body of a loop once; here it counts once per iteration. All figures
are for one device.
"""

import dataclasses
from collections.abc import Sequence

from train.plan.clock.walk import LOOP_COUNTED_ONCE, Walk
from train.plan.hlo.collectives import COLLECTIVES
from train.plan.hlo.kernels import KernelCall
from train.plan.hlo.module import PARSE_ERRORS, HloModule, NotUnderstood
from train.plan.hlo.products import kernel_call


@dataclasses.dataclass(frozen=True)
class HloWork:
    """The work of one device in one call of a compiled function."""

    flops: int  # of matrix products and convolutions
    sent: dict[str, int]  # kind of collective -> bytes that it sends, in the order of `COLLECTIVES`
    kernels: tuple[KernelCall, ...] = ()  # the calls of kernels, each once
    between: dict[str, int] = dataclasses.field(default_factory=dict)  # those that leave a slice
    loops_counted_once: int = 0  # loops of unknown length, without products and collectives

    @property
    def sent_bytes(self) -> int:
        """The bytes that a device sends in collectives of all kinds."""
        return sum(self.sent.values())


def work_of(text: str, slices: Sequence[int] = ()) -> HloWork:
    """Counts the work of a module.

    A collective counts with the bytes that one device sends; see `collectives.ring_bytes`. A
    conditional counts with its costliest branch. One for an uneven choice of experts counts with
    its cheapest branch, and a loop over the turns of such a choice with none.

    Args:
      text: the optimised HLO, as returned by ``compiled.as_text()``.
      slices: the slice of each device; see `train.plan.hlo.slices.slices_in_hlo`.

    Returns:
      The work of one device.

    Raises:
      NotUnderstood: the HLO has an unknown form, or does not say how often a loop runs.
    """
    try:
        return _count_work(HloModule(text), slices)
    except NotUnderstood:
        raise
    except PARSE_ERRORS as error:
        raise NotUnderstood(f"the HLO is not written as expected: {error!r}") from error


def _count_work(module: HloModule, slices: Sequence[int]) -> HloWork:
    """Counts the work of a module; see `work_of`."""
    walk = Walk(module, rates=None, n_slices=len({*slices}), slices=slices)
    tally = walk.tally(module.entry)
    calls: list[KernelCall] = []
    for computation in module.computations.values():
        for op in computation.values():
            call = kernel_call(op, computation)
            if call:
                calls.append(call)
    sent_bytes: dict[str, int] = {}
    bytes_between_slices: dict[str, int] = {}
    for kind in COLLECTIVES:
        leaving_bytes = tally.sent[kind, True]
        total_bytes = tally.sent[kind, False] + leaving_bytes
        if total_bytes:
            sent_bytes[kind] = total_bytes
        if leaving_bytes:
            bytes_between_slices[kind] = leaving_bytes
    return HloWork(
        flops=sum(cost.flops for cost in tally.costs.values()),
        sent=sent_bytes,
        kernels=tuple(calls),
        between=bytes_between_slices,
        loops_counted_once=tally.unknown[LOOP_COUNTED_ONCE],
    )
