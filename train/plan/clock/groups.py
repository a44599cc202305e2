"""Assigns each instruction to a group of a step's work, by the scopes in its `op_name`."""

import re
from typing import NamedTuple

from lora_jax.core.names import FACTORS
from train.plan.hlo.kernels import kernel_of
from train.plan.hlo.module import Computation, HloModule, Instruction, is_scalar
from train.plan.hlo.origins import KernelOrigins
from train.plan.hlo.products import is_product, kernel_call, product_flops

BASE, ADAPTER, ATTENTION, HEAD = "base products", "A and B", "attention", "head and loss"
ELEMENTWISE, COPIES, COLLECTIVES = "norms and elementwise", "copies", "collectives"
UPDATE = "optimizer"  # what belongs to neither the loss nor its gradient
GROUPS = (BASE, ADAPTER, ATTENTION, HEAD, ELEMENTWISE, COPIES, UPDATE, COLLECTIVES)
FORWARD, RECOMPUTED, BACKWARD, AFTER = "forward", "recomputed", "backward", ""
PHASES = (FORWARD, RECOMPUTED, BACKWARD, AFTER)

_ADAPTER = re.compile(rf"(^|[/(]){FACTORS}([/)]|$)")
_HEAD = re.compile(r"(^|[/.])(lm_head|head|score|logits|embed_out)([/)]|$)")
_ATTENTION = re.compile(r"(^|/)(attention|windowed_\d+_of_\d+|blocks_\d+\w*|\w*splash\w*)(/|$)")
_SCOPES = ((ADAPTER, _ADAPTER), (ATTENTION, _ATTENTION), (HEAD, _HEAD))
_FUNCTION = re.compile(r"^jit\([^()]*\)/")  # its name may be any, such as lora or head
_LOSS = re.compile(r"jvp\(\)")  # outside of any module
_GRADIENT = re.compile(r"\b(jvp|transpose)\(")
# Move or cast numbers, and compute nothing; indices and other scalars do not count.
_MOVES = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy", "transpose"}
_MOVES |= {"reshape", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad"}
_MOVES |= {"broadcast", "convert", "fusion", "custom-call"}


class Group(NamedTuple):
    """A group of instructions that belong to one part of the model and one phase.

    Attributes:
      name: one of `GROUPS`.
      phase: one of `PHASES`: "" for the optimiser, and what else stands outside of the gradient.
    """

    name: str
    phase: str


def group_of(
    module: HloModule,
    op: Instruction,
    computation: Computation,
    origins: KernelOrigins | None = None,
) -> Group:
    """Returns the group of an instruction, by the scope of its largest product or its own scope.

    Args:
      module: the module.
      op: the instruction.
      computation: its computation.
      origins: the kernels of the module. If given, a product of two activations whose scope names
        no group is attention.
    """
    call = kernel_call(op, computation)
    if call:
        kernel = kernel_of(call)
        is_attention = kernel is not None and ATTENTION in kernel.label
        name = ATTENTION if is_attention else _group_named_in(call.scope) or BASE
        return Group(name, phase_of(call.scope))
    products = _products_in(module, op, computation)
    if products:
        largest = max(products, key=lambda product: product[:2])
        _, largest_scope, product, product_computation = largest
        scope = largest_scope or scope_of(module, op)
        is_attention = origins is not None and origins.multiplies_activations(
            product, product_computation
        )
        name = _group_named_in(scope) or (ATTENTION if is_attention else BASE)
        return Group(name, phase_of(scope))
    scope = scope_of(module, op)
    phase = phase_of(scope)
    if _only_moves_data(module, op, computation):
        return Group(COPIES, phase)
    if phase == AFTER:
        return Group(UPDATE, phase)
    is_loss = _LOSS.search(scope) is not None
    return Group(_group_named_in(scope) or (HEAD if is_loss else ELEMENTWISE), phase)


def phase_of(scope: str) -> str:
    """Returns the phase of a scope, one of `PHASES`."""
    if "rematted_computation" in scope:
        return RECOMPUTED
    if "transpose(" in scope:
        return BACKWARD
    return FORWARD if _GRADIENT.search(scope) else AFTER


def scope_of(module: HloModule, op: Instruction) -> str:
    """Returns the `op_name` of an instruction or of an inner one, or "" if none has scopes."""
    if "/" in op.op_name:
        return op.op_name
    inner_names = [inner.op_name for inner, _ in module.inside(op) if "/" in inner.op_name]
    return inner_names[-1] if inner_names else ""


def _group_named_in(scope: str) -> str | None:
    """Returns the group that a scope names; None if it names none."""
    scope = _FUNCTION.sub("", scope)
    for name, pattern in _SCOPES:
        if pattern.search(scope):
            return name
    return None


def _products_in(
    module: HloModule, op: Instruction, computation: Computation
) -> list[tuple[int, str, Instruction, Computation]]:
    """Returns the FLOPs and the scope of each product of an instruction, with the product."""
    return [
        (product_flops(inner, inner_computation), inner.op_name, inner, inner_computation)
        for inner, inner_computation in ((op, computation), *module.inside(op))
        if is_product(inner)
    ]


def _only_moves_data(module: HloModule, op: Instruction, computation: Computation) -> bool:
    """Returns True if an instruction and its inner ones only move or cast arrays."""
    return all(
        inner.opcode in _MOVES
        for inner, _ in ((op, computation), *module.inside(op))
        if not is_scalar(inner)
    )
