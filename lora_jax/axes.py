"""Axis roles: which axes of a weight are contracted with the activation, which come out of it.

Roles are recorded, never guessed from sizes. Axes are counted from the end, so that a slice of
a stack (one layer inside `jax.lax.scan`) has the roles of the stack.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

Label = Literal["batch", "in", "out"]

# Flax's names for a kernel, Haiku's, and Flax's for an embedding table. Each has the input in its
# last axis but one (the rows of a table are its input) and the output in its last.
KERNEL_NAMES = frozenset({"kernel", "w"})
EMBEDDING_NAMES = frozenset({"embedding"})


@dataclasses.dataclass(frozen=True)
class AxisRoles:
    """The in axes and the out axes of a weight, as negative integers; all others are batch axes."""

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    @classmethod
    def of(cls, in_axes: Sequence[int], out_axes: Sequence[int], ndim: int) -> "AxisRoles":
        """Roles from axes counted from either end of a weight with `ndim` axes.

        Raises ValueError where an axis is out of range, named twice, or a role is empty.
        """
        both = [*in_axes, *out_axes]
        if not in_axes or not out_axes:
            raise ValueError(
                f"in_axes={tuple(in_axes)} and out_axes={tuple(out_axes)}: "
                "a weight needs at least one axis of each role"
            )
        if wrong := [axis for axis in both if not -ndim <= axis < ndim]:
            raise ValueError(f"axis {wrong[0]} does not exist in a weight of {ndim} axes")
        negative = [axis if axis < 0 else axis - ndim for axis in both]
        if len(set(negative)) != len(negative):
            raise ValueError(
                f"in_axes={tuple(in_axes)} and out_axes={tuple(out_axes)} of a weight of {ndim} "
                "axes name an axis twice"
            )
        split = len(in_axes)
        return cls(tuple(sorted(negative[:split])), tuple(sorted(negative[split:])))

    def labels(self, ndim: int) -> tuple[Label, ...]:
        """The role of each axis of a weight with `ndim` axes."""

        def label(axis: int) -> Label:
            return "in" if axis in self.in_axes else "out" if axis in self.out_axes else "batch"

        return tuple(label(axis) for axis in range(-ndim, 0))

    def sizes(self, shape: Sequence[int], label: Label) -> tuple[int, ...]:
        """The sizes of those axes of `shape` that have the role `label`, in their order."""
        labels = self.labels(len(shape))
        return tuple(size for size, role in zip(shape, labels, strict=True) if role == label)

    def __str__(self) -> str:
        return f"in axes {self.in_axes}, out axes {self.out_axes}, the rest batch"


def default_roles(name: str, ndim: int) -> AxisRoles | None:
    """Flax's convention for a leaf called `name`, or None where there is no convention for it."""
    if name in KERNEL_NAMES | EMBEDDING_NAMES and ndim >= 2:
        return AxisRoles((-2,), (-1,))
    return None
