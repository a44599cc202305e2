"""LoRA-XS: W + s·ARB, where A = UΣ and B = Vᵀ of W's singular values are frozen and R trains.

LoRA-XS (Bałazy et al., arXiv 2405.17604) trains r² numbers a weight. A file holds R alone: A and B
are made again from W. Singular vectors of a matrix that is the same up to rounding are the same up
to rounding, unless their values all but coincide; R would not mean what it meant before, so factors
that differ are an error, whatever base is accepted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.core.axes import AxisRoles
from lora_jax.core.base import is_abstract
from lora_jax.core.factored import factor_shapes, matrices_of
from lora_jax.core.parts import AXES, cleared
from lora_jax.core.types import BaseLike, Fields, Leaf, Parts
from lora_jax.core.weight import LoraWeight, Part
from lora_jax.init import truncated
from lora_jax.variants.variant import Derived, KernelFacts, MakeFactors, Remake, Variant


def _first_latent(node: LoraWeight, key: jax.Array) -> jax.Array:
    """Returns R ~ N(0, 1e-5²), zeros where a layer's rank is smaller than the largest."""
    r = 1e-5 * jax.random.normal(key, node.shape_of("latent"), node.b.dtype)
    return cleared(cleared(r, node.ranks, r.ndim - 1), node.ranks, r.ndim - 2)


def singular_factors(leaf: Leaf, roles: AxisRoles, ranks: Sequence[int], dtype: DTypeLike) -> Parts:
    """Returns a and b: UΣ and Vᵀ of the largest singular values of W, by layer.

    Args:
      leaf: W, an array or a `lora_jax.core.base.Base`.
      roles: the roles of W's axes.
      ranks: r of each layer of the first batch axis, or one r for all.
      dtype: the dtype of both.

    Raises:
      ValueError: the rank is larger than W's.
    """
    kernel, rank = matrices_of(leaf, roles), max(ranks)
    on = [layer for layer, r in enumerate(ranks) if r]
    is_whole = len(on) == len(ranks)
    a, b = truncated(kernel if is_whole else kernel[jnp.asarray(on)], rank)
    if not is_whole:
        a, b = (
            jnp.zeros((len(ranks), *x.shape[1:]), x.dtype).at[jnp.asarray(on)].set(x)
            for x in (a, b)
        )
    a, b = cleared(a, ranks, a.ndim - 1), cleared(b, ranks, b.ndim - 2)
    a_shape, b_shape, _ = factor_shapes(leaf.shape, roles, rank)
    return {"a": a.mT.reshape(a_shape).astype(dtype), "b": b.reshape(b_shape).astype(dtype)}


def _start(kernels: Sequence[KernelFacts], key: jax.Array) -> MakeFactors:
    del kernels, key
    return lambda leaf, kernel: singular_factors(leaf, kernel.roles, kernel.ranks, kernel.dtype)


def _again(there: Mapping[str, Leaf]) -> Remake:
    """Returns a function that decomposes W, or takes the factors of the node that is there."""

    def factors(path: str, weight: LoraWeight, _: Fields) -> Parts:
        def decompose(base: BaseLike) -> Parts:
            return singular_factors(base, weight.roles, weight.ranks, weight.latent.dtype)

        return remade_factors(there, path, weight, "latent", decompose)

    return factors


def remade_factors(
    there: Mapping[str, Leaf],
    path: str,
    weight: LoraWeight,
    part: str,
    decompose: Callable[[BaseLike], Parts],
) -> Parts:
    """Returns a and b of a weight without them: those of the node that is there, or new ones.

    Args:
      there: the nodes of the tree that the adapter is loaded onto, by path.
      path: the weight's path.
      weight: the weight.
      part: the name of its part that trains.
      decompose: returns a and b of a base.
    """
    if is_abstract(weight.base):
        shapes: Parts = jax.eval_shape(decompose, weight.base)
        return shapes
    node = there.get(path)
    if _decomposes_alike(node, weight, part):
        return {name: node.arrays[name] for name in ("a", "b")}
    return decompose(weight.base)


def _decomposes_alike(node: Leaf, weight: LoraWeight, part: str) -> TypeGuard[LoraWeight]:
    """Returns True if a node has the factors that decomposing a weight's base would give."""
    return (
        isinstance(node, LoraWeight)
        and node.base is weight.base
        and part in node.has
        and (node.roles, node.ranks) == (weight.roles, weight.ranks)
        and node.arrays["a"].dtype == weight.arrays[part].dtype
    )


LORA_XS = Variant(
    option="xs",
    name="LoRA-XS",
    help="Train only a matrix R [rank, rank] for each weight, between singular vectors of the base "
    "(LoRA-XS). By default --alpha is the rank and --lr 2e-3.",
    parts=(Part("latent", AXES["latent"], _first_latent, is_drawn=True),),
    frozen=("a", "b"),
    start=_start,
    derived=Derived(
        names=("a", "b"),
        entry="singular",
        recipe=lambda weight, others: {},
        again=_again,
        differs="is a LoRA-XS, whose A and B are singular vectors of the base, and those of "
        "{path!r} are others than where it was trained: the base differs, or its dtype or codes "
        "do. Load the base as it was trained on (allow_base_mismatch cannot help: R means nothing "
        "between other vectors)",
    ),
    alone="decomposes W for A and B",
    alone_in_scripts="takes A and B from the base and trains R between them",
    rate=lambda lora: 2e-3,  # the paper takes 1e-3 to 4e-3 whatever the task
    alpha_is_rank=True,
)
