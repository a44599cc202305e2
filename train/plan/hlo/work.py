"""The work of a compiled step, read from its optimised HLO: FLOPs of products, bytes sent.

XLA's own analysis counts the body of a loop once; here it counts once per iteration. All figures
are for one device.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from lora_jax.models.decoder.dispatch import UNEVEN
from train.plan.hlo.collectives import COLLECTIVES, collective_kind, sent_bytes
from train.plan.hlo.kernels import KernelCall, kernel_flops
from train.plan.hlo.module import SURPRISES, HloModule, Instruction, NotUnderstood
from train.plan.hlo.products import is_product, kernel_call, product_flops
from train.plan.hlo.slices import crosses, slice_transfer, transferred_bytes

Sent = Counter[tuple[str, bool]]  # (kind of collective, whether it leaves a slice) -> bytes


@dataclasses.dataclass(frozen=True)
class HloWork:
    """The work of one device in one call of a compiled function."""

    flops: int  # of matrix products and convolutions
    sent: dict[str, int]  # kind of collective -> bytes that it sends, in the order of `COLLECTIVES`
    kernels: tuple[KernelCall, ...] = ()  # the calls of kernels, each once
    between: dict[str, int] = dataclasses.field(default_factory=dict)  # those that leave a slice

    @property
    def sent_bytes(self) -> int:
        """The bytes that a device sends in collectives of all kinds."""
        return sum(self.sent.values())


def work_of(text: str, slices: Sequence[int] = ()) -> HloWork:
    """Counts the work of a module.

    A collective counts with its result or its operand, whichever is larger; a conditional with its
    costliest branch, but one for an uneven choice of experts with none.

    Args:
      text: the optimised HLO, as returned by ``compiled.as_text()``.
      slices: the slice of each device; see `train.plan.hlo.slices.slices_in_hlo`.

    Returns:
      The work of one device.

    Raises:
      NotUnderstood: the HLO has an unknown form, or does not say how often a loop runs.
    """
    try:
        return _work(HloModule(text), slices)
    except NotUnderstood:
        raise
    except SURPRISES as error:
        raise NotUnderstood(f"the HLO is not written as expected: {error!r}") from error


def is_rare(op: Instruction) -> bool:
    """Returns True for a branch that runs only where tokens choose experts unevenly."""
    return op.opcode == "conditional" and UNEVEN in op.op_name


def _work(module: HloModule, slices: Sequence[int]) -> HloWork:
    flops, sent = _count(module, module.entry, slices)
    calls = (
        kernel_call(op, computation)
        for computation in module.computations.values()
        for op in computation.values()
    )
    of_kinds = {kind: (sent[kind, False], sent[kind, True]) for kind in COLLECTIVES}
    return HloWork(
        flops,
        {kind: sum(sizes) for kind, sizes in of_kinds.items() if any(sizes)},
        tuple(call for call in calls if call),
        {kind: between for kind, (_, between) in of_kinds.items() if between},
    )


def _count(
    module: HloModule, name: str, slices: Sequence[int], caller: str = ""
) -> tuple[int, Sent]:
    flops, sent = 0, Sent()
    computation = module.computations[name]
    for op in computation.values():
        if is_product(op):
            flops += product_flops(op, computation)
        if call := kernel_call(op, computation):
            flops += kernel_flops(call)
        if (kind := collective_kind(op, name, caller)) is not None:
            if kind:
                size = sent_bytes(module, op, computation, kind)
                sent[kind, crosses(op.text, slices)] += size
            continue
        if op.opcode == "send" and (transfer := slice_transfer(op.text)):
            if transfer.kind not in COLLECTIVES:
                raise NotUnderstood(f"slices exchange data by {transfer.kind}")
            size = transferred_bytes(op, transfer, computation, len({*slices}))
            sent[transfer.kind, True] += size
        if is_rare(op):
            continue
        inner = [_count(module, called, slices, op.name) for called in op.called]
        if op.opcode == "conditional":
            inner = [max(inner, key=lambda side: (side[0], side[1].total()))]
        times = module.turns(op) if op.opcode == "while" and inner else 1
        for more_flops, more_sent in inner:
            flops += times * more_flops
            sent.update({kind: times * size for kind, size in more_sent.items()})
    return flops, sent
