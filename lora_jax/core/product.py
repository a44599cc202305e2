"""The product of an activation with an adapted weight: xW + s·(xA)B, and its mirror image.

This file knows how factors are stored (`lora_jax.core.parts.AXES`), and why. For a weight with
batch, in and out axes:

    a      [batch…, r, in…]     A, transposed: xA and its gradient then read the long axis in order
    b      [batch…, r, out…]    B
    scale  [batch…]             s, fp32

and where a variant asks for them, vectors over the columns:

    gain   [batch…, out…]       g: each column of W + s·AB is multiplied by it
    shift  [batch…, out…]       added to the product xW

A compact weight (VeRA, LoRA-XS, TinyLoRA) has, in place of a and b, one pair [r, in…] and [r, out…]
for all layers of its stack, or small arrays around B; B is then formed where it is used.

Terms of this file: **z** is s·xA. The **near** axes of a weight are those of the side that x
contracts, and the **far** axes those of the other side: in and out for xW, out and in for the
**mirror image** xWᵀ. A **free** axis is neither contracted nor batched. The **free stack** is the
batch axes of a weight that are free, so that x meets all layers of a stack at once.

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

from lora_jax.core.factored import Factored, TokensError, wrong_rows_message
from lora_jax.core.few_rows import BaseDot, Dims, base_dot
from lora_jax.core.magnitude import accumulation_dtype, rescale_columns
from lora_jax.core.names import FACTORS, NARROW_PRODUCT
from lora_jax.core.parts import Axes, align_to_axes
from lora_jax.core.types import EqnParams, Value

_MIN_ELEMENTS_PER_RANK = 32  # elements of a row of x for each rank; see `NARROW_PRODUCT`


class ProductCall(NamedTuple):
    """The arguments of a product of x and a weight; see `dot`."""

    contract: Dims
    batch: Dims = ((), ())
    weight_first: bool = False
    rows: "ExampleColumns | None" = None
    params: EqnParams = {}

    def x_free(self, x: jax.Array) -> list[int]:
        """Returns the free axes of x."""
        return [axis for axis in range(x.ndim) if axis not in (*self.contract[0], *self.batch[0])]

    def free_stack(self, weight: Factored) -> tuple[int, ...]:
        """Returns the batch axes of the weight that the product does not batch."""
        return tuple(axis for axis in weight.axes("batch") if axis not in self.batch[1])

    def sides(self, weight: Factored) -> tuple[Axes, Axes]:
        """Returns the contracted (near) and the remaining (far) axes of the weight."""
        in_axes = weight.axes("in")
        out_axes = weight.axes("out")
        if set(self.contract[1]) == set(in_axes):
            return in_axes, out_axes
        return out_axes, in_axes


class ExampleColumns(NamedTuple):
    """The columns of A that each row of x uses, if each example has its own adapter.

    Attributes:
      mask: [examples, r], 1 for the columns of an example's adapter, 0 for others.
      axis: axis of the activation, of size k·examples·n_consecutive. Row i belongs to the example
        i // n_consecutive % examples.
      n_consecutive: number of consecutive rows of the activation that belong to one example.
    """

    mask: jax.Array
    axis: int
    n_consecutive: int = 1

    def along(self, z: jax.Array, axis: int, rank: int = -1) -> jax.Array:
        """Returns the mask in the dtype of z, with axes that broadcast against z.

        Args:
          z: xA.
          axis: axis of z that the activation's rows lie along.
          rank: axis of z that the columns of A lie along.
        """
        n_examples, n_columns = self.mask.shape
        n_rows = z.shape[axis]
        rank_axis = rank % z.ndim
        mask = self.mask.astype(z.dtype)
        # Repeat the mask for all rows of an example: [rows, r].
        repeats = n_rows // (n_examples * self.n_consecutive)
        if repeats * self.n_consecutive > 1:
            repeated_shape = (repeats, n_examples, self.n_consecutive, n_columns)
            mask = jnp.broadcast_to(mask[None, :, None], repeated_shape)
            mask = mask.reshape(n_rows, n_columns)
        # Put both axes where z has them.
        mask = mask if axis < rank_axis else mask.T
        other_axes = [i for i in range(z.ndim) if i not in (axis, rank_axis)]
        return lax.expand_dims(mask, other_axes)


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
      for_factors: a copy of x for A to read, such as x in another dtype; x itself by default.
      contract, batch: axes of x and of the weight, as in `lax.dot_general`.
      weight_first: whether the weight is the left operand, so that its axes lead the result.
      rows: which columns of rank each row of x sees, where the weight has `rows`.
      z: s·xA, as `scaled_product` returns it; computed by default.
      params: `precision`, `preferred_element_type` and `out_sharding` of `lax.dot_general`.

    xA accumulates in fp32 and is scaled there; A and B are cast to x's dtype.
    """
    call = ProductCall(
        contract=contract, batch=batch, weight_first=weight_first, rows=rows, params=params
    )

    def base_product(x: jax.Array) -> jax.Array:
        spec = BaseDot(contract=contract, batch=batch, weight_first=weight_first, params=params)
        return base_dot(x, weight.base, spec)

    def factor_product(x: jax.Array, weight: Factored, base_result: jax.Array) -> jax.Array:
        delta = _product_with_factors(x, weight, call, base_result.dtype, z)
        return lax.reshape(delta, base_result.shape)

    if not weight.parts:
        return base_product(x)
    is_mirror_image = set(contract[1]) != set(weight.axes("in"))
    if is_mirror_image:
        # The gain belongs to the axes that x contracts, so x is multiplied by the gain.
        if weight.gain is not None and set(batch[1]) != set(weight.axes("batch")):
            return _transposed_product_with_gains(x, weight, call)
        if weight.gain is not None:
            x = x * _gain_in_layout_of_x(weight, x, contract, batch)
            for_factors = x
        weight = weight.replace(gain=None, shift=None)
    lay_out = functools.partial(_vector_in_result_layout, weight, call, x.ndim)
    return combine_base_and_factors(
        x, weight, base_product, factor_product, lay_out, for_factors=for_factors
    )


