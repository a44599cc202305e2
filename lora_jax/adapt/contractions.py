"""Products with a leaf: which of its axes each contracts, and which come out."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Use
from lora_jax.adapt.user_code import place_of
from lora_jax.core.factored import Factored
from lora_jax.core.types import Leaf

_Member = TypeVar("_Member")


class LeafAxis(NamedTuple):
    """One axis of a leaf, as an axis of a later array holds it.

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


# What an axis holds: axes of leaves, several where they are joined or added.
Held = frozenset[LeafAxis]
NOTHING: Held = frozenset()


@dataclasses.dataclass(frozen=True)
class Contraction:
    """One product with a weight: the axes that it contracts, those that come out, and where.

    Attributes:
      contracted, free: the axes of the leaf.
      primitive: primitive of the product.
      place: "file:line".
      is_lookup: whether rows of the leaf are read.
      added: whether an activation was added to the leaf before: the product is the activation's.
      stretched: whether the leaf is broadcast along an axis of the product, as a gain is.
      not_kernel_reason: why the leaf is no kernel here; empty where it is one.
      with_leaf: whether the other operand is a leaf, too.
      with_vector: whether the other operand is one vector only.
    """

    contracted: frozenset[int]
    free: frozenset[int]
    primitive: str
    place: str
    is_lookup: bool = False
    added: bool = False
    stretched: bool = False
    not_kernel_reason: str = ""
    with_leaf: bool = False
    with_vector: bool = False

    def __str__(self) -> str:
        verb = "looks up along" if self.is_lookup else "contracts"
        return f"{self.primitive} {verb} {sorted(self.contracted)} at {self.place}"


def labelled(array: Leaf, labels: Sequence[Held]) -> Factored:
    """Returns an array with what its axes hold."""
    held: Any = tuple(labels)
    return Factored(array, {}, held, path="\n".join(sorted(paths_of(held, "", "scaled"))))


def paths_of(labels: Any, *mixed: str) -> set[str]:
    """Returns the leaves that labels hold, mixed in one of these ways."""
    return {axis.path for held in labels for axis in held if axis.mixed in mixed}


def axes_of(path: str, held: Held) -> frozenset[int]:
    """Returns the axes of one leaf among those that are held."""
    return frozenset(axis.axis for axis in held if axis.path == path)


def union(held: Iterable[frozenset[_Member]]) -> frozenset[_Member]:
    """Returns the union of the contents of several axes."""
    return frozenset().union(*held)


def contracts(use: Use, side: int, labels: Sequence[Held]) -> tuple[Sequence[int], set[int]] | None:
    """Returns the axes that a product contracts of one operand, and those that do not come out."""
    name, params = use.name, use.params
    if name == "dot_general":
        contract, batch = params["dimension_numbers"]
        return contract[side], {*contract[side], *batch[side]}
    if name == "gather":  # where a row comes out; where a matrix does, an index into a stack
        cut = indexed(use, len(labels))
        rest = [axis for axis in range(len(labels)) if axis not in cut and labels[axis]]
        return (cut, set(cut)) if side == 0 and len(cut) == len(rest) == 1 else None
    if side == 0:
        return None
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        (_, contract), (_, batch) = numbers.dot_dimension_numbers
        return contract, {*contract, *batch, *numbers.rhs_group_dimensions}
    _, *contract = params["dimension_numbers"].rhs_spec  # a convolution
    return contract, set(contract)


def contractions(
    use: Use, side: int, axes: tuple[Sequence[int], set[int]], with_leaf: bool
) -> dict[str, Contraction]:
    """Returns the contraction by a product of each leaf in one of its operands, by path.

    Args:
      use: the product.
      side: side of the operand.
      axes: see `contracts`.
      with_leaf: whether the other operand is a leaf, too.
    """
    name, weight = use.name, use.values[side]
    contracted = union(weight.labels[axis] for axis in axes[0])
    free = union(held for axis, held in enumerate(weight.labels) if axis not in axes[1])
    batch = axes[1].difference(axes[0])
    long = {axis for axis, n in enumerate(weight.base.shape) if n > 1 and axis not in batch}
    other = math.prod(eqns.type_of(use.eqn.invars[1 - side]).shape)
    one_vector = other == math.prod(weight.base.shape[axis] for axis in axes[0])
    uses = {}
    for path in sorted({axis.path for axis in contracted | free}):
        mine = [axis for axis in contracted | free if axis.path == path]
        mixed, inner = {axis.mixed for axis in mine}, union(axis.inner for axis in mine)
        a, b = (axes_of(path, held) for held in (contracted, free))
        a, b = (a, b | inner - a) if a else (inner - b, b)
        held = all(axes_of(path, weight.labels[axis]) for axis in long)
        contraction = Contraction(
            a,
            b,
            name,
            str(place_of(use.eqn)),
            is_lookup=name == "gather",
            added="added" in mixed,
            stretched=not (held or inner or name == "gather"),
            with_leaf=with_leaf,
            with_vector=one_vector,
        )
        if contraction.is_lookup:
            reason = "it is looked up"
        elif contraction.added:
            reason = "it is added to an activation or a constant, and the sum is multiplied"
        elif contraction.stretched:
            reason = "it is stretched along an axis of the product, as a gain is"
        elif with_leaf and (side == 0 or "scaled" in mixed):
            reason = "it stands in the place of an activation"
        else:
            reason = ""
        uses[path] = dataclasses.replace(
            contraction, not_kernel_reason=reason and f"{reason}: {contraction}"
        )
    return uses


def composed(use: Use) -> list[Held]:
    """Returns the contents of a product's axes: of each leaf the axes that come out."""
    contract, batch = use.params["dimension_numbers"]
    batched: list[list[Held]] = []
    free: list[Held] = []
    for side, weight in enumerate(use.values):
        gone = union(weight.labels[axis] for axis in contract[side])

        def through(held: Held, gone: Held = gone) -> Held:
            return frozenset(a._replace(inner=a.inner | axes_of(a.path, gone)) for a in held)

        labels = [through(held) for held in weight.labels]
        batched.append([labels[axis] for axis in batch[side]])
        both = {*contract[side], *batch[side]}
        free += [held for axis, held in enumerate(labels) if axis not in both]
    return [*map(union, zip(*batched, strict=True)), *free]


def indexed(use: Use, ndim: int) -> list[int]:
    """Returns the axes that a gather indexes, whether they go or stay with one element."""
    gone, sizes = use.params["dimension_numbers"].collapsed_slice_dims, use.params["slice_sizes"]
    shape = eqns.type_of(use.eqn.invars[0]).shape
    return [axis for axis in range(ndim) if axis in gone or sizes[axis] == 1 < shape[axis]]
