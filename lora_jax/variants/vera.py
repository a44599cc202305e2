"""VeRA: W + s·A·diag(d)·B·diag(b), where all weights of equal rank share one random A and B.

VeRA (Kopiczko et al., arXiv 2310.11454) draws a **pair**, A [r, in] and B [r, out], for each rank.
The pair is as wide as the widest weight of the rank, and never trains; d and b train. A weight uses
the first `in` columns of A and the first `out` columns of B. Weights of one size hold the same
arrays, and the layers of a stack share them. A pair follows from a seed, so a file need not hold
it. As in PEFT, each matrix is drawn from Kaiming's uniform distribution for its own shape:
U(±√(6/in)) for A, U(±√(6/r)) for B.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from lora_jax.core.parts import AXES, zero_rank_padding
from lora_jax.core.paths import fold_in_path
from lora_jax.core.types import Fields, JsonObject, Leaf, Parts
from lora_jax.core.weight import LoraWeight, Part
from lora_jax.variants.variant import Derived, KernelFacts, Remake, Variant

Widths = tuple[int, int]  # numbers of in and out features, of a weight or of a shared pair


class SharedPairs:
    """The shared (A, B) pairs of a tree, each drawn when a weight first needs it."""

    def __init__(self, seed: ArrayLike, widths: Mapping[int, Widths]) -> None:
        """Args:
        seed: a number from 0 to 2³² − 1, [] uint32.
        widths: the widths of the pair of each rank.
        """
        self.seed = seed
        self.widths = widths
        self._cache: dict[Hashable, jax.Array] = {}

    def __call__(self, leaf: Leaf, kernel: KernelFacts) -> Parts:
        """Returns the arrays of a weight: shared_a [r, in…], shared_b [r, out…] and the seed."""
        del leaf
        rank = max(kernel.ranks)
        in_sizes, out_sizes = kernel.sizes_of_sides
        in_width, out_width = self.widths[rank]

        def columns_of_weight(
            name: str, sizes: tuple[int, ...], width: int, fan_in: int
        ) -> jax.Array:
            """Returns a weight's columns of a matrix, in the shape of its axes."""

            def draw() -> jax.Array:
                key = fold_in_path(jax.random.key(self.seed), name)
                bound = math.sqrt(6 / fan_in)
                matrix = jax.random.uniform(key, (rank, width), kernel.dtype, -bound, bound)
                return matrix[:, : math.prod(sizes)].reshape(rank, *sizes)

            return self._get_or_make((name, rank, kernel.dtype, sizes), draw)

        return {
            "shared_a": columns_of_weight("a", in_sizes, width=in_width, fan_in=in_width),
            "shared_b": columns_of_weight("b", out_sizes, width=out_width, fan_in=rank),
            "seed": self._get_or_make("seed", lambda: jnp.asarray(self.seed, jnp.uint32)),
        }

    def _get_or_make(self, key: Hashable, make: Callable[[], jax.Array]) -> jax.Array:
        """Returns the cached array of a key, made at the first call."""
        if key in self._cache:
            return self._cache[key]
        array = make()
        if not isinstance(array, jax.core.Tracer):  # a tracer's trace may end before the next call
            self._cache[key] = array
        return array


def _start_pairs(kernels: Sequence[KernelFacts], key: jax.Array) -> SharedPairs:
    """Returns the (A, B) pairs that the weights of a tree share.

    Raises:
      ValueError: the layers of a stack differ in rank.
    """
    widths_of_rank: dict[int, list[Widths]] = {}
    for kernel in kernels:
        ranks = sorted({*kernel.ranks} - {0})
        if len(ranks) > 1:
            raise ValueError(
                f"vera: the layers of {kernel.path!r} have the ranks {ranks}, but all layers "
                "of a stack share one A and one B. Give all layers the same rank."
            )
        widths_of_rank.setdefault(ranks[0], []).append(_widths_of_kernel(kernel))
    pair_widths = {rank: _largest_widths(widths) for rank, widths in widths_of_rank.items()}
    return SharedPairs(jax.random.bits(fold_in_path(key, "vera"), dtype=jnp.uint32), pair_widths)


