"""The product of an activation with an adapted weight: xW + s·(xA)B, and its mirror image.

This file knows how factors are stored (`lora_jax.core.parts.AXES`), and why. For a weight with
batch, in and out axes:

    a      [batch…, r, in…]     A, transposed: xA and its gradient then read the long axis in order
    b      [batch…, r, out…]    B
    scale  [batch…]             s, fp32

and where a variant asks for them, vectors over the columns:

    gain   [batch…, out…]       g: each column of W + s·AB is multiplied by it
    shift  [batch…, out…]       added to the product xW

A weight that trains little else has, in the place of a and b, one pair [r, in…] and [r, out…] for
all layers of its stack, and small arrays around B; B is then formed where it is used.

Measured on the layers of SmolLM2-135M (tests/benchmarks/product_layouts.py, two CPU cores, forward
and backward to A and B): this order is the fastest of the four, and the order of the operands
below is what keeps the backward pass from copying whole activations into another layout before
each skinny product: z = xA, which is small, is flattened to two dimensions, so that the
derivative of B contracts one axis rather than several; x itself keeps its shape, and its
residual is shared by all products that read it. (Where `jax.set_mesh` has set a mesh, z keeps its
shape: several of its axes may be sharded.) Everything is plain `dot_general`, so forward mode,
reverse mode and their compositions work as JAX derives them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from lora_jax.core.factored import Factored, TokensError, wrong_rows
from lora_jax.core.few_rows import BaseDot, Dims, base_dot
from lora_jax.core.magnitude import rescaled, wide
from lora_jax.core.names import FACTORS, NARROW_PRODUCT
from lora_jax.core.parts import Axes, spread
from lora_jax.core.types import EqnParams, Value

_NARROW = 32  # see `NARROW_PRODUCT`


class ProductCall(NamedTuple):
    """The way to multiply x by a weight; see `dot`."""

    contract: Dims
    batch: Dims = ((), ())
    weight_first: bool = False
    rows: "ExampleColumns | None" = None
    params: EqnParams = {}

    def x_free(self, x: jax.Array) -> list[int]:
        """Returns the axes of x that are neither contracted nor batched."""
        return [axis for axis in range(x.ndim) if axis not in (*self.contract[0], *self.batch[0])]

    def free_stack(self, weight: Factored) -> tuple[int, ...]:
        """Returns the batch axes of the weight that are not batched in the product."""
        return tuple(axis for axis in weight.axes("batch") if axis not in self.batch[1])

    def sides(self, weight: Factored) -> tuple[Axes, Axes]:
        """Returns the axes that are contracted, in or out, and those on the other side."""
        near, far = weight.axes("in"), weight.axes("out")
        return (near, far) if set(self.contract[1]) == set(near) else (far, near)


class ExampleColumns(NamedTuple):
    """The columns of rank that each row of an activation sees, where examples have own adapters.

    Attributes:
      mask: [examples, r], 1 for the columns of an example's adapter, 0 for others.
      axis: axis of the activation, of size k·examples·inner: row i is of example i // inner %
        examples.
      inner: number of consecutive rows of the activation that belong to one example.
    """

    mask: jax.Array
    axis: int
    inner: int = 1

    def along(self, z: jax.Array, axis: int, rank: int = -1) -> jax.Array:
        """Returns the mask in the dtype of z, ready to multiply it.

        Args:
          z: xA, with the activation's rows along `axis` and the columns of rank along `rank`.
          axis, rank: axis and rank of z.
        """
        n, r = self.mask.shape
        outer, rank = z.shape[axis] // (n * self.inner), rank % z.ndim
        mask = self.mask.astype(z.dtype)
        if outer * self.inner > 1:
            mask = jnp.broadcast_to(mask[None, :, None], (outer, n, self.inner, r))
            mask = mask.reshape(z.shape[axis], r)
        mask = mask if axis < rank else mask.T
        return lax.expand_dims(mask, [a for a in range(z.ndim) if a not in (axis, rank)])


def dot(
    x: jax.Array,
    weight: Factored,
    *,
    for_factors: jax.Array | None = None,
    contract: Dims,
    batch: Dims,
    weight_first: bool = False,
    rows: ExampleColumns | None = None,
    z: jax.Array | None = None,
    **params: Any,
) -> jax.Array:
    """Returns `lax.dot_general` of x with an adapted weight, in either order, in factored form.

    Args:
      x: any array.
      weight: contracted over all its in axes (the product xW), or over all its out axes (the
        mirror image: a tied head, a transposed use). Its batch axes may be batched or free.
      for_factors: x again, as A is to read it; x itself by default.
      contract, batch: axes of x and of the weight, as in `lax.dot_general`.
      weight_first: whether the weight is the left operand, so that its axes lead the result.
      rows: which columns of rank each row of x sees, where the weight has `rows`.
      z: s·xA, as `scaled_product` returns it; computed by default.
      params: `precision`, `preferred_element_type` and `out_sharding` of `lax.dot_general`.

    xA accumulates in fp32 and is scaled there; A and B are cast to x's dtype.
    """
    how = ProductCall(contract, batch, weight_first, rows, params)

    def base_product(x: jax.Array) -> jax.Array:
        return base_dot(x, weight.base, BaseDot(contract, batch, weight_first, params))

    def factor_product(x: jax.Array, weight: Factored, seen: jax.Array) -> jax.Array:
        return lax.reshape(_delta(x, weight, how, seen.dtype, z), seen.shape)

    if not weight.parts:
        return base_product(x)
    if set(contract[1]) != set(weight.axes("in")):
        if weight.gain is not None and set(batch[1]) != set(weight.axes("batch")):
            return _transposed_products(x, weight, how)
        if weight.gain is not None:
            x = for_factors = x * _contracted_gain(weight, x, contract, batch)
        weight = weight.replace(gain=None, shift=None)
    placed = functools.partial(_result_vector, weight, how, x.ndim)
    return combined(x, weight, base_product, factor_product, placed, for_factors=for_factors)


def _transposed_products(x: jax.Array, weight: Factored, how: ProductCall) -> jax.Array:
    """Returns the mirror image where batch axes are free, so that each weight has its own gain.

    Copies x for each weight, times its gain, batches the stack, and puts the axes back in order.
    """
    contract, batch, weight_first, _, params = how
    free = tuple(axis for axis in weight.axes("batch") if axis not in batch[1])
    xs = lax.expand_dims(x, range(x.ndim, x.ndim + len(free)))
    every = (batch[0] + tuple(range(x.ndim, xs.ndim)), batch[1] + free)
    xs = xs * _contracted_gain(weight, xs, contract, every)
    alone = weight.replace(gain=None, shift=None)
    result = dot(xs, alone, contract=contract, batch=every, weight_first=weight_first, **params)

    rows = [-1 - axis for axis in range(x.ndim - len(batch[0]) - len(contract[0]))]
    near = weight.axes("in")
    have = [*every[1], *near, *rows] if weight_first else [*every[1], *rows, *near]
    ours = sorted((*free, *near))
    want = [*batch[1], *ours, *rows] if weight_first else [*batch[1], *rows, *ours]
    return lax.transpose(result, [have.index(axis) for axis in want])


def combined(
    x: Value,
    weight: Factored,
    base_product: Callable[[Value], jax.Array],
    factor_product: Callable[[Value, Factored, jax.Array], jax.Array],
    placed: Callable[[jax.Array], jax.Array],
    *,
    for_factors: Value = None,
) -> jax.Array:
    """Returns the product of x with a whole weight; every kind of product ends here.

    Args:
      x: the activation.
      weight: seen by its in axes, so that gain and shift stand over what comes out.
      base_product: x ↦ xW.
      factor_product: (x, the weight, xW) ↦ s·(xA)B in the shape and dtype of xW.
      placed: puts a vector over the columns into the layout of xW.
      for_factors: x again, as A is to read it; x itself by default.
    """
    again = x if for_factors is None else for_factors

    def taken(again: Value, weight: Factored, seen: jax.Array) -> jax.Array:
        with jax.named_scope(FACTORS):
            delta = factor_product(dropped(again, weight), weight, seen)
        return seen + delta

    def columns_rescaled(x: jax.Array, again: Value, weight: Factored) -> jax.Array:
        return rescaled(taken(again, weight, base_product(x)), placed(weight.gain))

    if weight.gain is None:
        result = taken(again, weight, base_product(x))
    elif is_dropped(weight):  # as in PEFT: dropout acts on the adapter's change alone
        whole, seen = base_product(x), base_product(dropped(x, weight))
        result = whole - seen + rescaled(taken(again, weight, seen), placed(weight.gain))
    elif _is_narrow(weight):
        result = jax.checkpoint(columns_rescaled)(x, again, weight)
    else:
        result = columns_rescaled(x, again, weight)
    if weight.shift is None:
        return result
    return result + placed(weight.shift).astype(result.dtype)


def _is_narrow(weight: Factored) -> bool:
    """Returns True if, for the gain, a product is cheaper to recompute than its result to keep.

    That holds for the keys and values of grouped-query attention, which are narrow.
    """
    return 3 * math.prod(weight.sizes("out")) <= math.prod(weight.sizes("in"))


def _contracted_gain(weight: Factored, x: jax.Array, contract: Dims, batch: Dims) -> jax.Array:
    """Returns the gain in x's layout and dtype, where the out axes are contracted."""
    where = dict(zip(contract[1] + batch[1], contract[0] + batch[0], strict=True))
    return spread(weight.gain, weight.layout("gain"), where, x.ndim).astype(x.dtype)


