"""Finds the axes of a leaf that a product contracts, and the axes that remain in the result.

The **contents** of an axis are the axes of leaves that it holds: several where arrays are joined or
added, none where it holds no leaf. The **side** of an operand is its index, 0 or 1, in a product.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Use
from lora_jax.adapt.user_code import user_line_of
from lora_jax.core.factored import Factored
from lora_jax.core.types import Leaf

_Member = TypeVar("_Member")


class LeafAxis(NamedTuple):
    """One axis of a leaf, followed into an axis of an array that was computed from the leaf.

    Attributes:
      path, axis: path and axis of the leaf.
      mixed: "added" or "scaled" where an array that is not computed from leaves alone was added to
        the leaf, or multiplied by it element by element.
      inner: the axes of the leaf that a product with another leaf contracted.
    """

    path: str
    axis: int
    mixed: str = ""
    inner: frozenset[int] = frozenset()


Contents = frozenset[LeafAxis]
NO_CONTENTS: Contents = frozenset()


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One product with a weight: its contracted axes, its remaining axes, and its line of code.

    Attributes:
      contracted, free: the axes of the leaf.
      primitive: primitive of the product.
      line: "file:line".
      is_lookup: whether rows of the leaf are read.
      is_added: whether an activation was added to the leaf before: the product is the activation's.
      is_stretched: whether the leaf is broadcast along an axis of the product, as a gain is.
      not_kernel_reason: why the leaf is no kernel here; empty where it is one.
      with_leaf: whether the other operand is a leaf, too.
      with_vector: whether the other operand is one vector only.
    """

    contracted: frozenset[int]
    free: frozenset[int]
    primitive: str
    line: str
    is_lookup: bool = False
    is_added: bool = False
    is_stretched: bool = False
    not_kernel_reason: str = ""
    with_leaf: bool = False
    with_vector: bool = False

    def __str__(self) -> str:
        verb = "looks up along" if self.is_lookup else "contracts"
        return f"{self.primitive} {verb} {sorted(self.contracted)} at {self.line}"


class ContractedAxes(NamedTuple):
    """The contracted axes of an operand of a product, and its contracted and batched axes."""

    contracted: Sequence[int]
    not_free: set[int]


def label_axes(array: Leaf, contents_of_axis: Sequence[Contents]) -> Factored:
    """Returns an array as a `Factored` whose labels are the contents of its axes."""
    labels: Any = tuple(contents_of_axis)
    return Factored(
        array, {}, labels, path="\n".join(sorted(paths_in_contents(labels, "", "scaled")))
    )


def paths_in_contents(contents_of_axis: Any, *mixed: str) -> set[str]:
    """Returns the paths of the leaf axes whose `LeafAxis.mixed` is one of `mixed`."""
    return {
        leaf_axis.path
        for contents in contents_of_axis
        for leaf_axis in contents
        if leaf_axis.mixed in mixed
    }


def axes_of_leaf(path: str, contents: Contents) -> frozenset[int]:
    """Returns the axes of one leaf in the contents of an axis."""
    return frozenset(leaf_axis.axis for leaf_axis in contents if leaf_axis.path == path)


def union_of_sets(contents: Iterable[frozenset[_Member]]) -> frozenset[_Member]:
    """Returns the union of several sets, such as the contents of several axes."""
    return frozenset().union(*contents)


def contracted_axes(
    use: Use, side: int, contents_of_axis: Sequence[Contents]
) -> ContractedAxes | None:
    """Returns the axes of one operand that a product contracts, or None if there are none."""
    if use.name == "dot_general":
        contract, batch = use.params["dimension_numbers"]
        return ContractedAxes(contract[side], {*contract[side], *batch[side]})
    # A gather of rows is a product with one-hot vectors: it contracts the axis of the rows.
    if use.name == "gather":
        indexed_axes = axes_indexed_by_gather(use, len(contents_of_axis))
        row_axes = [
            axis
            for axis, contents in enumerate(contents_of_axis)
            if axis not in indexed_axes and contents
        ]
        # If a matrix comes out, the index selects a member of a stack.
        reads_row = len(indexed_axes) == len(row_axes) == 1
        if side == 0 and reads_row:
            return ContractedAxes(indexed_axes, set(indexed_axes))
        return None
    # Grouped products and convolutions have the kernel on the right.
    if side == 0:
        return None
    if use.name == "ragged_dot_general":
        dimension_numbers = use.params["ragged_dot_dimension_numbers"]
        (_, contracted), (_, batched) = dimension_numbers.dot_dimension_numbers
        not_free = {*contracted, *batched, *dimension_numbers.rhs_group_dimensions}
        return ContractedAxes(contracted, not_free)
    _, *contracted = use.params["dimension_numbers"].rhs_spec  # of a convolution
    return ContractedAxes(contracted, set(contracted))


