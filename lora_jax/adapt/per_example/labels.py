"""Labels of a jaxpr's values: what is known about the axis of a batch's examples in each value."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lora_jax.core.axes import Label


@dataclasses.dataclass(frozen=True)
class ExampleAxis:
    """An axis that indexes the examples: element i belongs to ``i // n_consecutive % n``, of n.

    Attributes:
      axis: the axis, of size k·n·n_consecutive, which may be three axes merged to one.
      n_consecutive: the number of consecutive elements that belong to one example.
    """

    axis: int
    n_consecutive: int = 1


class MaskAxis(NamedTuple):
    """An axis of a mask [batch, seq], 0 or 1, and the axis of a value that holds its tokens."""

    axis: int
    location: ExampleAxis


@dataclasses.dataclass(frozen=True)
class TokenAxes:
    """The axes of a value that hold the tokens of a mask; see `lora_jax.adapt.per_example.tokens`.

    Attributes:
      mask: shape of the mask, [batch, seq].
      axes: the axes of the mask that can be followed.
      moved: the last equation that moved or cut the tokens, or an empty text.
    """

    mask: tuple[int, ...]
    axes: frozenset[MaskAxis]
    moved: str = dataclasses.field(default="", compare=False)

    def with_leading_axes(self, n_axes: int) -> "TokenAxes":
        """Returns the label after adding leading axes, or removing one (-1)."""
        axes: set[MaskAxis] = set()
        for mask_axis, location in self.axes:
            axis = location.axis + n_axes
            if axis >= 0:
                axes.add(MaskAxis(mask_axis, ExampleAxis(axis, location.n_consecutive)))
        return TokenAxes(self.mask, frozenset(axes), self.moved)


@dataclasses.dataclass(frozen=True)
class ExampleKernels:
    """A weight with an adapter for each example, which only products may use.

    Attributes:
      roles: axis roles of the weight.
    """

    roles: tuple[Label, ...]


@dataclasses.dataclass(frozen=True)
class MixedExamples:
    """Marks a value in which one example's part depends on others, or cannot be located.

    Attributes:
      why: the first equation that does so: its primitive, its place, and what it does.
    """

    why: str


@dataclasses.dataclass(frozen=True)
class UnvisitedCarry:
    """Marks the carry of a loop before the first of its steps has been followed."""


# None: the value is the same whatever the examples and their adapters are.
ExampleLabel = ExampleAxis | TokenAxes | ExampleKernels | MixedExamples | UnvisitedCarry | None


class MixingError(Exception):
    """Raised by a rule if an equation mixes examples; the message says how."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleLabels:
    """The labels of a jaxpr's outputs and uses, given the labels of its inputs.

    Attributes:
      outputs: what is known of each output.
      uses: what is known of the other operand, by the identity of each equation that may meet
        `ExampleKernels`.
      inner_labels: the labels of the inner jaxprs of these equations, by the jaxpr's identity.
    """

    outputs: tuple[ExampleLabel, ...]
    uses: Mapping[int, ExampleLabel]
    inner_labels: Mapping[int, "ExampleLabels"]


def join_labels(a: ExampleLabel, b: ExampleLabel) -> ExampleLabel:
    """Returns the label of a value that is either of two values."""
    for label, other_label in ((a, b), (b, a)):
        is_other_same_for_all = other_label is None and not isinstance(label, ExampleKernels)
        if (
            isinstance(other_label, UnvisitedCarry)
            or isinstance(label, MixedExamples)
            or is_other_same_for_all
        ):
            return label
    if a == b:
        return a
    return MixedExamples("the examples lie along different axes in two branches or steps")


def common_example_axis(labels: Iterable[ExampleLabel]) -> ExampleAxis:
    """Returns the example axis that all labelled operands share.

    Raises:
      MixingError: the operands differ.
    """
    example_axes = {label for label in labels if isinstance(label, ExampleAxis)}
    if len(example_axes) != 1:
        raise MixingError("joins values whose examples lie along different axes")
    return example_axes.pop()


def axis_after_reshape(
    examples: ExampleAxis, n_examples: int, shape: Sequence[int], result_shape: Sequence[int]
) -> ExampleAxis:
    """Returns the example axis after a reshape.

    Args:
      examples: their axis before it.
      n_examples: the number of examples.
      shape, result_shape: the shape before it, and after.

    Raises:
      MixingError: the axis is split between two examples or within.
    """
    example_stride = examples.n_consecutive * math.prod(shape[examples.axis + 1 :])  # in elements
    axis_stride = 1  # of an axis of the result, in elements
    candidates: list[ExampleAxis] = []
    for axis in reversed(range(len(result_shape))):
        axis_span = axis_stride * result_shape[axis]
        # A step along this axis must not lead into the middle of another example.
        if axis_span and example_stride % axis_stride == 0:
            holds_all_examples = axis_span % (example_stride * n_examples) == 0
            if holds_all_examples:
                candidates.append(ExampleAxis(axis, example_stride // axis_stride))
        axis_stride = axis_span
        if not axis_stride:
            break
    if not candidates:
        raise MixingError("splits the axis of the examples")

    def preference(candidate: ExampleAxis) -> tuple[int, bool, int]:
        """Returns a sort key: least merged axis first, then an unmoved one."""
        return candidate.n_consecutive, candidate.axis != examples.axis, candidate.axis

    return min(candidates, key=preference)  # of one example, several axes fit