def _transposed_product_with_gains(x: jax.Array, weight: Factored, call: ProductCall) -> jax.Array:
    """Returns xWᵀ for a free stack in which each layer has its own gain.

    Copies x for each layer, times the layer's gain, batches the stack, and puts the axes of the
    result in order.
    """
    x_batch, w_batch = call.batch
    free_stack = call.free_stack(weight)
    x_of_layer = lax.expand_dims(x, range(x.ndim, x.ndim + len(free_stack)))
    batch = (x_batch + tuple(range(x.ndim, x_of_layer.ndim)), w_batch + free_stack)
    x_of_layer = x_of_layer * _gain_in_layout_of_x(weight, x_of_layer, call.contract, batch)
    result = dot(
        x_of_layer,
        weight.replace(gain=None, shift=None),
        contract=call.contract,
        batch=batch,
        weight_first=call.weight_first,
        **call.params,
    )

    # Batching has moved the stack to the front of the result. Each axis of the result gets a label,
    # so that the axes can be put back in order: the weight's axes have their numbers, and the free
    # axes of x have -1, -2, …
    x_free = [-1 - axis for axis in range(len(call.x_free(x)))]
    in_axes = weight.axes("in")  # what comes out of a transposed product
    w_free = sorted((*free_stack, *in_axes))
    if call.weight_first:
        result_axes = [*w_batch, *free_stack, *in_axes, *x_free]
        wanted_axes = [*w_batch, *w_free, *x_free]
    else:
        result_axes = [*w_batch, *free_stack, *x_free, *in_axes]
        wanted_axes = [*w_batch, *x_free, *w_free]
    return lax.transpose(result, [result_axes.index(axis) for axis in wanted_axes])


