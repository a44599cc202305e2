"""The random matrices of VeRA: one A and one B for all weights of a rank.

VeRA (Kopiczko et al., arXiv 2310.11454) draws A [r, in] and B [r, out] once, as wide as the widest
weight, and never trains them. A weight sees the first `in` columns of A and the first `out` columns
of B; weights of one size hold the same array, and the layers of a stack share it. Both follow from
a seed, so a file need not hold them. As in PEFT, each is drawn from Kaiming's uniform distribution
for a matrix of its own shape: U(±√(6/in)) for A, U(±√(6/r)) for B.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.paths import fold_in_path
from lora_jax.select.resolve import Adapted, Choice

Widths = tuple[int, int]  # the most in and out features of the weights that share a pair


class Projections:
    """The shared matrices of a tree, drawn where a weight first asks for them."""

    def __init__(self, seed: Any, widths: Mapping[int, Widths]) -> None:
        """Args:
        seed: a number from 0 to 2³² − 1, [] uint32.
        widths: by rank.
        """
        self.seed, self.widths = seed, widths
        self._drawn: dict[Any, jax.Array] = {}

    def abstract(self) -> Callable[[], "Projections"]:
        """Returns a function that makes others like these, for use while a function is traced."""
        return functools.partial(Projections, np.uint32(0), self.widths)

    def of(
        self, rank: int, dtype: Any, ins: tuple[int, ...], outs: tuple[int, ...]
    ) -> dict[str, Any]:
        """Returns the arrays of a weight: shared_a [r, in…], shared_b [r, out…] and the seed.

        Args:
          rank: r.
          dtype: of both matrices.
          ins, outs: the weight's in and out axes.
        """
        width_in, width_out = self.widths[rank]
        a = self._seen("a", rank, width_in, math.sqrt(6 / width_in), dtype, ins)
        b = self._seen("b", rank, width_out, math.sqrt(6 / rank), dtype, outs)
        return {"shared_a": a, "shared_b": b, "seed": self._once("seed", self._seed)}

    def _seed(self) -> jax.Array:
        return jnp.asarray(self.seed, jnp.uint32)

    def _seen(
        self, name: str, rank: int, width: int, bound: float, dtype: Any, sizes: tuple[int, ...]
    ) -> jax.Array:
        """Returns the first columns of a matrix, in the shape of a weight's axes."""

        def whole() -> jax.Array:
            key = fold_in_path(jax.random.key(self.seed), name)
            return jax.random.uniform(key, (rank, width), dtype, -bound, bound)

        def first() -> jax.Array:
            matrix = self._once((name, rank, dtype), whole)
            n = math.prod(sizes)
            matrix = matrix if n == width else matrix[:, :n]
            return matrix if sizes == (n,) else matrix.reshape(rank, *sizes)

        return self._once((name, rank, dtype, sizes), first)

    def _once(self, key: Any, make: Callable[[], jax.Array]) -> jax.Array:
        if key not in self._drawn:
            self._drawn[key] = make()
        return self._drawn[key]


def projections_for(
    leaves: Mapping[str, Any], chosen: Mapping[str, Choice], key: jax.Array
) -> Projections:
    """Returns the matrices that the weights of a tree share.

    Args:
      leaves: the arrays of the tree, by path.
      chosen: what is decided for some of them.
      key: a PRNG key.

    Raises:
      ValueError: the layers of a stack differ in rank.
    """
    shapes: dict[int, list[Widths]] = {}
    for path, choice in chosen.items():
        if not isinstance(choice, Adapted) or not choice.rule.vera:
            continue
        if len(ranks := sorted({*choice.ranks} - {0})) > 1:
            raise ValueError(
                f"vera: the layers of {path!r} have the ranks {ranks}, and a stack shares one A "
                "and B: give all of its layers one rank"
            )
        shape, roles = leaves[path].shape, choice.roles
        ins, outs = (math.prod(roles.sizes(shape, label)) for label in ("in", "out"))
        shapes.setdefault(ranks[0], []).append((ins, outs))
    widths = {rank: widest(each) for rank, each in shapes.items()}
    seed = jax.random.bits(fold_in_path(key, "vera"), dtype=jnp.uint32) if widths else 0
    return Projections(seed, widths)


def widest(shapes: list[Widths]) -> Widths:
    """Returns the widths of the matrices for weights of these numbers of in and out features."""
    return max(n for n, _ in shapes), max(n for _, n in shapes)
