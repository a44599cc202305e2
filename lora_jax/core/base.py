"""Bases: an adapted weight has W as an array, or as a `Base`, which stores it otherwise.

Only this file looks inside a base. Others use its shape, its dtype and the functions below. A base
that is no array (codes and scales, say) is one leaf of a tree: `lorafy` puts factors beside it as
beside an array, and `adapt` forms W from it where a function uses it, and never keeps W for the
backward pass.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, NoReturn, Protocol, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from lora_jax.core.extend import Primitive
from lora_jax.core.parts import STATIC, Axes
from lora_jax.core.types import BaseLike, EqnParams, Leaf, Shaped

# move(array, axes) returns the moved array; the array's axis i holds the weight's axis axes[i].
Move = Callable[[Leaf, Axes], Leaf]

_BLOCK = 4  # weights at least, for which a scale stands


class Base(Protocol):
    """A weight that is not stored as an array.

    An implementation is a pytree (`jax.tree_util.register_dataclass`), whose leaves are its arrays.
    Each has as many axes as W, in W's order; its shape follows from them, since moves change it.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of W."""

    def as_array(self) -> jax.Array:
        """Returns W."""

    def along(self, move: Move, touched: frozenset[int]) -> "Base | None":
        """Returns the base with ``move(array, axes)`` in place of each of its arrays.

        A move cuts, indexes or places axes one by one, alike in all arrays.

        Args:
          move: called with an array and, for each of its axes, the axis of W that it holds, or -1
            where the array's axis is shorter than W's (one scale for all, one for a block). A move
            that only places axes (`touched` is empty) places blocks too, if all are of one size: it
            gets their axis.
          touched: the axes of W that the move changes. Every array must hold these in full: stretch
            an array that is constant along one of them.

        Returns:
          The base; None if an array cannot be moved like this, so that W has to be formed.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackMember:
    """A base that is one member of a stack, with the whole stack at hand.

    A kernel that reads its member out of the stack needs no copy of it; all else uses `own`.

    Attributes:
      own: the member.
      stack: the stack, along its first axis.
      index: [] int32, the member's place.
    """

    own: BaseLike
    stack: BaseLike
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.own.shape)

    @property
    def dtype(self) -> jnp.dtype:
        own: jnp.dtype = self.own.dtype
        return own

    def as_array(self) -> jax.Array:
        return as_array(self.own)

    def along(self, move: Move, touched: frozenset[int]) -> BaseLike:
        moved: BaseLike = self.own.along(move, touched)
        return moved


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _View:
    """A base after operations that re-arranged or cast it; `as_array` repeats them on W.

    Attributes:
      source: the base before them.
      moves: each a primitive with its parameters.
      dtype: dtype of the result.
      rearranged: the shape of the result; None where all moves are element-wise.
    """

    source: BaseLike
    moves: tuple[tuple[Primitive, tuple[tuple[str, object], ...]], ...] = field(metadata=STATIC)
    dtype: DTypeLike = field(metadata=STATIC)
    rearranged: tuple[int, ...] | None = field(metadata=STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape if self.rearranged is None else self.rearranged

    def as_array(self) -> jax.Array:
        array = as_array(self.source)
        for primitive, params in self.moves:
            array = _bound(primitive, dict(params), array)
        return array

    def along(self, move: Move, touched: frozenset[int]) -> BaseLike:
        if self.rearranged is not None:
            return None
        source = self.source.along(move, touched)
        return None if source is None else dataclasses.replace(self, source=source)


class NoArray:
    """Base class of nodes that raise an error with a remedy where they are used as arrays."""

    how_to_use: str

    def replace(self, **changes: Leaf) -> Self:
        """Returns a copy with other values in some of the attributes."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} {self.how_to_use}.")

    __jax_array__ = __array__ = __getitem__ = __iter__ = __len__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = __neg__ = _refuse


def is_base(value: Leaf) -> bool:
    """Returns True if a value is a `Base` rather than an array."""
    kind = type(value)
    return hasattr(kind, "as_array") and hasattr(kind, "along")


def is_of_4_bits(array: Shaped) -> bool:
    """Returns True if two numbers of an array share a byte, on accelerators."""
    return array.dtype.name in ("int4", "uint4", "float4_e2m1fn")


def as_array(base: BaseLike) -> jax.Array:
    """Returns W as an array, of its own dtype."""
    array: jax.Array = base.as_array() if is_base(base) else base
    return array