def _result_vector(weight: Factored, how: ProductCall, x_ndim: int, vector: jax.Array) -> jax.Array:
    """Returns a gain or a shift in the layout of the product xW."""
    (x_contract, w_contract), (_, w_batch) = how.contract, how.batch
    n_free_x = x_ndim - len(w_batch) - len(x_contract)
    free = [a for a in range(len(weight.labels)) if a not in (*w_contract, *w_batch)]
    first = len(w_batch) + (0 if how.weight_first else n_free_x)
    where = {axis: i for i, axis in enumerate(w_batch)}
    where |= {axis: first + i for i, axis in enumerate(free)}
    return spread(vector, weight.layout("gain"), where, len(where) + n_free_x)


def _delta(
    x: jax.Array, weight: Factored, how: ProductCall, dtype: DTypeLike, z: jax.Array | None
) -> jax.Array:
    """Returns s·(xA)B in another shape: the free axes of x may be flattened to one."""
    if weight.is_compact:
        # B is formed again in the backward pass: kept, it would be a copy a layer.
        def through(z: jax.Array, weight: Factored) -> jax.Array:
            z = _activated(_scaled(x, z, weight, how), x, weight, how)
            return _product_with_b(z, x, weight, how, dtype)

        delta: jax.Array = jax.checkpoint(through)(_product_with_a(x, weight, how), weight)
        return delta
    z = scaled_product(x, weight, how) if z is None else z
    return _product_with_b(_activated(z, x, weight, how), x, weight, how, dtype)


