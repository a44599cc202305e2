"""Follows the tokens of a mask, [batch, seq], to the rows of products: these must be in its order.

Both axes of the mask are followed as examples are, along each axis of a value that they lie along.
An axis that a primitive takes apart or sums over holds no tokens afterwards.
"""

from collections.abc import Iterable, Sequence

from lora_jax.adapt.per_example.labels import (
    ExampleAxis,
    ExampleLabel,
    MaskAxis,
    MixedExamples,
    MixingError,
    TokenAxes,
)
from lora_jax.adapt.per_example.primitives import Rule
from lora_jax.adapt.user_code import place_of
from lora_jax.core.extend import JaxprEqn

Shape = tuple[int, ...]


def tokens_of(shape: Shape, masks: Iterable[Shape]) -> TokenAxes | None:
    """Returns the label of an array whose leading axes are those of a mask, or both as one axis."""
    for mask in masks:
        if shape[:2] == mask:
            return TokenAxes(mask, _ordered_axes(mask, (0, 1)))
        if shape[:1] == (mask[0] * mask[1],):
            return TokenAxes(mask, _ordered_axes(mask, (0,)))
    return None


def wrong_order(label: ExampleLabel, rows: Sequence[int], mask: Shape) -> str:
    """Returns the reason why rows are not known to be in a mask's order; empty if they are.

    Args:
      label: the label of the array.
      rows: the axis or the two axes that hold the rows, which are as many as the tokens.
      mask: shape of the mask.
    """
    reason, axes = "they come from no argument whose first axes are the mask's", set[MaskAxis]()
    if isinstance(label, MixedExamples):
        reason = label.why
    elif isinstance(label, TokenAxes) and label.mask == mask:
        reason = label.moved or reason
        axes = {axis for axis in label.axes if axis.location.axis in rows}
    return "" if axes == _ordered_axes(mask, rows) else reason


def _ordered_axes(mask: Shape, rows: Sequence[int]) -> frozenset[MaskAxis]:
    """Returns the axes of a mask in its order; those of one element are left out."""
    batch = ExampleAxis(rows[0], 1 if len(rows) > 1 else mask[1])
    axes = (MaskAxis(0, batch), MaskAxis(1, ExampleAxis(rows[-1])))
    return frozenset(axis for axis in axes if mask[axis.number] > 1)


def follow_axes(rule: Rule, eqn: JaxprEqn, labels: Sequence[ExampleLabel]) -> list[ExampleLabel]:
    """Returns the labels of an equation's outputs, by its rule for examples along one axis.

    Args:
      rule: see `lora_jax.adapt.per_example.primitives`.
      eqn: the equation.
      labels: labels of the operands, `TokenAxes` among them.

    Raises:
      MixingError: the equation moves tokens along one of their axes.
    """
    name = eqn.primitive.name
    moves = name == "transpose"
    mask = next(label.mask for label in labels if isinstance(label, TokenAxes))
    outputs = [set[MaskAxis]() for _ in eqn.outvars]
    tokens = ((n, label) for n, label in enumerate(labels) if isinstance(label, TokenAxes))
    operands = {n: label for n, label in tokens if label.mask == mask}
    for operand, label in operands.items():
        for number, location in label.axes:
            single = [location if n == operand else None for n in range(len(labels))]
            try:
                results = rule(eqn, single, mask[number])
            except MixingError:
                if name.startswith(_REORDERS):
                    raise MixingError("changes it") from None
                results = [location] if name.startswith("cum") else []
                moves |= not name.startswith(_SUMS)
            for output, result in zip(outputs, results, strict=False):
                if isinstance(result, ExampleAxis):
                    output.add(MaskAxis(number, result))
    moved = next((label.moved for label in operands.values() if label.moved), "")
    moved = f"{name!r} at {place_of(eqn)} changes it" if moves else moved
    return [TokenAxes(mask, frozenset(axes), moved) for axes in outputs]


# How the names of primitives begin that may change the order of tokens along an axis, and of those
# that add up all tokens, or the tokens so far.
_REORDERS = ("rev", "gather", "sort", "top_k", "scatter", "dynamic_slice")
_SUMS = ("reduce", "dot_general", "arg", "cum")
