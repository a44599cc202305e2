"""Products of few rows of x, as in decoding, with a quantized W: the forms for TPUs.

A training step multiplies thousands of rows by W, and XLA decodes W inside the product. With few
rows, XLA for TPUs would write the decoded W to memory first, for every token. The **flat** form of
the product prevents that: x and the result have two axes, and barriers before and after the product
keep the compiler from changing that. The matrix units of a TPU take at least eight rows, so x is
padded with rows of zeros.

Where W is a layer of a stack, its codes may have a **rows kernel** (`rows_kernel`): a compiled
kernel that reads the codes of the layer out of the stack, for a limited number of rows.

The call of a rows kernel is a primitive, which each platform lowers in its way. A program for one
TPU contains the kernel. XLA cannot partition a kernel, so a program for several TPUs contains the
flat form. Other platforms have the plain product. The primitive has the derivatives of the product.
Under `jax.vmap` it becomes the product, unless x alone is mapped.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.base import is_base, product, stack_member
from lora_jax.core.extend import Primitive, ad, batching, jaxpr_as_fun, mlir
from lora_jax.core.types import BaseLike, EqnParams

Dims = tuple[tuple[int, ...], tuple[int, ...]]  # axes of x, axes of the weight
MAX_FEW_ROWS = 256  # of x, for the flat form
MAX_KERNEL_ROWS = 32  # of x, for a rows kernel
_MIN_TPU_ROWS = 8  # the fewest rows that a TPU's matrix unit takes
Product = Callable[[BaseLike, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class RowsCall:
    """The implementations of one product of W and x, each a function (W, x) -> xW.

    Attributes:
      kernel: the form for one TPU, the rows kernel.
      plain: the form for platforms other than TPUs.
      flat: the form for several TPUs.
      differentiable: the form that is differentiated.
      mapped: the form for an x with one more axis in front.
    """

    kernel: Product
    plain: Product
    flat: Product
    differentiable: Product
    mapped: Product


def call_rows(call: RowsCall, base: BaseLike, x: jax.Array) -> jax.Array:
    """Returns xW by the implementation for the target platform."""
    leaves, tree = jax.tree.flatten((base, x))
    jaxpr = jax.make_jaxpr(_product_of_leaves(tree, call.plain))(*leaves)
    result: jax.Array = _ROWS_PRIMITIVE.bind(*leaves, jaxpr=jaxpr, call=call, tree=tree)
    return result


# Its operands are the leaves of the pair (W, x). Its parameters are the jaxpr of the plain product,
# the `RowsCall`, and the structure of the pair (`tree`).
_ROWS_PRIMITIVE = Primitive("few_rows")


def _product_of_leaves(tree: Any, product: Product) -> Callable[..., jax.Array]:
    """Returns the product as a function of the flattened pair (W, x)."""
    return lambda *leaves: product(*jax.tree.unflatten(tree, leaves))


def _run_eagerly(*leaves: jax.Array, **params: Any) -> Any:
    return jax.jit(lambda *leaves: _ROWS_PRIMITIVE.bind(*leaves, **params))(*leaves)


def _abstract_result(*_: Any, jaxpr: Any, **__: Any) -> Any:
    return jaxpr.out_avals[0]


def _lower_plain_product(ctx: Any, *leaves: Any, jaxpr: Any, **_: Any) -> Any:
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *leaves)


def _lower_for_tpu(ctx: Any, *leaves: Any, call: RowsCall, tree: Any, **_: Any) -> Any:
    """Lowers the product to the kernel for one TPU, or to the flat form for several."""
    # Inside shard_map the context has a mesh instead of a number of devices.
    n_devices = getattr(ctx.module_context.axis_context, "num_devices", None)
    form = call.kernel if n_devices == 1 else call.flat
    product = _product_of_leaves(tree, form)
    return mlir.lower_fun(product, multiple_results=False)(ctx, *leaves)


def _differentiate(
    primals: Sequence[Any], tangents: Sequence[Any], *, call: RowsCall, tree: Any, **_: Any
) -> Any:
    """Returns the product and its tangent, by the JVP of the differentiable form."""
    product = _product_of_leaves(tree, call.differentiable)
    # Leaves with a symbolic zero as tangent are constants of the derivative.
    variable_indices = [
        index for index, tangent in enumerate(tangents) if type(tangent) is not ad.Zero
    ]

    def product_of_variables(*variables: jax.Array) -> jax.Array:
        leaves = [*primals]
        for index, variable in zip(variable_indices, variables, strict=True):
            leaves[index] = variable
        return product(*leaves)

    return jax.jvp(
        product_of_variables,
        [primals[index] for index in variable_indices],
        [tangents[index] for index in variable_indices],
    )


def _map_product(
    leaves: Sequence[Any], axes: Sequence[int | None], *, call: RowsCall, tree: Any, **_: Any
) -> tuple[Any, int]:
    """Returns the product under vmap, and the mapped axis of the result."""
    *base_axes, x_axis = axes
    is_base_mapped = any(axis is not None for axis in base_axes)
    # Each example has its own W: use the product that `jax.vmap` can map.
    if x_axis is None or is_base_mapped:
        product = _product_of_leaves(tree, call.differentiable)
        return jax.vmap(product, tuple(axes))(*leaves), 0
    # Only x is mapped: its examples are more rows of the same product.
    *base_leaves, x = leaves
    x = jnp.moveaxis(x, x_axis, 0)
    return _product_of_leaves(tree, call.mapped)(*base_leaves, x), 0


_ROWS_PRIMITIVE.def_impl(_run_eagerly)
_ROWS_PRIMITIVE.def_abstract_eval(_abstract_result)
mlir.register_lowering(_ROWS_PRIMITIVE, _lower_plain_product)
mlir.register_lowering(_ROWS_PRIMITIVE, _lower_for_tpu, platform="tpu")
ad.primitive_jvps[_ROWS_PRIMITIVE] = _differentiate
batching.primitive_batchers[_ROWS_PRIMITIVE] = _map_product


class BaseDot(NamedTuple):
    """The arguments of `lax.dot_general` for x and W; see `lora_jax.core.product.dot`."""

    contract: Dims
    batch: Dims = ((), ())
    weight_first: bool = False
    params: EqnParams = {}


def base_dot(x: jax.Array, base: BaseLike, spec: BaseDot) -> jax.Array:
    """Returns xW, or Wᵀx if the weight comes first, like `lax.dot_general`.

    Args:
      x: any array.
      base: W.
      spec: the axes, their order, and the parameters of `lax.dot_general`.
    """
    if not _has_few_rows(x, base, spec):
        return _plain_dot(spec, base, x)
    call = _rows_kernel_call(x, base, spec)
    if call is None:
        return _dot_by_platform(spec, base, x)
    return call_rows(call, base, x)


def _dot_by_platform(spec: BaseDot, base: BaseLike, x: jax.Array) -> jax.Array:
    """Returns xW: in the flat form on TPUs, and in the plain form elsewhere."""
    dot = functools.partial(
        lax.platform_dependent,
        tpu=functools.partial(flat_dot, spec),
        default=functools.partial(_plain_dot, spec),
    )
    # Without checkpoint, the backward pass would keep the operands of both branches, which are the
    # codes of each layer.
    result: jax.Array = jax.checkpoint(dot, prevent_cse=False)(base, x)
    return result


def _rows_kernel_call(x: jax.Array, base: BaseLike, spec: BaseDot) -> RowsCall | None:
    """Returns the call of a rows kernel, or None if W belongs to no stack with a kernel."""
    member_and_casts = stack_member(base)
    if member_and_casts is None:
        return None
    is_matrix_product = spec.contract == ((x.ndim - 1,), (0,)) and len(base.shape) == 2
    if not is_matrix_product:
        return None
    member, casts = member_and_casts
    rows = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    kernel = member.stack.rows_kernel(rows, casts, spec.params)
    if kernel is None:
        return None

    def run_kernel(base: BaseLike, x: jax.Array) -> jax.Array:
        """Runs the kernel on the stack and the member's index."""
        # `base` has the structure of `member`, but the arrays of this call.
        base_member_and_casts = stack_member(base)
        assert base_member_and_casts is not None, "the operand has the structure of a stack member"
        base_member, _ = base_member_and_casts
        result: jax.Array = kernel(base_member.stack, base_member.index, x.reshape(rows.shape))
        return result.reshape(*x.shape[:-1], -1)

    def map_rows(base: BaseLike, x: jax.Array) -> jax.Array:
        return base_dot(x, base, spec._replace(contract=((x.ndim - 1,), (0,))))

    return RowsCall(
        kernel=run_kernel,
        plain=functools.partial(_plain_dot, spec),
        flat=functools.partial(flat_dot, spec),
        differentiable=functools.partial(_dot_by_platform, spec),
        mapped=map_rows,
    )


