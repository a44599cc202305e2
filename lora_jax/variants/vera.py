"""VeRA: W + s·A·diag(d)·B·diag(b), where all weights of a rank share one random A and B.

VeRA (Kopiczko et al., arXiv 2310.11454) draws A [r, in] and B [r, out] once, as wide as the widest
weight, and never trains them; d and b train. A weight sees the first `in` columns of A and the
first `out` columns of B; weights of one size hold the same array, and the layers of a stack share
it. Both follow from a seed, so a file need not hold them. As in PEFT, each is drawn from Kaiming's
uniform distribution for a matrix of its own shape: U(±√(6/in)) for A, U(±√(6/r)) for B.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from lora_jax.core.parts import AXES, cleared
from lora_jax.core.paths import fold_in_path
from lora_jax.core.types import Fields, JsonObject, Leaf, Parts
from lora_jax.core.weight import LoraWeight, Part
from lora_jax.variants.variant import Derived, KernelFacts, Remake, Variant

Widths = tuple[int, int]  # the most in and out features of the weights that share a pair


class Projections:
    """The shared matrices of a tree, drawn where a weight first asks for them."""

    def __init__(self, seed: ArrayLike, widths: Mapping[int, Widths]) -> None:
        """Args:
        seed: a number from 0 to 2³² − 1, [] uint32.
        widths: the widths of the matrices by rank.
        """
        self.seed, self.widths = seed, widths
        self._drawn: dict[Hashable, jax.Array] = {}

    def __call__(self, leaf: Leaf, kernel: KernelFacts) -> Parts:
        """Returns the arrays of a weight: shared_a [r, in…], shared_b [r, out…] and the seed."""
        del leaf
        rank, (ins, outs) = max(kernel.ranks), kernel.sides
        width_in, width_out = self.widths[rank]

        def seen(name: str, sizes: tuple[int, ...], width: int, fan: int) -> jax.Array:
            """Returns the columns of a matrix that a weight sees, in the shape of its axes."""

            def first() -> jax.Array:
                key, bound = fold_in_path(jax.random.key(self.seed), name), math.sqrt(6 / fan)
                matrix = jax.random.uniform(key, (rank, width), kernel.dtype, -bound, bound)
                return matrix[:, : math.prod(sizes)].reshape(rank, *sizes)

            return self._once((name, rank, kernel.dtype, sizes), first)

        return {
            "shared_a": seen("a", ins, width_in, width_in),
            "shared_b": seen("b", outs, width_out, rank),
            "seed": self._once("seed", lambda: jnp.asarray(self.seed, jnp.uint32)),
        }

    def _once(self, key: Hashable, make: Callable[[], jax.Array]) -> jax.Array:
        if key in self._drawn:
            return self._drawn[key]
        array = make()
        if not isinstance(array, jax.core.Tracer):  # whose trace may end before the next call
            self._drawn[key] = array
        return array


def _start(kernels: Sequence[KernelFacts], key: jax.Array) -> Projections:
    """Returns the matrices that the weights of a tree share.

    Raises:
      ValueError: the layers of a stack differ in rank.
    """
    shapes: dict[int, list[Widths]] = {}
    for kernel in kernels:
        if len(ranks := sorted({*kernel.ranks} - {0})) > 1:
            raise ValueError(
                f"vera: the layers of {kernel.path!r} have the ranks {ranks}, and a stack shares "
                "one A and B: give all of its layers one rank"
            )
        shapes.setdefault(ranks[0], []).append(_widths(kernel))
    widths = {rank: _widest(each) for rank, each in shapes.items()}
    return Projections(jax.random.bits(fold_in_path(key, "vera"), dtype=jnp.uint32), widths)


def _widths(kernel: KernelFacts) -> Widths:
    ins, outs = kernel.sides
    return math.prod(ins), math.prod(outs)


def _widest(shapes: Iterable[Widths]) -> Widths:
    ins, outs = zip(*shapes, strict=True)
    return max(ins), max(outs)


def _kernel(node: LoraWeight, dtype: DTypeLike, path: str = "") -> KernelFacts:
    return KernelFacts(path, node.shape, node.roles, node.ranks, np.dtype(dtype))


def _recipe(node: LoraWeight, others: Sequence[LoraWeight]) -> JsonObject | None:
    """Returns the recipe that draws a pair again; None where it did not come from a seed."""
    if "seed" not in node.arrays:
        return None
    dtype = node.arrays["shared_a"].dtype
    alike = (_widths(_kernel(other, dtype)) for other in others if other.rank == node.rank)
    seed, widths = int(node.arrays["seed"]), list(_widest(alike))
    return {"seed": seed, "widths": widths, "dtype": np.dtype(dtype).name}


def _again(there: Mapping[str, Leaf]) -> Remake:
    """Returns a function that draws each pair once, so that weights of one size share an array."""
    del there
    drawn: dict[Hashable, Projections] = {}

    def pair(path: str, weight: LoraWeight, recipe: Fields) -> Parts:
        ins, outs = recipe["widths"]
        key = (recipe["seed"], ins, outs, weight.rank)
        if key not in drawn:
            drawn[key] = Projections(np.uint32(recipe["seed"]), {weight.rank: (ins, outs)})
        return drawn[key](weight.base, _kernel(weight, recipe["dtype"], path))

    return pair


def _first_d(node: LoraWeight) -> jax.Array:
    d = jnp.full(node.shape_of("lambda_d"), 0.1, node.arrays["shared_a"].dtype)
    return cleared(d, node.ranks, d.ndim - 1)


def _first_b(node: LoraWeight) -> jax.Array:
    return jnp.zeros(node.shape_of("lambda_b"), node.arrays["shared_b"].dtype)


VERA = Variant(
    option="vera",
    name="VeRA",
    help="Train only two vectors for each weight, around one random A and B that all weights share "
    "(VeRA). It takes a large --rank, such as 256. By default --alpha is the rank, and --lr ten "
    "times as large as without.",
    parts=(
        Part("lambda_d", AXES["lambda_d"], _first_d),
        Part("lambda_b", AXES["lambda_b"], _first_b),
    ),
    frozen=("a", "b"),
    start=_start,
    derived=Derived(
        names=("shared_a", "shared_b"),
        entry="projections",
        recipe=_recipe,
        again=_again,
        differs="holds the seed {seed} of VeRA's random matrices, and {name} of {path!r} is drawn "
        "otherwise here than where it was trained: load it with the version of JAX and the setting "
        "of jax_threefry_partitionable that it was trained with",
    ),
    alone="shares one random A and B",
    alone_in_scripts="draws one A and B for all weights and trains two vectors of each",
    rate=lambda lora: 10 * lora,  # as in the paper
    alpha_is_rank=True,
    ranks=(64, 256),  # its numbers hardly grow with the rank
)