def combine_base_and_factors(
    x: Value,
    weight: Factored,
    base_product: Callable[[Value], jax.Array],
    factor_product: Callable[[Value, Factored, jax.Array], jax.Array],
    lay_out: Callable[[jax.Array], jax.Array],
    *,
    for_factors: Value = None,
) -> jax.Array:
    """Returns x(W + s·AB)·diag(gain) + shift; every kind of product ends here.

    Args:
      x: the activation.
      weight: the weight, whose in axes x contracts: gain and shift are vectors over the result.
      base_product: x ↦ xW.
      factor_product: (x, the weight, xW) ↦ s·(xA)B in the shape and dtype of xW.
      lay_out: brings a gain or a shift into the layout of xW.
      for_factors: a copy of x for A to read; x itself by default.
    """
    factor_x = x if for_factors is None else for_factors

    def add_factors(factor_x: Value, weight: Factored, base_result: jax.Array) -> jax.Array:
        with jax.named_scope(FACTORS):
            delta = factor_product(apply_dropout(factor_x, weight), weight, base_result)
        return base_result + delta

    def rescaled_product(x: jax.Array, factor_x: Value, weight: Factored) -> jax.Array:
        total = add_factors(factor_x, weight, base_product(x))
        return rescale_columns(total, lay_out(weight.gain))

    # LoRA without a gain, DoRA with dropout, DoRA that is cheap to recompute, DoRA.
    if weight.gain is None:
        result = add_factors(factor_x, weight, base_product(x))
    elif has_dropout(weight):  # as in PEFT: dropout acts on the adapter's change alone
        base_result = base_product(x)
        dropped_result = base_product(apply_dropout(x, weight))
        total = add_factors(factor_x, weight, dropped_result)
        rescaled_total = rescale_columns(total, lay_out(weight.gain))
        result = (base_result - dropped_result) + rescaled_total
    elif _is_cheap_to_recompute(weight):
        result = jax.checkpoint(rescaled_product)(x, factor_x, weight)
    else:
        result = rescaled_product(x, factor_x, weight)
    if weight.shift is None:
        return result
    return result + lay_out(weight.shift).astype(result.dtype)


def _is_cheap_to_recompute(weight: Factored) -> bool:
    """Returns True if recomputing a product for the gain costs less than storing it.

    That holds for the narrow keys and values of grouped-query attention.
    """
    return 3 * math.prod(weight.sizes("out")) <= math.prod(weight.sizes("in"))


def _gain_in_layout_of_x(weight: Factored, x: jax.Array, contract: Dims, batch: Dims) -> jax.Array:
    """Returns the gain in x's layout and dtype, for contracted out axes."""
    x_axes = dict(zip(contract[1] + batch[1], contract[0] + batch[0], strict=True))
    return align_to_axes(weight.gain, weight.layout("gain"), x_axes, x.ndim).astype(x.dtype)


def _vector_in_result_layout(
    weight: Factored, call: ProductCall, x_ndim: int, vector: jax.Array
) -> jax.Array:
    """Returns a gain or a shift in the layout of the product xW."""
    x_contract, w_contract = call.contract
    _, w_batch = call.batch
    n_x_free = x_ndim - len(w_batch) - len(x_contract)
    w_free = [axis for axis in range(len(weight.labels)) if axis not in (*w_contract, *w_batch)]
    # xW has [batch…, x_free…, w_free…], or [batch…, w_free…, x_free…] if the weight comes first.
    n_axes_before_w_free = len(w_batch) + (0 if call.weight_first else n_x_free)
    result_axes = {axis: i for i, axis in enumerate(w_batch)}
    result_axes |= {axis: i for i, axis in enumerate(w_free, n_axes_before_w_free)}
    return align_to_axes(vector, weight.layout("gain"), result_axes, len(result_axes) + n_x_free)


def _product_with_factors(
    x: jax.Array, weight: Factored, call: ProductCall, dtype: DTypeLike, z: jax.Array | None
) -> jax.Array:
    """Returns s·(xA)B; the free axes of x are flattened if those of z are."""
    if weight.is_compact:
        # B is formed again in the backward pass: kept, it would take a copy for each layer.
        def scale_and_multiply(xa: jax.Array, weight: Factored) -> jax.Array:
            z = _zero_inactive_tokens(_scale_xa(x, xa, weight, call), x, weight, call)
            return _multiply_by_b(z, x, weight, call, dtype)

        xa = _multiply_by_a(x, weight, call)
        delta: jax.Array = jax.checkpoint(scale_and_multiply)(xa, weight)
        return delta
    if z is None:
        z = scaled_product(x, weight, call)
    return _multiply_by_b(_zero_inactive_tokens(z, x, weight, call), x, weight, call, dtype)


