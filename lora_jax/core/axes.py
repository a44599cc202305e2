"""Axis roles: which axes of a weight an activation contracts, and which remain in the result.

Roles are recorded, never guessed from sizes. Axes are counted from the end, so that a slice of
a stack (one layer inside `jax.lax.scan`) has the roles of the stack.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

Label = Literal["batch", "in", "out"]

# The names of kernels in Flax ("kernel") and Haiku ("w"), and of embedding tables in Flax. The last
# axis but one is the input (the rows of a table), the last the output.
KERNEL_NAMES = frozenset({"kernel", "w"})
EMBEDDING_NAMES = frozenset({"embedding"})


@dataclasses.dataclass(frozen=True)
class AxisRoles:
    """The in axes and out axes of a weight, as negative integers; other axes are batch axes."""

    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]

    @classmethod
    def from_axes(cls, in_axes: Sequence[int], out_axes: Sequence[int], ndim: int) -> "AxisRoles":
        """Returns the roles for axes counted from either end of a weight with `ndim` axes.

        Args:
          in_axes: the axes that are contracted with the activation.
          out_axes: the axes that come out of the product.
          ndim: the number of axes of the weight.

        Raises:
          ValueError: an axis is out of range or named twice, or a role has none.
        """
        arguments = f"in_axes={tuple(in_axes)} and out_axes={tuple(out_axes)}"
        if not in_axes or not out_axes:
            raise ValueError(
                f"{arguments}: a weight needs at least one in axis and one out axis. Name both."
            )
        for axis in (*in_axes, *out_axes):
            if not -ndim <= axis < ndim:
                raise ValueError(
                    f"Axis {axis} does not exist in a weight of {ndim} axes. Use axes from {-ndim} "
                    f"to {ndim - 1}."
                )
        roles = cls(_sorted_from_end(in_axes, ndim), _sorted_from_end(out_axes, ndim))
        axes = (*roles.in_axes, *roles.out_axes)
        if len(set(axes)) < len(axes):
            raise ValueError(
                f"{arguments} name the same axis twice, in a weight of {ndim} axes. Name each axis "
                "once."
            )
        return roles

    def labels(self, ndim: int) -> tuple[Label, ...]:
        """Returns the role of each axis of a weight with `ndim` axes."""

        def role_of(axis: int) -> Label:
            if axis in self.in_axes:
                return "in"
            return "out" if axis in self.out_axes else "batch"

        return tuple(role_of(axis) for axis in range(-ndim, 0))

    def sizes(self, shape: Sequence[int], label: Label) -> tuple[int, ...]:
        """Returns the sizes of the axes of `shape` with the role `label`, in order."""
        labels = self.labels(len(shape))
        return tuple(size for size, role in zip(shape, labels, strict=True) if role == label)

    def __str__(self) -> str:
        return f"in axes {self.in_axes}, out axes {self.out_axes}, the rest batch"


def _sorted_from_end(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Returns axes as negative integers, in ascending order."""
    return tuple(sorted(axis % ndim - ndim for axis in axes))


# Kinds of leaves that are no kernels, though a function multiplies by them.
LOOKED_UP, ADDED, MERGED = "looked up", "added", "every use would merge"
GAIN, ACTIVATION = "gain", "activation"


@dataclasses.dataclass(frozen=True)
class ProductOrder:
    """The position of a kernel's products among the operations of a function.

    Attributes:
      is_one_hot_lookup: whether the other operand of a product is one-hot.
      is_last: whether a product exists that no other weight's product follows.
      is_output: whether a product reaches an output by element-wise operations and moves.
    """

    is_one_hot_lookup: bool = False
    is_last: bool = False
    is_output: bool = False


@dataclasses.dataclass(frozen=True)
class ObservedRoles:
    """The axis roles of a leaf, inferred from a traced function.

    Attributes:
      roles: the roles of its axes.
      not_kernel_reason: why the leaf is no kernel (it is looked up, or a gain, or added to an
        activation); empty for a kernel.
      product_order: what comes before and after its products.
      not_kernel_kind: the reason in one or two words: `LOOKED_UP`, `ADDED`, `MERGED` or another.
    """

    roles: AxisRoles
    not_kernel_reason: str = ""
    product_order: ProductOrder = ProductOrder()
    not_kernel_kind: str = ""


def default_roles(name: str, ndim: int) -> AxisRoles | None:
    """Returns the roles that Flax's conventions give a leaf of this name, or None."""
    has_convention = name in KERNEL_NAMES | EMBEDDING_NAMES and ndim >= 2
    return AxisRoles((-2,), (-1,)) if has_convention else None
