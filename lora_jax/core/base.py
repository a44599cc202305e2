"""Bases: the W of an adapted weight, as an array or as a `Base` such as quantized codes.

Only this file looks inside a base. Other files use its shape, its dtype and the functions below. A
`Base` is one leaf of a tree: `lorafy` puts factors beside it as beside an array. `adapt` **forms**
W, the array, from it where a function uses it, and never keeps W for the backward pass.

A **move** is a function that slices, indexes or rearranges the axes of one array. `along` applies a
move to W, or to each array of a `Base`.
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
_HashableParams = tuple[tuple[str, object], ...]  # of an equation, sorted by name

_MIN_BLOCK_ELEMENTS = 4  # the fewest elements of W that one scale stands for


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

        A move treats each axis by itself, and treats an axis of W in the same way in all arrays.

        Args:
          move: called with an array and, for each of its axes, the axis of W that it holds, or -1
            where the array's axis is shorter than W's (one scale for all, one for a block). A move
            that only rearranges axes (`touched` is empty) rearranges blocks too, if all blocks have
            one size: it gets their axis.
          touched: the axes of W that the move changes. Every array must hold these in full: stretch
            an array that is constant along one of them.

        Returns:
          The base; None if an array cannot be moved like this, so that W has to be formed.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackMember:
    """A base that is one member of a stack, with a reference to the stack.

    A compiled kernel that reads the member out of the stack needs no copy of the member. All other
    code uses `member`.

    Attributes:
      member: the base of the member.
      stack: the base of the stack, whose first axis is that of the members.
      index: [] int32, the member's index in the stack.
    """

    member: BaseLike
    stack: BaseLike
    index: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.member.shape)

    @property
    def dtype(self) -> jnp.dtype:
        dtype: jnp.dtype = self.member.dtype
        return dtype

    def as_array(self) -> jax.Array:
        return as_array(self.member)

    def along(self, move: Move, touched: frozenset[int]) -> BaseLike:
        moved: BaseLike = self.member.along(move, touched)
        return moved


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _View:
    """A base after operations that rearranged or cast it; `as_array` applies these to W.

    Attributes:
      source: the base before the operations.
      operations: primitives of JAX with their parameters, in order.
      dtype: dtype of the result.
      rearranged_shape: the shape of the result; None where all operations are casts.
    """

    source: BaseLike
    operations: tuple[tuple[Primitive, _HashableParams], ...] = field(metadata=STATIC)
    dtype: DTypeLike = field(metadata=STATIC)
    rearranged_shape: tuple[int, ...] | None = field(metadata=STATIC)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape if self.rearranged_shape is None else self.rearranged_shape

    def as_array(self) -> jax.Array:
        array = as_array(self.source)
        for primitive, params in self.operations:
            array = _apply_primitive(primitive, dict(params), array)
        return array

    def along(self, move: Move, touched: frozenset[int]) -> BaseLike:
        if self.rearranged_shape is not None:
            return None
        source = self.source.along(move, touched)
        return None if source is None else dataclasses.replace(self, source=source)


class NoArray:
    """Superclass of nodes that raise an error with a remedy if they are used as arrays."""

    how_to_use: str

    def replace(self, **changes: Leaf) -> Self:
        """Returns a copy with other values of some attributes."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def _raise_not_an_array(self, *_: object, **__: object) -> NoReturn:
        raise TypeError(f"A {type(self).__name__} {self.how_to_use}.")

    __jax_array__ = __array__ = __getitem__ = __iter__ = __len__ = _raise_not_an_array
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _raise_not_an_array
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = __neg__ = _raise_not_an_array


def is_base(value: Leaf) -> bool:
    """Returns True if a value is a `Base` rather than an array."""
    kind = type(value)
    return hasattr(kind, "as_array") and hasattr(kind, "along")


def is_of_4_bits(array: Shaped) -> bool:
    """Returns True if an accelerator stores two elements of this array in a byte."""
    return array.dtype.name in ("int4", "uint4", "float4_e2m1fn")


def as_array(base: BaseLike) -> jax.Array:
    """Returns W as an array, of its own dtype."""
    array: jax.Array = base.as_array() if is_base(base) else base
    return array


def stand_in(base: BaseLike) -> BaseLike:
    """Returns the array or shape with which a function is traced in place of a base."""
    return jax.eval_shape(as_array, base) if is_base(base) else base


