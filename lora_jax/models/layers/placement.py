"""Where a model's activations lie on a mesh: what a model asks, and the answer without a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax

Activation = Literal["residual", "inputs", "heads", "features"]
# (x [batch, seq, d_model], weights [batch, seq, k], experts [batch, seq, k], the kernels of the
# gates, of the up and of the down projections [experts, …]) -> [batch, seq, d_model]
Mixture = Callable[..., jax.Array]


class Placement:
    """What a model asks on its way; this one leaves everything as it is.

    A subclass answers for a mesh. It has to be hashable.
    """

    def constrain(self, x: jax.Array, kind: Activation) -> jax.Array:
        """An activation itself, with ``jax.lax.with_sharding_constraint`` or without.

        There are four kinds:

        - residual, [batch, seq, d_model]: the stream between layers, what rematerialisation keeps;
        - inputs, [batch, seq, d_model]: what the first products of a block are about to read;
        - heads, [batch, seq, heads, head_dim]: queries, keys and values;
        - features, [batch, seq, features]: what the last product of a block is about to read.
        """
        return x

    def mixture(self, mixed: Mixture) -> Mixture:
        """How to call what sends tokens through experts; it sorts them, so each device its own."""
        return mixed


UNPLACED = Placement()
