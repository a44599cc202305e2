"""The product of an activation with an adapted weight: xW + s·(xA)B, and its mirror image.

This file knows how factors are stored, and why. For a weight with batch, in and out axes:

    a      [batch…, r, in…]     A, transposed: xA and its gradient then read the long axis in order
    b      [batch…, r, out…]    B
    scale  [batch…]             s, fp32

Measured on the layers of SmolLM2-135M (tests/benchmarks/product_layouts.py, two CPU cores, forward
and backward to A and B): this order is the fastest of the four, and the order of the operands
below is what keeps the backward pass from copying whole activations into another layout before
each skinny product: z = xA, which is small, is flattened to two dimensions, so that the
derivative of B contracts one axis rather than several; x itself keeps its shape, and its
residual is shared by all products that read it. Everything is plain `dot_general`, so
forward mode, reverse mode and their compositions work as JAX derives them.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.axes import AxisRoles, Label


@dataclasses.dataclass(frozen=True, eq=False)
class _ForMessages:
    """A path, equal to every other: layers that share a jitted function share its compilation."""

    path: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ForMessages)

    def __hash__(self) -> int:
        return 0


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Factored:
    """W + s·AB, unformed. The axes of `base` may come in any order; `labels` gives their roles.

    `a` holds the batch axes in the base's order, then r, then the in axes; `b` the batch axes, r,
    the out axes; `scale` the batch axes. `key`, [batch…] typed PRNG keys, turns dropout on.
    """

    base: Any
    a: Any
    b: Any
    scale: Any
    key: Any
    labels: tuple[Label, ...]
    dropout: float
    path: str

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children = (self.base, self.a, self.b, self.scale, self.key)
        return children, (self.labels, self.dropout, _ForMessages(self.path))

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: tuple[Any, ...]) -> "Factored":
        labels, dropout, name = static
        base, a, b, scale, key = children
        return cls(base, a, b, scale, key, labels, dropout, name.path)

    def axes(self, label: Label) -> tuple[int, ...]:
        """The base's axes with this role, in order."""
        return tuple(axis for axis, role in enumerate(self.labels) if role == label)

    def sizes(self, label: Label) -> tuple[int, ...]:
        """The sizes of the base's axes with this role."""
        return tuple(self.base.shape[axis] for axis in self.axes(label))

    def merged(self) -> jax.Array:
        """W + s·AB as one array, summed in fp32 (or wider) and rounded once to W's dtype."""
        dtype = wide(self.base.dtype)
        return (self.base.astype(dtype) + self.delta(dtype)).astype(self.base.dtype)

    def delta(self, dtype: Any) -> jax.Array:
        """s·AB in the base's layout."""
        n = len(self.axes("batch"))
        batch = tuple(range(n))
        scale = lax.expand_dims(self.scale.astype(dtype), range(n, self.a.ndim))
        a = self.a.astype(dtype) * scale
        ab = lax.dot_general(
            a,
            self.b.astype(dtype),
            (((n,), (n,)), (batch, batch)),
            precision=lax.Precision.HIGHEST,
        )  # [batch…, in…, out…]
        order = self.axes("batch") + self.axes("in") + self.axes("out")
        return lax.transpose(ab, tuple(order.index(axis) for axis in range(len(order))))


def canonical(a: Any, b: Any, n_batch: int) -> tuple[Any, Any]:
    """Stored factors in the order of the algebra: A [batch…, in…, r], B [batch…, r, out…]."""
    return jnp.moveaxis(a, n_batch, -1), b


def stored(a: Any, b: Any, n_batch: int) -> tuple[Any, Any]:
    """The inverse of `canonical`."""
    return jnp.moveaxis(a, -1, n_batch), b