def is_abstract(base: BaseLike) -> bool:
    """Returns True if a base consists of shapes only (`jax.ShapeDtypeStruct`)."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(base))


def product(fn: Callable[..., jax.Array], base: BaseLike, *operands: jax.Array) -> jax.Array:
    """Returns ``fn(W, *operands)``: a product with W, in either orientation.

    Where the base is no array, the backward pass forms W again instead of keeping it. A barrier
    prevents the compiler from reusing W of the forward pass. The barrier is put on the scales of
    the base, if it has any, and not on its codes: a TPU would copy a layer's codes out of their
    stack for a barrier.
    """
    if not is_base(base):
        return fn(base, *operands)
    # An array with few elements, compared with W, holds scales.
    is_scale = jax.tree.map(
        lambda leaf: _MIN_BLOCK_ELEMENTS * leaf.size <= math.prod(base.shape), base
    )
    has_scales = any(jax.tree.leaves(is_scale))
    barriers = (is_scale if has_scales else True, *[True] * len(operands))

    def form_and_multiply(base: BaseLike, *operands: jax.Array) -> jax.Array:
        return fn(as_array(base), *operands)

    result: jax.Array = jax.checkpoint(form_and_multiply, prevent_cse=barriers)(base, *operands)
    return result


def has_rows_kernel(base: BaseLike) -> bool:
    """Returns True if stacks of this kind of base may have a TPU kernel for few rows of x."""
    return hasattr(type(base), "rows_kernel")


def has_ragged_kernel(base: BaseLike) -> bool:
    """Returns True if a base of this kind may have a TPU kernel for ragged products."""
    return hasattr(type(base), "ragged_kernel")


def stack_member(base: BaseLike) -> tuple[StackMember, tuple[DTypeLike, ...]] | None:
    """Returns the stack member behind a base, and the dtypes that it was cast to, in order.

    None for a base that is no member of a stack, and for one that was rearranged.
    """
    source_and_casts = before_casts(base)
    if source_and_casts is None or not isinstance(source_and_casts[0], StackMember):
        return None
    return source_and_casts


def before_casts(base: BaseLike) -> tuple[BaseLike, tuple[DTypeLike, ...]] | None:
    """Returns the base before casts, and the dtypes of the casts; None if it was rearranged."""
    if not isinstance(base, _View):
        return base, ()
    if base.rearranged_shape is not None:
        return None
    casts: list[Any] = [dict(params)["new_dtype"] for _, params in base.operations]
    return base.source, tuple(casts)


def rearranged(base: BaseLike, primitive: Primitive, params: EqnParams, out: Leaf) -> BaseLike:
    """Applies an equation with one operand to a base, and returns the result as a base.

    Args:
      base: the operand.
      primitive, params: the primitive and the parameters of the equation.
      out: the type of the equation's output.
    """
    if not is_base(base):
        return _apply_primitive(primitive, params, base)
    operation = (primitive, tuple(sorted(params.items())))
    try:
        hash(operation)
    except TypeError:  # the operations of a view are static parts of a pytree, so hashable
        return _apply_primitive(primitive, params, as_array(base))
    # Add the operation to those of a view, or begin a new view.
    view = base
    if not isinstance(base, _View):
        view = _View(source=base, operations=(), dtype=base.dtype, rearranged_shape=None)
    is_cast = view.rearranged_shape is None and primitive.name == "convert_element_type"
    return _View(
        source=view.source,
        operations=(*view.operations, operation),
        dtype=out.dtype,
        rearranged_shape=None if is_cast else tuple(out.shape),
    )


def along(base: BaseLike, move: Move, touched: Sequence[int] = ()) -> BaseLike:
    """Returns the base after a move that changes the axes `touched`; see `Base.along`."""
    if is_base(base):
        moved = base.along(move, frozenset(touched))
        if moved is not None:
            return moved
        base = as_array(base)
    return move(base, tuple(range(len(base.shape))))


def member(base: BaseLike, axis: int, index: jax.Array | int) -> BaseLike:
    """Returns one member of a stack, without the stack axis.

    Args:
      base: base of the stack.
      axis: the axis of the members.
      index: index of the member; it may be traced.
    """

    def index_array(array: jax.Array, axes: Axes) -> jax.Array:
        """Returns the member's part of one array."""
        if axis not in axes:
            return array
        array_axis = axes.index(axis)
        slice_: jax.Array = lax.dynamic_index_in_dim(array, index, array_axis, keepdims=False)
        return slice_

    return along(base, index_array, [axis])


def splittable(base: BaseLike, parts: Sequence[int]) -> BaseLike:
    """Returns the base if it can be sharded as it is, else W as an array.

    A member of a stack is returned without the stack, which is not sharded with it.

    Args:
      base: base of a weight.
      parts: the number of pieces along each axis of the weight.
    """
    if not is_base(base):
        return base
    is_splittable_array: list[bool] = []

    def check_array(array: Leaf, axes: Axes) -> Leaf:
        """Records whether an array can be split evenly along its split axes."""
        is_even_axis: list[bool] = []
        for size, axis, n_pieces in zip(array.shape, axes, parts, strict=True):
            is_whole = size == 1 or n_pieces == 1
            is_even_axis.append(is_whole or (axis >= 0 and size % n_pieces == 0))
        is_splittable_array.append(all(is_even_axis))
        return array

    moved = base.along(check_array, frozenset())
    return moved if moved is not None and all(is_splittable_array) else as_array(base)


def _apply_primitive(primitive: Primitive, params: EqnParams, array: jax.Array) -> jax.Array:
    """Applies a primitive with one operand and one result."""
    outputs = primitive.bind(array, **primitive.get_bind_params(params))
    result: jax.Array = outputs[0] if primitive.multiple_results else outputs
    return result
