"""Multiplies values that have examples, by weights that have an adapter for each of them too."""

from collections.abc import Sequence

from lora_jax.adapt.eqns import type_of
from lora_jax.adapt.per_example.indexing import INDEXING_RULES
from lora_jax.adapt.per_example.labels import ExampleAxis, ExampleKernels, ExampleLabel, MixingError
from lora_jax.adapt.per_example.primitives import Rule, each, shape_of
from lora_jax.adapt.rules.axis_maps import axis_map
from lora_jax.adapt.rules.layout import labels_after
from lora_jax.core.extend import JaxprEqn


def _dot_general(eqn: JaxprEqn, given: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    contract, batch = eqn.params["dimension_numbers"]
    free = [
        [a for a in range(len(shape_of(eqn, side))) if a not in (*contract[side], *batch[side])]
        for side in (0, 1)
    ]
    axes: list[ExampleLabel] = []
    for side, at in enumerate(given):
        if not isinstance(at, ExampleAxis):
            continue
        if at.axis in contract[side]:
            raise MixingError("contracts the axis of the examples")
        order = (
            [*batch[0], *free[0]] if side == 0 else [*batch[1], *[None] * len(free[0]), *free[1]]
        )
        axes.append(ExampleAxis(order.index(at.axis), at.inner))
    if len(set(axes)) != 1:
        raise MixingError("multiplies examples by other examples")
    return axes[:1]


def _convolution(eqn: JaxprEqn, given: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    at, numbers = given[0], eqn.params["dimension_numbers"]
    if given[1] is not None and not isinstance(given[1], ExampleKernels):
        raise MixingError("has examples in its kernel")
    if not isinstance(at, ExampleAxis) or at.axis != numbers.lhs_spec[0]:
        raise MixingError("has the examples along another axis than its batch")
    if eqn.params["batch_group_count"] != 1:
        raise MixingError("has groups of examples")
    return [ExampleAxis(numbers.out_spec[0], at.inner)]


PRODUCT_RULES: dict[str, Rule] = {
    **INDEXING_RULES,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}


def _product(eqn: JaxprEqn, given: Sequence[ExampleLabel], n: int) -> list[ExampleLabel]:
    """A product of each example with its own weight."""
    if sum(isinstance(label, ExampleKernels) for label in given) > 1:
        raise MixingError("multiplies an adapted weight by another one")
    if not any(isinstance(label, ExampleAxis) for label in given):
        raise MixingError(
            "multiplies an adapted weight by a value that is the same for all examples"
        )
    plain = [None if isinstance(label, ExampleKernels) else label for label in given]
    return PRODUCT_RULES[eqn.primitive.name](eqn, plain, n)


def _looked_up(eqn: JaxprEqn, given: Sequence[ExampleLabel], n: int) -> list[ExampleLabel]:
    """A look-up of each example's indices in a table of its own."""
    table, index = given[0], eqn.params["dimension_numbers"].start_index_map
    if not isinstance(table, ExampleKernels) or [table.roles[a] for a in index] != ["in"]:
        raise MixingError("indexes a stack of adapted weights")
    return _product(eqn, given, n)


def _moved(eqn: JaxprEqn, given: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    """A transpose, a reshape, …, of the weight."""
    weight, places = _only(given), axis_map(eqn)
    shape, out = shape_of(eqn), type_of(eqn.outvars[0]).shape
    roles = None if places is None else labels_after(weight.roles, shape, places, out)
    if roles is None:
        raise MixingError("mixes the in and out axes of an adapted weight")
    return [ExampleKernels(tuple(roles))]


def _kept(eqn: JaxprEqn, given: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    return [_only(given)] * len(eqn.outvars)


def _cut(eqn: JaxprEqn, given: Sequence[ExampleLabel], _: int) -> list[ExampleLabel]:
    """A part of the weight, of more than one row: that would be formed."""
    weight, shape = _only(given), shape_of(eqn)
    ins = [axis for axis, role in enumerate(weight.roles) if role == "in"]
    for out in eqn.outvars:
        if all(type_of(out).shape[axis] == 1 for axis in ins) and any(shape[a] > 1 for a in ins):
            raise MixingError("takes a row of an adapted weight")
    return [weight] * len(eqn.outvars)


def _only(given: Sequence[ExampleLabel]) -> ExampleKernels:
    """Returns the weight, which is the first operand, and the only one that is not the same."""
    first, *others = given
    if not isinstance(first, ExampleKernels) or any(label is not None for label in others):
        raise MixingError("joins an adapted weight with something else")
    return first


# For equations with `ExampleKernels` among their operands. Others would form the weight.
KERNEL_RULES: dict[str, Rule] = {
    "dot_general": _product,
    "conv_general_dilated": _product,
    "gather": _looked_up,
    **dict.fromkeys(("transpose", "squeeze", "broadcast_in_dim", "reshape"), _moved),
    **dict.fromkeys(("slice", "dynamic_slice", "split"), _cut),
    **dict.fromkeys(("convert_element_type", "copy", "copy_p", "name", "stop_gradient"), _kept),
    **dict.fromkeys(("optimization_barrier", "device_put", "sharding_constraint", "reshard"), each),
}