def scaled_product(x: jax.Array, weight: Factored, how: ProductCall, of: int = 1) -> jax.Array:
    """Returns s·xA in x's dtype, [w_batch…, x_free…, free_stack…, r], x_free mostly flattened.

    Args:
      x, weight, how: see `dot`.
      of: the number of weights whose columns the weight's A has.
    """
    z = _scaled(x, _product_with_a(x, weight, how), weight, how)
    contracted = math.prod(x.shape[axis] for axis in how.contract[0])
    return named_if_narrow(z, weight.rank, contracted * of)


def named_if_narrow(z: jax.Array, rank: int, contracted: int) -> jax.Array:
    """Returns s·xA under the name that policies keep, if it is much smaller than x.

    Args:
      z: s·xA.
      rank: number of its columns for each row of x.
      contracted: number of elements of a row of x.
    """
    return checkpoint_name(z, NARROW_PRODUCT) if is_worth_keeping(rank, contracted) else z


def is_worth_keeping(rank: int, contracted: int) -> bool:
    """Returns True if s·xA is so small beside x that policies keep it: see `NARROW_PRODUCT`."""
    return rank * _NARROW <= contracted


def _product_with_a(x: jax.Array, weight: Factored, how: ProductCall) -> jax.Array:
    """Returns xA, [w_batch…, x_free…, free_stack…, r], in fp32 (or wider)."""
    (x_contract, w_contract), (x_batch, w_batch) = how.contract, how.batch
    stack, near_axes = weight.axes("batch"), how.sides(weight)[0]
    near = weight.a if near_axes == weight.axes("in") else weight.b
    n_stack, first = len(how.free_stack(weight)), len(stack) + 1
    return lax.dot_general(
        x,
        near.astype(x.dtype),
        (
            (x_contract, tuple(first + near_axes.index(axis) for axis in w_contract)),
            (x_batch, tuple(stack.index(axis) for axis in w_batch)),
        ),
        precision=how.params.get("precision"),
        preferred_element_type=wide(x.dtype),
        out_sharding=_rank_sharding(x, x_batch, how.x_free(x), n_stack) if is_sharded(x) else None,
    )


def _scaled(x: jax.Array, z: jax.Array, weight: Factored, how: ProductCall) -> jax.Array:
    """Returns s·z in x's dtype, z being xA; its axes that are x's free ones mostly flattened."""
    x_batch, w_batch, x_free = how.batch[0], how.batch[1], how.x_free(x)
    stack = weight.axes("batch")
    order = [stack.index(axis) for axis in (*w_batch, *how.free_stack(weight))]
    scales = lax.transpose(weight.scales.astype(z.dtype), [*order, len(stack)])
    scales = lax.expand_dims(scales, range(len(w_batch), len(w_batch) + len(x_free)))
    z = z * scales
    if how.rows is not None:
        z = z * how.rows.along(z, [*x_batch, *x_free].index(how.rows.axis))
    z = z.astype(x.dtype)
    if len(x_free) <= 1 or is_sharded(x) or is_on_mesh():
        return z
    flat = math.prod(x.shape[axis] for axis in x_free)
    lead = len(w_batch)
    return lax.reshape(z, (*z.shape[:lead], flat, *z.shape[lead + len(x_free) :]))