def factor_shapes(
    shape: tuple[int, ...], roles: AxisRoles, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The stored shapes of a, b and scale for a weight of this shape."""
    batch = roles.sizes(shape, "batch")
    a = (*batch, rank, *roles.sizes(shape, "in"))
    b = (*batch, rank, *roles.sizes(shape, "out"))
    return a, b, batch


def dot(
    x: jax.Array,
    weight: Factored,
    *,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    batch: tuple[tuple[int, ...], tuple[int, ...]],
    weight_first: bool = False,
    **params: Any,
) -> jax.Array:
    """`lax.dot_general` of x with an adapted weight, in either order, in factored form.

    Args:
      x: any array.
      weight: contracted over all its in axes (the product xW), or over all its out axes (the
        mirror image: a tied head, a transposed use). Its batch axes may be batched or free.
      contract, batch: axes of x and of the weight, as in `lax.dot_general`.
      weight_first: whether the weight is the left operand, so that its axes lead the result.
      params: `precision`, `preferred_element_type` and `out_sharding` of `lax.dot_general`.

    xA accumulates in fp32 and is scaled there; A and B are cast to x's dtype.
    """
    (x_contract, w_contract), (x_batch, w_batch) = contract, batch
    if weight_first:
        dims = ((w_contract, x_contract), (w_batch, x_batch))
        product = lax.dot_general(weight.base, x, dims, **params)
    else:
        dims = ((x_contract, w_contract), (x_batch, w_batch))
        product = lax.dot_general(x, weight.base, dims, **params)
    delta = _delta(x, weight, contract, batch, weight_first, product.dtype, params)
    if delta.shape != product.shape:
        delta = lax.reshape(delta, product.shape)
    return product + delta


def _delta(
    x: jax.Array,
    weight: Factored,
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    batch: tuple[tuple[int, ...], tuple[int, ...]],
    weight_first: bool,
    dtype: Any,
    params: dict[str, Any],
) -> jax.Array:
    """s·(xA)B, but for the shape: the axes of x that are free may be flattened to one."""
    (x_contract, w_contract), (x_batch, w_batch) = contract, batch
    forward = set(w_contract) == set(weight.axes("in"))
    near, far = (weight.a, weight.b) if forward else (weight.b, weight.a)
    near_axes, far_axes = weight.axes("in"), weight.axes("out")
    if not forward:
        near_axes, far_axes = far_axes, near_axes
    stack = weight.axes("batch")
    free_stack = tuple(axis for axis in stack if axis not in w_batch)
    x_free = [axis for axis in range(x.ndim) if axis not in (*x_contract, *x_batch)]
    rank_axis = len(stack)
    precision, sharded = params.get("precision"), is_sharded(x)

    # z = s·xA   [w_batch…, x_free…, free_stack…, r]
    z = lax.dot_general(
        dropped(x, weight),
        near.astype(x.dtype),
        (
            (x_contract, tuple(rank_axis + 1 + near_axes.index(axis) for axis in w_contract)),
            (x_batch, tuple(stack.index(axis) for axis in w_batch)),
        ),
        precision=precision,
        preferred_element_type=wide(x.dtype),
        out_sharding=_rank_sharding(x, x_batch, x_free, len(free_stack)) if sharded else None,
    )
    scale = lax.transpose(weight.scale, [stack.index(axis) for axis in (*w_batch, *free_stack)])
    scale = lax.expand_dims(
        scale.astype(z.dtype), [*range(len(w_batch), len(w_batch) + len(x_free)), z.ndim - 1]
    )
    z = (z * scale).astype(x.dtype)
    if len(x_free) > 1 and not sharded:
        flat = math.prod(x.shape[axis] for axis in x_free)
        lead = len(w_batch)
        z = lax.reshape(z, (*z.shape[:lead], flat, *z.shape[lead + len(x_free) :]))
    n_free = z.ndim - 1 - len(w_batch) - len(free_stack)

    # zB: the rank is contracted; batch axes of the weight, wherever they stand in x, are batched
    z_batch = (*range(len(w_batch)), *range(len(w_batch) + n_free, z.ndim - 1))
    far_batch = tuple(stack.index(axis) for axis in (*w_batch, *free_stack))
    last = (z.ndim - 1,)
    how: dict[str, Any] = {"precision": precision, "preferred_element_type": dtype}
    if sharded and not free_stack:
        how["out_sharding"] = params.get("out_sharding")
    far = far.astype(x.dtype)
    if weight_first and not free_stack:
        return lax.dot_general(far, z, (((rank_axis,), last), (far_batch, z_batch)), **how)
    delta = lax.dot_general(z, far, ((last, (rank_axis,)), (z_batch, far_batch)), **how)
    if not free_stack:
        return delta
    # [w_batch…, free_stack…, x_free…, far…] -> the order of the weight's free axes in its base
    free_x: list[Any] = [("x", axis) for axis in range(n_free)]
    have = [*w_batch, *free_stack, *free_x, *far_axes]
    free_w = sorted((*free_stack, *far_axes))
    want = [*w_batch, *free_w, *free_x] if weight_first else [*w_batch, *free_x, *free_w]
    return lax.transpose(delta, [have.index(axis) for axis in want])


def wide(dtype: Any) -> Any:
    """The dtype to accumulate in: fp32, or fp64 where the operands are."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def dropped(x: jax.Array, weight: Factored) -> jax.Array:
    """x with dropout as A's input, where the weight carries a key."""
    if weight.key is None or not weight.dropout:
        return x
    key = weight.key.reshape(-1)[0]  # the layers of a stack that x meets at once share one mask
    keep = jax.random.bernoulli(key, 1 - weight.dropout, x.shape)
    kept = x * jnp.asarray(1 / (1 - weight.dropout), x.dtype)
    return jnp.where(keep, kept, jnp.zeros_like(x))


def is_sharded(x: jax.Array) -> bool:
    """Whether x's type says how it is sharded (a mesh with explicit axes)."""
    return any(part is not None for part in jax.typeof(x).sharding.spec)


def _rank_sharding(
    x: jax.Array, x_batch: tuple[int, ...], x_free: list[int], n_stack: int
) -> jax.sharding.NamedSharding:
    """How z is sharded: as x is, and not at all over the weight's free axes and the rank."""
    sharding = jax.typeof(x).sharding
    parts = [sharding.spec[axis] for axis in (*x_batch, *x_free)]
    spec = jax.sharding.PartitionSpec(*parts, *[None] * (n_stack + 1))
    return jax.sharding.NamedSharding(sharding.mesh, spec)