def contractions_by_path(
    use: Use, side: int, axes: ContractedAxes, with_leaf: bool
) -> dict[str, Contraction]:
    """Returns the contraction of each leaf in one operand of a product, by path.

    Args:
      use: the product.
      side: side of the operand.
      axes: the axes that it contracts.
      with_leaf: whether the other operand is a leaf, too.
    """
    operand = use.values[side]
    shape = operand.base.shape
    contracted = union_of_sets(operand.labels[axis] for axis in axes.contracted)
    free = union_of_sets(
        contents for axis, contents in enumerate(operand.labels) if axis not in axes.not_free
    )
    batch_axes = axes.not_free.difference(axes.contracted)
    product_axes = [axis for axis, size in enumerate(shape) if size > 1 and axis not in batch_axes]
    # The other operand is one vector if it has only the contracted elements.
    n_other_elements = math.prod(eqns.type_of(use.eqn.invars[1 - side]).shape)
    with_vector = n_other_elements == math.prod(shape[axis] for axis in axes.contracted)
    is_lookup = use.name == "gather"
    contraction_of_path: dict[str, Contraction] = {}
    for path in sorted({leaf_axis.path for leaf_axis in contracted | free}):
        leaf_axes = [leaf_axis for leaf_axis in contracted | free if leaf_axis.path == path]
        mixed = {leaf_axis.mixed for leaf_axis in leaf_axes}
        inner = union_of_sets(leaf_axis.inner for leaf_axis in leaf_axes)
        contracted_of_leaf = axes_of_leaf(path, contracted)
        free_of_leaf = axes_of_leaf(path, free)
        # The axes that an earlier product with another leaf contracted have the other role here.
        if contracted_of_leaf:
            free_of_leaf |= inner - contracted_of_leaf
        else:
            contracted_of_leaf = inner - free_of_leaf
        # A leaf that lacks an axis of the product was broadcast along it.
        is_along_all_axes = all(axes_of_leaf(path, operand.labels[axis]) for axis in product_axes)
        contraction = Contraction(
            contracted=contracted_of_leaf,
            free=free_of_leaf,
            primitive=use.name,
            line=str(user_line_of(use.eqn)),
            is_lookup=is_lookup,
            is_added="added" in mixed,
            is_stretched=not (is_along_all_axes or inner or is_lookup),
            with_leaf=with_leaf,
            with_vector=with_vector,
        )
        stands_for_activation = with_leaf and (side == 0 or "scaled" in mixed)
        reason = _not_kernel_reason(contraction, stands_for_activation)
        contraction_of_path[path] = dataclasses.replace(contraction, not_kernel_reason=reason)
    return contraction_of_path


def _not_kernel_reason(contraction: Contraction, stands_for_activation: bool) -> str:
    """Returns the reason why a leaf is no kernel in a product, or "" if it is one."""
    if contraction.is_lookup:
        reason = "the function looks up rows of this leaf"
    elif contraction.is_added:
        reason = "an activation or a constant is added to this leaf, and the sum is multiplied"
    elif contraction.is_stretched:
        reason = "this leaf is broadcast along an axis of the product, as a gain is"
    elif stands_for_activation:
        reason = "this leaf takes the place of an activation in a product"
    else:
        return ""
    return f"{reason}, where {contraction}"


def contents_of_leaf_product(use: Use) -> list[Contents]:
    """Returns the contents of each axis of the product of two leaves.

    The axes of the product are the batched axes, the free axes of the left leaf, then the free axes
    of the right leaf.
    """
    contract, batch = use.params["dimension_numbers"]
    batched_contents: list[list[Contents]] = []  # by side
    free_contents: list[Contents] = []
    for side, operand in enumerate(use.values):
        contracted = union_of_sets(operand.labels[axis] for axis in contract[side])
        contents_of_axis = [_with_inner_axes(contents, contracted) for contents in operand.labels]
        batched_contents.append([contents_of_axis[axis] for axis in batch[side]])
        for axis, contents in enumerate(contents_of_axis):
            if axis not in contract[side] and axis not in batch[side]:
                free_contents.append(contents)
    # A batched axis of the product holds the batched axes of both leaves.
    contents_of_product = [
        union_of_sets(contents) for contents in zip(*batched_contents, strict=True)
    ]
    return contents_of_product + free_contents


def _with_inner_axes(contents: Contents, contracted: Contents) -> Contents:
    """Returns the contents of an axis, with contracted axes of the same leaves added."""
    return frozenset(
        leaf_axis._replace(inner=leaf_axis.inner | axes_of_leaf(leaf_axis.path, contracted))
        for leaf_axis in contents
    )


def axes_indexed_by_gather(use: Use, ndim: int) -> list[int]:
    """Returns the axes that a gather indexes: collapsed ones and ones of slice size 1."""
    collapsed_axes = use.params["dimension_numbers"].collapsed_slice_dims
    slice_sizes = use.params["slice_sizes"]
    shape = eqns.type_of(use.eqn.invars[0]).shape
    return [
        axis
        for axis in range(ndim)
        if axis in collapsed_axes or slice_sizes[axis] == 1 < shape[axis]
    ]
