"""TinyLoRA: W + s·A(Σᵢ vᵢPᵢ)B; A and B are singular vectors, the P's are random, and v trains.

TinyLoRA (Morris et al., arXiv 2602.04118) is LoRA-XS with the matrix between A and B taken from u
numbers: a weight trains v [u], and several weights may train one v (`lora_jax.select.ties`). As in
PEFT, A = U√Σ and B = √ΣVᵀ of W's largest singular values, the elements of the P's are N(0, 1/r),
and v begins at zero. A file holds v alone: A and B are made again from W, the P's from a seed.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from lora_jax.core.factored import Factored
from lora_jax.core.parts import zero_rank_padding
from lora_jax.core.paths import fold_in_path
from lora_jax.core.types import BaseLike, Fields, JsonObject, Leaf, Parts
from lora_jax.core.weight import LoraWeight, Part
from lora_jax.variants.variant import Derived, KernelFacts, MakeFactors, Remake, Setting, Variant
from lora_jax.variants.xs import remake_factors, singular_factors


def _start_factors(kernels: Sequence[KernelFacts], key: jax.Array) -> MakeFactors:
    """Returns a function that decomposes W, and draws the P's from a seed per weight."""
    del kernels

    def make_factors(leaf: BaseLike, kernel: KernelFacts) -> Parts:
        """Returns the factors, the projection and the seed of one weight."""
        seed = jax.random.bits(fold_in_path(key, f"{kernel.path}/tinylora"), dtype=jnp.uint32)
        return _balanced_singular_factors(leaf, kernel) | {
            "projection": _draw_projection(seed, kernel, kernel.settings["u"]),
            "seed": seed,
        }

    return make_factors


def _balanced_singular_factors(leaf: Leaf, kernel: KernelFacts) -> Parts:
    """Returns a and b: U√Σ and √ΣVᵀ of the largest singular values of W, by layer."""
    factors = singular_factors(leaf, kernel.roles, kernel.ranks, kernel.dtype)
    n_batch = len(kernel.roles.sizes(kernel.shape, "batch"))
    a = factors["a"]  # UΣ, whose columns have the singular values as norms
    b = factors["b"]
    in_axes = tuple(range(n_batch + 1, a.ndim))
    singular_values = jnp.sqrt(jnp.square(a).sum(axis=in_axes))  # [batch…, r]
    # Move √Σ from A to B: a = U√Σ and b = √ΣVᵀ. The padding stays zero.
    root = jnp.sqrt(singular_values)
    inverse_root = jnp.where(root > 0, 1 / jnp.where(root > 0, root, 1), 0)
    return {
        "a": a * lax.expand_dims(inverse_root, range(n_batch + 1, a.ndim)),
        "b": b * lax.expand_dims(root, range(n_batch + 1, b.ndim)),
    }


def _draw_projection(seed: ArrayLike, kernel: KernelFacts, u: int) -> jax.Array:
    """Returns the matrices P [batch…, u, r, r], with zeros in the padding of each layer."""
    ranks = kernel.ranks
    batch = kernel.roles.sizes(kernel.shape, "batch")
    shape = (*batch, u, max(ranks), max(ranks))
    # Without the barrier, a compiled draw is rounded differently from an eager draw.
    normals = lax.optimization_barrier(jax.random.normal(jax.random.key(seed), shape, kernel.dtype))
    # Elements of a layer of rank r are N(0, 1/r).
    deviations = np.asarray([1 / max(rank, 1) ** 0.5 for rank in ranks], np.float32)
    if len(ranks) > 1:
        deviations = deviations.reshape(-1, *[1] * (len(shape) - 1))
    else:
        deviations = deviations[0]
    projection: jax.Array = normals * deviations.astype(normals.dtype)
    for rank_axis in (len(shape) - 1, len(shape) - 2):
        projection = zero_rank_padding(projection, ranks, rank_axis)
    return projection


def _recipe_of_arrays(node: LoraWeight, others: Sequence[LoraWeight]) -> JsonObject | None:
    """Returns the recipe of the frozen arrays; None if another library's file had them."""
    del others
    return {"seed": int(node.arrays["seed"])} if "seed" in node.arrays else None


def _remake_function(nodes: Mapping[str, Leaf]) -> Remake:
    """Returns a function that decomposes W, and redraws the P's from the recipe's seed."""

    def make_arrays(path: str, weight: LoraWeight, recipe: Fields) -> Parts:
        """Returns the frozen arrays of one weight."""
        kernel = KernelFacts(
            path=path,
            shape=weight.shape,
            roles=weight.roles,
            ranks=weight.ranks,
            dtype=weight.v.dtype,
        )

        def decompose(base: BaseLike) -> Parts:
            return _balanced_singular_factors(base, kernel)

        seed = np.uint32(recipe["seed"])
        return remake_factors(nodes, path, weight, "v", decompose) | {
            "projection": _draw_projection(seed, kernel, weight.v.shape[-1]),
            "seed": jnp.asarray(seed),
        }

    return make_arrays


def _zero_v(node: LoraWeight) -> jax.Array:
    """Returns the initial value of v, zeros [batch…, u]."""
    return jnp.zeros(node.shape_of("v"), node.arrays["projection"].dtype)


def _with_latent(weight: Factored, node: LoraWeight, v: jax.Array) -> Factored:
    """Returns the weight with the matrix between A and B."""
    projection = node.arrays["projection"].astype(v.dtype)
    latent = jnp.einsum("...u,...ujk->...jk", v, projection, precision=lax.Precision.HIGHEST)
    return weight.replace(latent=latent)


TINYLORA = Variant(
    option="tinylora",
    name="TinyLoRA",
    help="Train only a vector of --u numbers for each weight, or for several (--weight-tying), "
    "between singular vectors of the base (TinyLoRA). Use a small --rank, such as 2. The default "
    "of --alpha is the rank, and the default of --lr is 2e-3.",
    parts=(Part("v", ("batch", "u"), _zero_v, _with_latent),),
    settings=(
        Setting(
            name="u",
            default=64,
            help="Number of parameters that each weight trains with --tinylora.",
            fits=lambda value: isinstance(value, int) and value >= 1,
            needed="a number of at least 1",
        ),
        Setting(
            name="weight_tying",
            default=0.0,
            help="Share of vectors that --tinylora saves because several weights train the same "
            "vector. 0: each weight has a vector. 1: all weights have the same vector.",
            fits=lambda value: 0 <= value <= 1,
            needed="a share from 0 to 1",
        ),
    ),
    frozen=("a", "b"),
    start=_start_factors,
    derived=Derived(
        names=("a", "b", "projection"),
        recipe_entry="tinylora",
        recipe=_recipe_of_arrays,
        remake_function=_remake_function,
        difference_message="is a TinyLoRA with the seed {seed} of its random matrices, but {name} "
        "of {path!r} differs from its value in the training. Load it onto the base of its "
        "training, with the same dtype or quantization, the same version of JAX and the same "
        "jax_threefry_partitionable. allow_base_mismatch cannot help, because v belongs to these "
        "vectors.",
    ),
    alone="decomposes W for A and B",
    alone_in_scripts="takes A and B from the base and trains a vector between them",
    rate=lambda lora: 2e-3,
    alpha_is_rank=True,
    ranks=(2,),
)