def stand_in(base: BaseLike) -> BaseLike:
    """Returns the array, or the shape, that a function is traced with in place of W."""
    return jax.eval_shape(as_array, base) if is_base(base) else base


def is_abstract(base: BaseLike) -> bool:
    """Returns True if a base has shapes only (`jax.ShapeDtypeStruct`)."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(base))


def product(fn: Callable[..., jax.Array], base: BaseLike, *operands: jax.Array) -> jax.Array:
    """Returns ``fn(W, *operands)``: a product with W, in either orientation.

    Where the base is no array, the backward pass forms W again rather than keep it: a barrier keeps
    a compiler from taking it from the forward pass. It stands before the scales, where there are
    any, and not before the codes: for it, a TPU would copy a layer's codes out of their stack.
    """
    if not is_base(base):
        return fn(base, *operands)
    is_small = jax.tree.map(lambda leaf: _BLOCK * leaf.size <= math.prod(base.shape), base)
    barriers = (is_small if any(jax.tree.leaves(is_small)) else True, *[True] * len(operands))

    def formed(base: BaseLike, *operands: jax.Array) -> jax.Array:
        return fn(as_array(base), *operands)

    result: jax.Array = jax.checkpoint(formed, prevent_cse=barriers)(base, *operands)
    return result


def has_rows_kernel(base: BaseLike) -> bool:
    """Returns True if stacks of a base may have a kernel for products of few rows."""
    return hasattr(type(base), "rows_kernel")


def stack_member(base: BaseLike) -> tuple[StackMember, tuple[DTypeLike, ...]] | None:
    """Returns the member of a stack that a base is, and the dtypes that it was cast to, in order.

    None if it is none, or was re-arranged.
    """
    if isinstance(base, StackMember):
        return base, ()
    if not isinstance(base, _View) or not isinstance(base.source, StackMember):
        return None
    if base.rearranged is not None:
        return None
    casts: list[Any] = [dict(params)["new_dtype"] for _, params in base.moves]
    return base.source, tuple(casts)


def rearranged(base: BaseLike, primitive: Primitive, params: EqnParams, out: Leaf) -> BaseLike:
    """Returns the base after an equation whose only operand it is.

    Args:
      base: the operand.
      primitive, params: the equation's.
      out: its output's type.
    """
    if not is_base(base):
        return _bound(primitive, params, base)
    view = base if isinstance(base, _View) else _View(base, (), base.dtype, None)
    move = (primitive, tuple(sorted(params.items())))
    try:
        hash(move)
    except TypeError:
        return _bound(primitive, params, as_array(base))
    cast = view.rearranged is None and primitive.name == "convert_element_type"
    shape = None if cast else tuple(out.shape)
    return _View(view.source, (*view.moves, move), out.dtype, shape)


def along(base: BaseLike, move: Move, touched: Sequence[int] = ()) -> BaseLike:
    """Returns the base after a move of the axes `touched`, each by itself; see `Base.along`."""
    if is_base(base):
        moved = base.along(move, frozenset(touched))
        if moved is not None:
            return moved
        base = as_array(base)
    return move(base, tuple(range(len(base.shape))))


def member(base: BaseLike, axis: int, index: jax.Array | int) -> BaseLike:
    """Returns one member of a stack, without the stack's axis.

    Args:
      base: base of a weight.
      axis: the axis of the stack.
      index: index of the member; it may be traced.
    """

    def picked(array: jax.Array, axes: Axes) -> jax.Array:
        if axis not in axes:
            return array
        slice_: jax.Array = lax.dynamic_index_in_dim(array, index, axes.index(axis), keepdims=False)
        return slice_

    return along(base, picked, [axis])


def splittable(base: BaseLike, parts: Sequence[int]) -> BaseLike:
    """Returns the base if it can be cut into pieces that are bases, else W as an array.

    Args:
      base: base of a weight.
      parts: the number of pieces along each axis of it.
    """
    if not is_base(base):
        return base
    is_even: list[bool] = []

    def look(array: Leaf, axes: Axes) -> Leaf:
        cuts = zip(array.shape, axes, parts, strict=True)
        is_even.append(all(1 in (n, cut) or (axis >= 0 and n % cut == 0) for n, axis, cut in cuts))
        return array

    moved = base.along(look, frozenset())
    return as_array(base) if moved is None or not all(is_even) else base


def _bound(primitive: Primitive, params: EqnParams, array: jax.Array) -> jax.Array:
    out = primitive.bind(array, **primitive.get_bind_params(params))
    array = out[0] if primitive.multiple_results else out
    return array