def _widths_of_kernel(kernel: KernelFacts) -> Widths:
    """Returns the numbers of in and out features of a kernel."""
    in_sizes, out_sizes = kernel.sizes_of_sides
    return math.prod(in_sizes), math.prod(out_sizes)


def _largest_widths(widths: Iterable[Widths]) -> Widths:
    """Returns the largest number of in features, and the largest number of out features."""
    in_widths, out_widths = zip(*widths, strict=True)
    return max(in_widths), max(out_widths)


def _kernel_facts(node: LoraWeight, dtype: DTypeLike, path: str = "") -> KernelFacts:
    return KernelFacts(
        path=path, shape=node.shape, roles=node.roles, ranks=node.ranks, dtype=np.dtype(dtype)
    )


def _recipe_of_pair(node: LoraWeight, nodes: Sequence[LoraWeight]) -> JsonObject | None:
    """Returns the recipe that redraws a pair; None for a pair without a seed."""
    if "seed" not in node.arrays:
        return None
    dtype = node.arrays["shared_a"].dtype
    pair_widths = _largest_widths(
        _widths_of_kernel(_kernel_facts(other, dtype)) for other in nodes if other.rank == node.rank
    )
    return {
        "seed": int(node.arrays["seed"]),
        "widths": list(pair_widths),
        "dtype": np.dtype(dtype).name,
    }


def _remake_function(nodes: Mapping[str, Leaf]) -> Remake:
    """Returns a function that draws each pair once for all weights that share it."""
    del nodes
    pairs: dict[Hashable, SharedPairs] = {}

    def make_arrays(path: str, weight: LoraWeight, recipe: Fields) -> Parts:
        """Returns the arrays of one weight."""
        in_width, out_width = recipe["widths"]
        key = (recipe["seed"], in_width, out_width, weight.rank)
        if key not in pairs:
            widths = {weight.rank: (in_width, out_width)}
            pairs[key] = SharedPairs(np.uint32(recipe["seed"]), widths)
        return pairs[key](weight.base, _kernel_facts(weight, recipe["dtype"], path))

    return make_arrays


def _initial_d(node: LoraWeight) -> jax.Array:
    """Returns the initial value of d, 0.1 with zeros in the padding, [batch…, r]."""
    d = jnp.full(node.shape_of("lambda_d"), 0.1, node.arrays["shared_a"].dtype)
    return zero_rank_padding(d, node.ranks, d.ndim - 1)


def _zero_b(node: LoraWeight) -> jax.Array:
    """Returns the initial value of b, zeros [batch…, out…]."""
    return jnp.zeros(node.shape_of("lambda_b"), node.arrays["shared_b"].dtype)


VERA = Variant(
    option="vera",
    name="VeRA",
    help="Train only two vectors for each weight, around one random A and B that all weights share "
    "(VeRA). Use a large --rank, such as 256. The default of --alpha is the rank, and the default "
    "of --lr is ten times as large as without --vera.",
    parts=(
        Part("lambda_d", AXES["lambda_d"], _initial_d),
        Part("lambda_b", AXES["lambda_b"], _zero_b),
    ),
    frozen=("a", "b"),
    start=_start_pairs,
    derived=Derived(
        names=("shared_a", "shared_b"),
        recipe_entry="projections",
        recipe=_recipe_of_pair,
        remake_function=_remake_function,
        difference_message="holds the seed {seed} of VeRA's random matrices, but {name} of "
        "{path!r} is drawn differently here. Load it with the version of JAX and the setting of "
        "jax_threefry_partitionable that it was trained with.",
    ),
    alone="shares one random A and B",
    alone_in_scripts="draws one A and B for all weights and trains two vectors of each",
    rate=lambda lora: 10 * lora,  # as in the paper
    alpha_is_rank=True,
    ranks=(64, 256),  # its numbers hardly grow with the rank
)