def _plain_dot(spec: BaseDot, base: BaseLike, x: jax.Array) -> jax.Array:
    """Returns xW, or Wᵀx if the weight comes first, by a plain `lax.dot_general`."""

    def dot(w: jax.Array, x: jax.Array) -> jax.Array:
        if spec.weight_first:
            return lax.dot_general(w, x, (spec.contract[::-1], spec.batch[::-1]), **spec.params)
        return lax.dot_general(x, w, (spec.contract, spec.batch), **spec.params)

    return product(dot, base, x)


def flat_dot(spec: BaseDot, base: BaseLike, x: jax.Array) -> jax.Array:
    """Returns xW in the flat form: x padded to at least eight rows, between barriers."""
    n_row_axes = x.ndim - len(spec.contract[0])
    row_shape = x.shape[:n_row_axes]
    n_rows = math.prod(row_shape)
    # [rows, contracted axes…], padded to eight rows
    flat_x = x.reshape(n_rows, *x.shape[n_row_axes:])
    n_padding_rows = max(0, _MIN_TPU_ROWS - n_rows)
    flat_x = jnp.pad(flat_x, [(0, n_padding_rows), *[(0, 0)] * (flat_x.ndim - 1)])

    def dot(w: jax.Array, flat_x: jax.Array) -> jax.Array:
        dims = ((tuple(range(1, flat_x.ndim)), spec.contract[1]), ((), ()))
        return lax.dot_general(flat_x, w, dims, **spec.params)

    flat_x = lax.optimization_barrier(flat_x)
    result: jax.Array = lax.optimization_barrier(product(dot, base, flat_x))
    return result[:n_rows].reshape(*row_shape, *result.shape[1:])


def _has_few_rows(x: jax.Array, base: BaseLike, spec: BaseDot) -> bool:
    """Returns True if W is quantized, x has few rows, and its last axes are contracted."""
    is_plain_product = not (spec.weight_first or spec.batch[0] or spec.params.get("out_sharding"))
    if not is_base(base) or not is_plain_product:
        return False
    n_row_axes = x.ndim - len(spec.contract[0])
    is_contracted_last = spec.contract[0] == tuple(range(n_row_axes, x.ndim))
    is_sharded = any(entry is not None for entry in jax.typeof(x).sharding.spec)
    is_few = math.prod(x.shape[:n_row_axes]) <= MAX_FEW_ROWS
    return is_contracted_last and not is_sharded and is_few
