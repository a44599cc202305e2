"""Follows the tokens of a mask, [batch, seq], to the rows of products, and checks their order.

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
from lora_jax.adapt.user_code import user_line_of
from lora_jax.core.extend import JaxprEqn

Shape = tuple[int, ...]


def label_of_tokens(shape: Shape, masks: Iterable[Shape]) -> TokenAxes | None:
    """Returns the label of an array that starts with a mask's axes, separate or merged."""
    for mask in masks:
        if shape[:2] == mask:
            return TokenAxes(mask, _ordered_axes(mask, (0, 1)))
        if shape[:1] == (mask[0] * mask[1],):
            return TokenAxes(mask, _ordered_axes(mask, (0,)))
    return None


def wrong_order_reason(label: ExampleLabel, row_axes: Sequence[int], mask: Shape) -> str:
    """Returns the reason why rows may not be in a mask's order, or "" if they are.

    Args:
      label: the label of the array.
      row_axes: the axis or the two axes that hold the rows, which are as many as the tokens.
      mask: shape of the mask.
    """
    reason = "the rows come from no argument whose first axes are those of the mask"
    axes_in_rows: set[MaskAxis] = set()
    if isinstance(label, MixedExamples):
        reason = label.why
    elif isinstance(label, TokenAxes) and label.mask == mask:
        reason = label.moved or reason
        axes_in_rows = {axis for axis in label.axes if axis.location.axis in row_axes}
    return "" if axes_in_rows == _ordered_axes(mask, row_axes) else reason


def _ordered_axes(mask: Shape, row_axes: Sequence[int]) -> frozenset[MaskAxis]:
    """Returns the axes of a mask that have more than one element, in order.

    Args:
      mask: shape of the mask.
      row_axes: the two axes of a value that hold the tokens, or one that holds both.
    """
    n_batch, n_seq = mask
    n_consecutive = n_seq if len(row_axes) == 1 else 1
    axes: set[MaskAxis] = set()
    if n_batch > 1:
        axes.add(MaskAxis(0, ExampleAxis(row_axes[0], n_consecutive)))
    if n_seq > 1:
        axes.add(MaskAxis(1, ExampleAxis(row_axes[-1])))
    return frozenset(axes)


def follow_axes(rule: Rule, eqn: JaxprEqn, labels: Sequence[ExampleLabel]) -> list[ExampleLabel]:
    """Returns the labels of outputs, by applying a rule for example axes to each mask axis.

    The rule is applied once for each axis of the mask in each operand.

    Args:
      rule: see `lora_jax.adapt.per_example.primitives`.
      eqn: the equation.
      labels: labels of the operands, `TokenAxes` among them.

    Raises:
      MixingError: the equation moves tokens along one of their axes.
    """
    name = eqn.primitive.name
    mask = next(label.mask for label in labels if isinstance(label, TokenAxes))
    axes_of_output = [set[MaskAxis]() for _ in eqn.outvars]
    moves_tokens = name == "transpose"
    move_before = ""  # the last equation before this one that moved the tokens
    for operand_index, label in enumerate(labels):
        if not isinstance(label, TokenAxes) or label.mask != mask:
            continue
        move_before = move_before or label.moved
        for mask_axis, location in label.axes:
            # The axis of the mask is followed as if it held examples, in this operand alone.
            labels_of_axis: list[ExampleLabel] = [None] * len(labels)
            labels_of_axis[operand_index] = location
            try:
                results = rule(eqn, labels_of_axis, mask[mask_axis])
            except MixingError:
                if name.startswith(_REORDERS):
                    raise MixingError("changes it") from None
                is_accumulated = name.startswith("cum")
                results = [location] if is_accumulated else []
                moves_tokens |= not name.startswith(_SUMS)
            for output_axes, result in zip(axes_of_output, results, strict=False):
                if isinstance(result, ExampleAxis):
                    output_axes.add(MaskAxis(mask_axis, result))
    moved = f"{name!r} at {user_line_of(eqn)} changes it" if moves_tokens else move_before
    return [TokenAxes(mask, frozenset(axes), moved) for axes in axes_of_output]


# How the names of primitives begin that may change the order of tokens along an axis, and of those
# that add up all tokens, or the tokens so far.
_REORDERS = ("rev", "gather", "sort", "top_k", "scatter", "dynamic_slice")
_SUMS = ("reduce", "dot_general", "arg", "cum")
