"""The call of a TPU kernel for ragged products of x with a quantized W.

The call is a primitive, which each platform lowers in its way. A program for one TPU contains the
kernel, which reads codes. XLA cannot partition a kernel, so a program for several TPUs contains the
plain product, which forms W from its codes. So do other platforms.

The product is linear in x: the tangent of the result is the product of the tangent of x, and the
gradient of x is the product with the transposed W. Both are calls of the same primitive.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.core.base import StackMember, before_casts, has_ragged_kernel, product
from lora_jax.core.extend import Primitive, ad, batching, jaxpr_as_fun, mlir
from lora_jax.core.names import RAGGED_CALL
from lora_jax.core.types import BaseLike, EqnParams


@dataclasses.dataclass(frozen=True, eq=False)
class _RaggedCall:
    """The implementations of one ragged product.

    Attributes:
      kernel: (a layer, its place in a stack or None, x, group sizes, whether W is transposed) ->
        the product; the form for one TPU.
      plain: (W as an array, x, group sizes) -> the product with W.
      rows: the shape and the dtype of the rows that W multiplies.
    """

    kernel: Callable[..., jax.Array]
    plain: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    rows: jax.ShapeDtypeStruct

    def run_kernel(
        self, base: BaseLike, x: jax.Array, group_sizes: jax.Array, transposed: bool
    ) -> jax.Array:
        """Returns the product with W, or with its transpose, by the kernel."""
        source, _ = _source_and_casts(base)
        is_member = isinstance(source, StackMember)
        layer, member = (source.member, source) if is_member else (source, None)
        return self.kernel(layer, member, x, group_sizes, transposed)

    def form_and_multiply(
        self, base: BaseLike, x: jax.Array, group_sizes: jax.Array, transposed: bool
    ) -> jax.Array:
        """Returns the product with W, or with its transpose, which it forms from its codes."""
        if not transposed:
            return product(self.plain, base, x, group_sizes)

        def multiply(rows: jax.Array) -> jax.Array:
            return product(self.plain, base, rows, group_sizes)

        rows = jnp.zeros(self.rows.shape, self.rows.dtype)
        _, transpose = jax.vjp(multiply, rows)
        result: jax.Array
        (result,) = transpose(x)
        return result


def ragged_product(
    plain: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    base: BaseLike,
    x: jax.Array,
    group_sizes: jax.Array,
    params: EqnParams,
) -> jax.Array:
    """Returns the product of sorted rows with W, by a kernel where the codes of W have one.

    Args:
      plain: (W as an array, x, group sizes) -> the product.
      base: W, [groups, in, out].
      x: [rows, in].
      group_sizes: [groups] int, the number of rows of each group.
      params: parameters of `lax.ragged_dot_general`.

    Returns:
      [rows, out].
    """
    source, casts = _source_and_casts(base)
    layer = source.member if isinstance(source, StackMember) else source
    kernel = layer.ragged_kernel(x, casts, params) if has_ragged_kernel(layer) else None
    if kernel is None:
        return product(plain, base, x, group_sizes)
    call = _RaggedCall(kernel=kernel, plain=plain, rows=jax.ShapeDtypeStruct(x.shape, x.dtype))
    leaves, tree = jax.tree.flatten((base, group_sizes))
    return _bind(x, leaves, call=call, tree=tree, transposed=False)


def _source_and_casts(base: BaseLike) -> tuple[BaseLike, tuple[DTypeLike, ...]]:
    """Returns the base before casts, and the dtypes of the casts; a rearranged one as it is."""
    return before_casts(base) or (base, ())


# Its operands are x and the leaves of the pair (W, group sizes). Its parameters are the jaxpr of
# the plain product, the `_RaggedCall`, the structure of the pair (`tree`), and `transposed`.
_RAGGED_PRIMITIVE = Primitive(RAGGED_CALL)


def _bind(
    x: jax.Array, leaves: Sequence[Any], *, call: _RaggedCall, tree: Any, transposed: bool
) -> jax.Array:
    """Binds the primitive, with the jaxpr of its plain form."""
    plain = _plain_form(call, tree, transposed)
    jaxpr = jax.make_jaxpr(plain)(x, *leaves)
    result: jax.Array = _RAGGED_PRIMITIVE.bind(
        x, *leaves, jaxpr=jaxpr, call=call, tree=tree, transposed=transposed
    )
    return result


def _plain_form(call: _RaggedCall, tree: Any, transposed: bool) -> Callable[..., jax.Array]:
    """Returns the plain form as a function of x and the flattened pair (W, group sizes)."""

    def form_and_multiply(x: jax.Array, *leaves: Any) -> jax.Array:
        base, group_sizes = jax.tree.unflatten(tree, leaves)
        return call.form_and_multiply(base, x, group_sizes, transposed)

    return form_and_multiply


def _run_eagerly(*operands: jax.Array, **params: Any) -> Any:
    return jax.jit(lambda *operands: _RAGGED_PRIMITIVE.bind(*operands, **params))(*operands)


def _abstract_result(*_: Any, jaxpr: Any, **__: Any) -> Any:
    return jaxpr.out_avals[0]


def _lower_plain_product(ctx: Any, *operands: Any, jaxpr: Any, **_: Any) -> Any:
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *operands)


def _lower_for_tpu(
    ctx: Any, *operands: Any, jaxpr: Any, call: _RaggedCall, tree: Any, transposed: bool
) -> Any:
    """Lowers the product to the kernel for one TPU, or to the plain product for several."""
    # Inside shard_map the context has a mesh instead of a number of devices.
    if getattr(ctx.module_context.axis_context, "num_devices", None) != 1:
        return _lower_plain_product(ctx, *operands, jaxpr=jaxpr)

    def run_kernel(x: jax.Array, *leaves: Any) -> jax.Array:
        base, group_sizes = jax.tree.unflatten(tree, leaves)
        return call.run_kernel(base, x, group_sizes, transposed)

    return mlir.lower_fun(run_kernel, multiple_results=False)(ctx, *operands)


def _differentiate(
    primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: Any, **params: Any
) -> Any:
    """Returns the product and its tangent, which is a product, too, unless W has a tangent."""
    x, *leaves = primals
    x_tangent, *leaf_tangents = tangents
    if any(type(tangent) is not ad.Zero for tangent in leaf_tangents):
        return _differentiate_plain(primals, tangents, **params)
    return _bind(x, leaves, **params), _bind(x_tangent, leaves, **params)


def _differentiate_plain(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    call: _RaggedCall,
    tree: Any,
    transposed: bool,
) -> Any:
    """Returns the product and its tangent by the derivative of the plain form."""
    plain = _plain_form(call, tree, transposed)
    variable_indices = [
        index for index, tangent in enumerate(tangents) if type(tangent) is not ad.Zero
    ]

    def product_of_variables(*variables: jax.Array) -> jax.Array:
        operands = [*primals]
        for index, variable in zip(variable_indices, variables, strict=True):
            operands[index] = variable
        return plain(*operands)

    return jax.jvp(
        product_of_variables,
        [primals[index] for index in variable_indices],
        [tangents[index] for index in variable_indices],
    )


def _transpose(
    cotangent: Any, x: Any, *leaves: Any, jaxpr: Any, transposed: bool, **params: Any
) -> list[Any]:
    """Returns the gradient of x, the product of the cotangent with the transposed W."""
    del jaxpr
    no_gradients = [None] * len(leaves)
    if type(cotangent) is ad.Zero:
        return [ad.Zero(x.aval), *no_gradients]
    return [_bind(cotangent, leaves, transposed=not transposed, **params), *no_gradients]


def _map_product(
    operands: Sequence[Any],
    axes: Sequence[int | None],
    *,
    jaxpr: Any,
    call: _RaggedCall,
    tree: Any,
    transposed: bool,
) -> tuple[Any, int]:
    """Returns the plain product under vmap, and the mapped axis of the result."""
    del jaxpr
    return jax.vmap(_plain_form(call, tree, transposed), tuple(axes))(*operands), 0


_RAGGED_PRIMITIVE.def_impl(_run_eagerly)
_RAGGED_PRIMITIVE.def_abstract_eval(_abstract_result)
mlir.register_lowering(_RAGGED_PRIMITIVE, _lower_plain_product)
mlir.register_lowering(_RAGGED_PRIMITIVE, _lower_for_tpu, platform="tpu")
ad.primitive_jvps[_RAGGED_PRIMITIVE] = _differentiate
ad.primitive_transposes[_RAGGED_PRIMITIVE] = _transpose
batching.primitive_batchers[_RAGGED_PRIMITIVE] = _map_product
