"""The facts that are known of a value of a jaxpr: the axis that holds the examples of a batch."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lora_jax.core.axes import Label


@dataclasses.dataclass(frozen=True)
class ExampleAxis:
    """The examples lie along an axis: the example of index i is ``i // inner % n``, of n.

    Attributes:
      axis: the axis, of size k·n·inner. It is merged of three where k or inner is not 1.
      inner: the number of neighbours that belong to one example.
    """

    axis: int
    inner: int = 1


class MaskAxis(NamedTuple):
    """An axis of a mask [batch, seq], 0 or 1, and the axis of a value that it lies along."""

    number: int
    location: ExampleAxis


@dataclasses.dataclass(frozen=True)
class TokenAxes:
    """The tokens of a mask lie along some axes; see `lora_jax.adapt.per_example.tokens`.

    Attributes:
      mask: shape of the mask, [batch, seq].
      axes: the axes of the mask that can be followed.
      moved: the last equation that moved or cut the tokens, or an empty text.
    """

    mask: tuple[int, ...]
    axes: frozenset[MaskAxis]
    moved: str = dataclasses.field(default="", compare=False)

    def shifted(self, n: int) -> "TokenAxes":
        """Returns the label of a value with n more axes in front, or one less where n is -1."""
        axes = frozenset(
            MaskAxis(number, ExampleAxis(location.axis + n, location.inner))
            for number, location in self.axes
            if location.axis + n >= 0
        )
        return TokenAxes(self.mask, axes, self.moved)


@dataclasses.dataclass(frozen=True)
class ExampleKernels:
    """A weight with an adapter for each example, which only products may use.

    Attributes:
      roles: axis roles of the weight.
    """

    roles: tuple[Label, ...]


@dataclasses.dataclass(frozen=True)
class MixedExamples:
    """An example's part of the value depends on other examples, or cannot be found any more.

    Attributes:
      why: the first equation that does so: its primitive, its place, and what it does.
    """

    why: str


@dataclasses.dataclass(frozen=True)
class UnvisitedCarry:
    """The value is carried by a loop, of which no step has been followed yet."""


# None: the value is the same whatever the examples and their adapters are.
ExampleLabel = ExampleAxis | TokenAxes | ExampleKernels | MixedExamples | UnvisitedCarry | None


class MixingError(Exception):
    """Raised by a rule: what an equation does with examples that has them mixed."""


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleLabels:
    """The facts known of a jaxpr, given those of its inputs.

    Attributes:
      outputs: what is known of each output.
      uses: what is known of the other operand, by the identity of each equation that may meet
        `ExampleKernels`.
      inner: jaxprs of these equations, by their identity.
    """

    outputs: tuple[ExampleLabel, ...]
    uses: Mapping[int, ExampleLabel]
    inner: Mapping[int, "ExampleLabels"]


def joined(a: ExampleLabel, b: ExampleLabel) -> ExampleLabel:
    """Returns the label of a value that is one of two."""
    for one, other in ((a, b), (b, a)):
        if isinstance(other, UnvisitedCarry):
            return one
        if isinstance(one, MixedExamples) or (
            other is None and not isinstance(one, ExampleKernels)
        ):
            return one
    return (
        a
        if a == b
        else MixedExamples("the examples lie along different axes in two branches or steps")
    )


def agreed(given: Iterable[ExampleLabel]) -> ExampleAxis:
    """Returns the common axis of the examples in all operands that have them.

    Raises:
      MixingError: the operands differ.
    """
    axes = {label for label in given if isinstance(label, ExampleAxis)}
    if len(axes) != 1:
        raise MixingError("joins values whose examples lie along different axes")
    return axes.pop()


def reshaped(at: ExampleAxis, n: int, shape: Sequence[int], out: Sequence[int]) -> ExampleAxis:
    """Returns the examples' axis after a reshape, which keeps the order of elements.

    Args:
      at: before it.
      n: the number of examples.
      shape, out: before it, and after.

    Raises:
      MixingError: the axis is split between two examples or within.
    """
    block = at.inner  # the number of elements after which the next example comes
    for size in shape[at.axis + 1 :]:
        block *= size
    below, fits = 1, []
    for axis in reversed(range(len(out))):
        if below and block % below == 0 and out[axis] and below * out[axis] % (block * n) == 0:
            fits.append(ExampleAxis(axis, block // below))
        below *= out[axis]
    if not fits:
        raise MixingError("splits the axis of the examples")
    # Of one example, several fit: the least merged, then the one that stays where it was.
    return min(fits, key=lambda fit: (fit.inner, fit.axis != at.axis, fit.axis))
