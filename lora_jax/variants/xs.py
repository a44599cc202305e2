"""LoRA-XS: W + s·ARB; A = UΣ and B = Vᵀ of W's singular values are frozen, and R trains.

LoRA-XS (Bałazy et al., arXiv 2405.17604) trains r² numbers for each weight. A file holds R alone,
because A and B can be computed again from W. If W is the same up to rounding, its singular vectors
are the same up to rounding, unless two singular values are almost equal. With different factors, R
has another meaning. Factors that differ are therefore always an error, even with
`allow_base_mismatch`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.core.axes import AxisRoles
from lora_jax.core.base import is_abstract
from lora_jax.core.factored import as_matrices, factor_shapes
from lora_jax.core.parts import AXES, zero_rank_padding
from lora_jax.core.types import BaseLike, Fields, Leaf, Parts
from lora_jax.core.weight import LoraWeight, Part
from lora_jax.init import truncated
from lora_jax.variants.variant import Derived, KernelFacts, MakeFactors, Remake, Variant


def _draw_latent(node: LoraWeight, key: jax.Array) -> jax.Array:
    """Returns R ~ N(0, 1e-5²), with zeros in the padding of each layer."""
    r = 1e-5 * jax.random.normal(key, node.shape_of("latent"), node.b.dtype)
    return zero_rank_padding(zero_rank_padding(r, node.ranks, r.ndim - 1), node.ranks, r.ndim - 2)


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
    kernel = as_matrices(leaf, roles)  # [batch…, in, out]
    largest_rank = max(ranks)
    adapted_layers = [layer for layer, rank in enumerate(ranks) if rank]
    if len(adapted_layers) == len(ranks):
        a, b = truncated(kernel, largest_rank)
    else:
        # Decompose the adapted layers only; the others have zeros.
        indices = jnp.asarray(adapted_layers)
        adapted_a, adapted_b = truncated(kernel[indices], largest_rank)
        a = jnp.zeros((len(ranks), *adapted_a.shape[1:]), adapted_a.dtype)
        a = a.at[indices].set(adapted_a)
        b = jnp.zeros((len(ranks), *adapted_b.shape[1:]), adapted_b.dtype)
        b = b.at[indices].set(adapted_b)
    a = zero_rank_padding(a, ranks, a.ndim - 1)
    b = zero_rank_padding(b, ranks, b.ndim - 2)
    a_shape, b_shape, _ = factor_shapes(leaf.shape, roles, largest_rank)
    return {"a": a.mT.reshape(a_shape).astype(dtype), "b": b.reshape(b_shape).astype(dtype)}


def _start_factors(kernels: Sequence[KernelFacts], key: jax.Array) -> MakeFactors:
    """Returns a function that decomposes W."""
    del kernels, key
    return lambda leaf, kernel: singular_factors(leaf, kernel.roles, kernel.ranks, kernel.dtype)


def _remake_function(nodes: Mapping[str, Leaf]) -> Remake:
    """Returns a function that decomposes W, or reuses the factors of an equal node."""

    def make_arrays(path: str, weight: LoraWeight, _: Fields) -> Parts:
        def decompose(base: BaseLike) -> Parts:
            return singular_factors(base, weight.roles, weight.ranks, weight.latent.dtype)

        return remake_factors(nodes, path, weight, "latent", decompose)

    return make_arrays


def remake_factors(
    nodes: Mapping[str, Leaf],
    path: str,
    weight: LoraWeight,
    part_name: str,
    decompose: Callable[[BaseLike], Parts],
) -> Parts:
    """Returns a and b of a weight, from the loaded tree if it has them, else from W.

    Args:
      nodes: the nodes of the tree that the adapter is loaded onto, by path.
      path: the weight's path.
      weight: the weight.
      part_name: the name of the weight's part.
      decompose: returns a and b of a base.
    """
    if is_abstract(weight.base):
        shapes: Parts = jax.eval_shape(decompose, weight.base)
        return shapes
    # A node of the same base has the factors already.
    node = nodes.get(path)
    if _has_same_factors(node, weight, part_name):
        return {name: node.arrays[name] for name in ("a", "b")}
    return decompose(weight.base)


def _has_same_factors(node: Leaf, weight: LoraWeight, part_name: str) -> TypeGuard[LoraWeight]:
    """Returns True if a node has the factors that decomposing a weight's base would give."""
    return (
        isinstance(node, LoraWeight)
        and node.base is weight.base
        and part_name in node.has
        and (node.roles, node.ranks) == (weight.roles, weight.ranks)
        and node.arrays["a"].dtype == weight.arrays[part_name].dtype
    )


LORA_XS = Variant(
    option="xs",
    name="LoRA-XS",
    help="Train only a matrix R [rank, rank] for each weight, between singular vectors of the base "
    "(LoRA-XS). The default of --alpha is the rank, and the default of --lr is 2e-3.",
    parts=(Part("latent", AXES["latent"], _draw_latent, is_drawn=True),),
    frozen=("a", "b"),
    start=_start_factors,
    derived=Derived(
        names=("a", "b"),
        recipe_entry="singular",
        recipe=lambda weight, others: {},
        remake_function=_remake_function,
        difference_message="is a LoRA-XS, whose A and B are singular vectors of the base, but "
        "those of {path!r} differ from those of its training. Load the base of its training, with "
        "the same dtype or quantization. allow_base_mismatch cannot help, because R belongs to "
        "these vectors.",
    ),
    alone="decomposes W for A and B",
    alone_in_scripts="takes A and B from the base and trains R between them",
    rate=lambda lora: 2e-3,  # the paper takes 1e-3 to 4e-3 whatever the task
    alpha_is_rank=True,
)