def _activated(z: jax.Array, x: jax.Array, weight: Factored, how: ProductCall) -> jax.Array:
    """Returns s·xA with zeros for the tokens that do not see the adapter.

    Raises:
      TokensError: the free axes of x are not those of the mask, in its order, nor both as one.
    """
    mask = weight.active
    if mask is None:
        return z
    rows = tuple(x.shape[axis] for axis in how.x_free(x))
    if rows not in (mask.shape, (mask.size,)):
        raise TokensError(wrong_rows(weight, rows))
    lead, last = len(how.batch[1]), len(how.free_stack(weight)) + 1
    mask = mask.reshape(z.shape[lead : z.ndim - last])
    mask = lax.expand_dims(mask, [*range(lead), *range(z.ndim - last, z.ndim)])
    return jnp.where(mask, z, jnp.zeros_like(z))


def _product_with_b(
    z: jax.Array, x: jax.Array, weight: Factored, how: ProductCall, dtype: DTypeLike
) -> jax.Array:
    """Returns zB, z being s·xA: the rank is contracted."""
    w_batch, free_stack, params = how.batch[1], how.free_stack(weight), how.params
    near_axes, far_axes = how.sides(weight)
    stack = weight.axes("batch")
    n_free = z.ndim - 1 - len(w_batch) - len(free_stack)
    # batch axes of the weight, wherever they stand in x, are batched
    z_batch = (*range(len(w_batch)), *range(len(w_batch) + n_free, z.ndim - 1))
    far_batch = tuple(stack.index(axis) for axis in (*w_batch, *free_stack))
    last, rank = (z.ndim - 1,), (len(stack),)
    kwargs: EqnParams = {"precision": params.get("precision"), "preferred_element_type": dtype}
    if is_sharded(x) and not free_stack:
        kwargs["out_sharding"] = params.get("out_sharding")
    far = (weight.b if near_axes == weight.axes("in") else weight.a).astype(x.dtype)
    if how.weight_first and not free_stack:
        return lax.dot_general(far, z, ((rank, last), (far_batch, z_batch)), **kwargs)
    delta = lax.dot_general(z, far, ((last, rank), (z_batch, far_batch)), **kwargs)
    if not free_stack:
        return delta
    # [w_batch…, free_stack…, x_free…, far…] -> the order of the weight's free axes in its base
    free_x = [("x", axis) for axis in range(n_free)]
    have = [*w_batch, *free_stack, *free_x, *far_axes]
    free_w = sorted((*free_stack, *far_axes))
    want = [*w_batch, *free_w, *free_x] if how.weight_first else [*w_batch, *free_x, *free_w]
    return lax.transpose(delta, [have.index(axis) for axis in want])


def dropped(x: jax.Array, weight: Factored) -> jax.Array:
    """Returns x with dropout as A's input, where the weight carries a key."""
    if not is_dropped(weight):
        return x
    key = weight.key.reshape(-1)[0]  # the layers of a stack that x meets at once share one mask
    keep = jax.random.bernoulli(key, 1 - weight.dropout, x.shape)
    kept = x * float(1 / (1 - weight.dropout))  # a NumPy scalar would widen x
    return jnp.where(keep, kept, jnp.zeros_like(x))


def is_dropped(weight: Factored) -> bool:
    """Returns True if dropout is on."""
    return weight.key is not None and weight.dropout > 0


def is_sharded(x: jax.Array) -> bool:
    """Returns True if x's type says how it is sharded (a mesh with explicit axes)."""
    return any(part is not None for part in jax.typeof(x).sharding.spec)


def is_on_mesh() -> bool:
    """Returns True if `jax.set_mesh` has set a mesh of several devices, which x may lie on."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def _rank_sharding(
    x: jax.Array, x_batch: tuple[int, ...], x_free: list[int], n_stack: int
) -> jax.sharding.NamedSharding:
    """Returns the sharding of z: x's, and none over the weight's free axes and the rank."""
    sharding = jax.typeof(x).sharding
    parts = [sharding.spec[axis] for axis in (*x_batch, *x_free)]
    spec = jax.sharding.PartitionSpec(*parts, *[None] * (n_stack + 1))
    return jax.sharding.NamedSharding(sharding.mesh, spec)