def scaled_product(
    x: jax.Array, weight: Factored, call: ProductCall, n_weights: int = 1
) -> jax.Array:
    """Returns s·xA in x's dtype, [w_batch…, x_free…, free_stack…, r], x_free mostly flattened.

    Args:
      x, weight: see `dot`.
      call: the arguments of the product.
      n_weights: the number of weights whose A's are joined in the weight's A.
    """
    z = _scale_xa(x, _multiply_by_a(x, weight, call), weight, call)
    contracted_size = math.prod(x.shape[axis] for axis in call.contract[0])
    return name_if_narrow(z, weight.rank, contracted_size * n_weights)


def name_if_narrow(z: jax.Array, rank: int, contracted: int) -> jax.Array:
    """Returns s·xA, named for remat policies if it is much smaller than x.

    Args:
      z: s·xA.
      rank: number of its columns for each row of x.
      contracted: number of elements of a row of x.
    """
    return checkpoint_name(z, NARROW_PRODUCT) if is_worth_keeping(rank, contracted) else z


def is_worth_keeping(rank: int, contracted: int) -> bool:
    """Returns True if s·xA is so much smaller than x that remat policies keep it."""
    return rank * _MIN_ELEMENTS_PER_RANK <= contracted


def _multiply_by_a(x: jax.Array, weight: Factored, call: ProductCall) -> jax.Array:
    """Returns xA, [w_batch…, x_free…, free_stack…, r], in fp32 (or wider)."""
    x_contract, w_contract = call.contract
    x_batch, w_batch = call.batch
    near_axes, _ = call.sides(weight)
    near_factor = weight.a if near_axes == weight.axes("in") else weight.b  # [batch…, r, near…]
    # The axes of the factor that correspond to the axes of the weight in the product.
    stack_axes = weight.axes("batch")
    n_axes_before_near = len(stack_axes) + 1
    factor_contract = tuple(n_axes_before_near + near_axes.index(axis) for axis in w_contract)
    factor_batch = tuple(stack_axes.index(axis) for axis in w_batch)
    out_sharding = None
    if has_explicit_sharding(x):
        n_free_stack = len(call.free_stack(weight))
        out_sharding = _sharding_of_xa(x, x_batch, call.x_free(x), n_free_stack)
    return lax.dot_general(
        x,
        near_factor.astype(x.dtype),
        ((x_contract, factor_contract), (x_batch, factor_batch)),
        precision=call.params.get("precision"),
        preferred_element_type=accumulation_dtype(x.dtype),
        out_sharding=out_sharding,
    )


def _scale_xa(x: jax.Array, xa: jax.Array, weight: Factored, call: ProductCall) -> jax.Array:
    """Returns z = s·xA in x's dtype, with mostly flattened free axes."""
    x_batch, w_batch = call.batch
    x_free = call.x_free(x)
    n_batch = len(w_batch)
    # Scales as [w_batch…, 1 for each axis of x_free, free_stack…, 1 or r].
    stack_axes = weight.axes("batch")
    order = [stack_axes.index(axis) for axis in (*w_batch, *call.free_stack(weight))]
    scales = lax.transpose(weight.scales.astype(xa.dtype), [*order, len(stack_axes)])
    scales = lax.expand_dims(scales, range(n_batch, n_batch + len(x_free)))
    z = xa * scales
    if call.rows is not None:
        z = z * call.rows.along(z, [*x_batch, *x_free].index(call.rows.axis))
    z = z.astype(x.dtype)
    # Flatten the free axes of x, unless that would change how z is sharded.
    if len(x_free) <= 1 or has_explicit_sharding(x) or is_mesh_set():
        return z
    n_rows = math.prod(x.shape[axis] for axis in x_free)
    return lax.reshape(z, (*z.shape[:n_batch], n_rows, *z.shape[n_batch + len(x_free) :]))


def _zero_inactive_tokens(
    z: jax.Array, x: jax.Array, weight: Factored, call: ProductCall
) -> jax.Array:
    """Returns s·xA with zeros for tokens that do not use the adapter.

    Raises:
      TokensError: the free axes of x are not those of the mask, in its order, nor both as one.
    """
    mask = weight.active
    if mask is None:
        return z
    row_shape = tuple(x.shape[axis] for axis in call.x_free(x))
    if row_shape not in (mask.shape, (mask.size,)):
        raise TokensError(wrong_rows_message(weight, row_shape))
    # The rows of z lie between its batch axes and its free stack and rank.
    row_start = len(call.batch[1])
    row_stop = z.ndim - 1 - len(call.free_stack(weight))
    mask = mask.reshape(z.shape[row_start:row_stop])
    mask = lax.expand_dims(mask, [*range(row_start), *range(row_stop, z.ndim)])
    return jnp.where(mask, z, jnp.zeros_like(z))


