"""The call of a kernel for products of few rows: a primitive that platforms lower each their way.

A program for one TPU has the kernel. XLA cannot partition a kernel, so a program for several has
the form that XLA compiles for TPUs, and other platforms have the plain product. Derivatives are
those of the product, and so is a mapped call, unless the rows alone are mapped.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.extend import Primitive, ad, batching, jaxpr_as_fun, mlir
from lora_jax.core.types import BaseLike

Product = Callable[[BaseLike, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class RowsCall:
    """The forms of one product of W and x, each a function of both.

    Attributes:
      kernel: the form for one TPU.
      plain: the form for other platforms.
      flat: the form for several TPUs.
      differentiable: the form that is differentiated.
      mapped: the form where x has a further axis in front.
    """

    kernel: Product
    plain: Product
    flat: Product
    differentiable: Product
    mapped: Product


def call_rows(call: RowsCall, base: BaseLike, x: jax.Array) -> jax.Array:
    """Returns xW, in the form of the platform that the program is lowered for."""
    leaves, tree = jax.tree.flatten((base, x))
    jaxpr = jax.make_jaxpr(_leaf_product(tree, call.plain))(*leaves)
    out: jax.Array = _CALL.bind(*leaves, jaxpr=jaxpr, call=call, tree=tree)
    return out


_CALL = Primitive("few_rows")


def _leaf_product(tree: Any, product: Product) -> Callable[..., jax.Array]:
    return lambda *leaves: product(*jax.tree.unflatten(tree, leaves))


def _run_now(*leaves: jax.Array, **how: Any) -> Any:
    return jax.jit(lambda *leaves: _CALL.bind(*leaves, **how))(*leaves)


def _abstract(*_: Any, jaxpr: Any, **__: Any) -> Any:
    return jaxpr.out_avals[0]


def _lower(ctx: Any, *leaves: Any, jaxpr: Any, **_: Any) -> Any:
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *leaves)


def _lower_for_tpu(ctx: Any, *leaves: Any, call: RowsCall, tree: Any, **_: Any) -> Any:
    # Inside shard_map there is a mesh rather than a number of devices.
    devices = getattr(ctx.module_context.axis_context, "num_devices", None)
    product = _leaf_product(tree, call.kernel if devices == 1 else call.flat)
    return mlir.lower_fun(product, multiple_results=False)(ctx, *leaves)


def _differentiate(
    primals: Sequence[Any], tangents: Sequence[Any], *, call: RowsCall, tree: Any, **_: Any
) -> Any:
    live = [at for at, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def product(*some: jax.Array) -> jax.Array:
        leaves = [*primals]
        for at, leaf in zip(live, some, strict=True):
            leaves[at] = leaf
        return _leaf_product(tree, call.differentiable)(*leaves)

    return jax.jvp(product, [primals[at] for at in live], [tangents[at] for at in live])


def _map(
    leaves: Sequence[Any], axes: Sequence[int | None], *, call: RowsCall, tree: Any, **_: Any
) -> tuple[Any, int]:
    *of_base, x_axis = axes
    if x_axis is None or any(axis is not None for axis in of_base):
        product = _leaf_product(tree, call.differentiable)
        return jax.vmap(product, tuple(axes))(*leaves), 0
    *base, x = leaves
    return _leaf_product(tree, call.mapped)(*base, jnp.moveaxis(x, x_axis, 0)), 0


_CALL.def_impl(_run_now)
_CALL.def_abstract_eval(_abstract)
mlir.register_lowering(_CALL, _lower)
mlir.register_lowering(_CALL, _lower_for_tpu, platform="tpu")
ad.primitive_jvps[_CALL] = _differentiate
batching.primitive_batchers[_CALL] = _map