def _multiply_by_b(
    z: jax.Array, x: jax.Array, weight: Factored, call: ProductCall, dtype: DTypeLike
) -> jax.Array:
    """Returns zB, contracted over the rank and batched over the weight's batch axes."""
    w_batch = call.batch[1]
    free_stack = call.free_stack(weight)
    near_axes, far_axes = call.sides(weight)
    stack_axes = weight.axes("batch")
    # z is [w_batch…, x_free…, free_stack…, r], and the far factor [batch…, r, far…].
    n_x_free = z.ndim - 1 - len(w_batch) - len(free_stack)
    z_batch = (*range(len(w_batch)), *range(len(w_batch) + n_x_free, z.ndim - 1))
    factor_batch = tuple(stack_axes.index(axis) for axis in (*w_batch, *free_stack))
    z_rank = (z.ndim - 1,)
    factor_rank = (len(stack_axes),)
    kwargs: EqnParams = {
        "precision": call.params.get("precision"),
        "preferred_element_type": dtype,
    }
    if has_explicit_sharding(x) and not free_stack:
        kwargs["out_sharding"] = call.params.get("out_sharding")
    far_factor = weight.b if near_axes == weight.axes("in") else weight.a
    far_factor = far_factor.astype(x.dtype)
    # The weight comes first: its axes lead the result.
    if call.weight_first and not free_stack:
        dims = ((factor_rank, z_rank), (factor_batch, z_batch))
        return lax.dot_general(far_factor, z, dims, **kwargs)
    dims = ((z_rank, factor_rank), (z_batch, factor_batch))
    delta = lax.dot_general(z, far_factor, dims, **kwargs)
    if not free_stack:
        return delta
    # [w_batch…, free_stack…, x_free…, far…] -> the order of the weight's free axes in its base
    x_free = [("x", axis) for axis in range(n_x_free)]
    w_free = sorted((*free_stack, *far_axes))
    delta_axes = [*w_batch, *free_stack, *x_free, *far_axes]
    order = [*w_batch, *w_free, *x_free] if call.weight_first else [*w_batch, *x_free, *w_free]
    return lax.transpose(delta, [delta_axes.index(axis) for axis in order])


def apply_dropout(x: jax.Array, weight: Factored) -> jax.Array:
    """Returns A's input: x, with dropout if the weight has a key."""
    if not has_dropout(weight):
        return x
    key = weight.key.reshape(-1)[0]  # the layers of a stack that x meets at once share one mask
    is_kept = jax.random.bernoulli(key, 1 - weight.dropout, x.shape)
    rescaled_x = x * float(1 / (1 - weight.dropout))  # a NumPy scalar would widen x
    return jnp.where(is_kept, rescaled_x, jnp.zeros_like(x))


def has_dropout(weight: Factored) -> bool:
    """Returns True if a weight has a dropout key and a rate."""
    return weight.key is not None and weight.dropout > 0


def has_explicit_sharding(x: jax.Array) -> bool:
    """Returns True if x's type contains its sharding (a mesh with explicit axes)."""
    return any(entry is not None for entry in jax.typeof(x).sharding.spec)


def is_mesh_set() -> bool:
    """Returns True if `jax.set_mesh` has set a mesh of several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def _sharding_of_xa(
    x: jax.Array, x_batch: tuple[int, ...], x_free: list[int], n_free_stack: int
) -> jax.sharding.NamedSharding:
    """Returns the sharding of xA: x's, replicated over the free stack and the rank."""
    sharding = jax.typeof(x).sharding
    entries = [sharding.spec[axis] for axis in (*x_batch, *x_free)]
    spec = jax.sharding.PartitionSpec(*entries, *[None] * (n_free_stack + 1))
    return jax.sharding.NamedSharding(sharding.mesh, spec)
