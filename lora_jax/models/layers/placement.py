"""Placement of a model's activations on a mesh: the interface, and the answer without a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax

Activation = Literal["residual", "inputs", "heads", "features"]
# (x [batch, seq, d_model], weights [batch, seq, k], experts [batch, seq, k], the kernels of the
# gates, of the up and of the down projections [experts, …]) -> [batch, seq, d_model]
Mixture = Callable[..., jax.Array]
# An implementation of attention; see ``lora_jax.models.layers.attend.Attend``.
Attention = Callable[..., jax.Array]


class Placement:
    """A model's questions on placement; this one leaves everything as it is.

    A subclass answers for a mesh. It has to be hashable.
    """

    @property
    def platform(self) -> str:
        """Returns the kind of device that the model is compiled for: "cpu", "gpu" or "tpu"."""
        return jax.default_backend()

    @property
    def kernels(self) -> bool:
        """Returns whether a kernel can run, which XLA cannot share out over devices by itself.

        Without a placement, nothing tells on which devices the arrays will lie.
        """
        return jax.device_count() == 1

    def constrain(self, x: jax.Array, kind: Activation) -> jax.Array:
        """Returns an activation, with ``jax.lax.with_sharding_constraint`` or as it is.

        There are four kinds:

        - residual, [batch, seq, d_model]: the stream between layers, kept by rematerialisation;
        - inputs, [batch, seq, d_model]: the input of a block's first products;
        - heads, [batch, seq, heads, head_dim]: queries, keys and values;
        - features, [batch, seq, features]: the input of a block's last product.
        """
        return x

    def mixture(self, mixed: Mixture) -> Mixture:
        """Returns the function to call for a mixture, which sorts tokens: each device its own."""
        return mixed

    def attention(self, local: Attention) -> Attention:
        """Returns the attention to call: each device its own batch, heads and queries.

        Args:
          local: computes attention on a device. Where it has a part of the queries only, the
            mask's ``split`` says which.
        """
        return local


@dataclasses.dataclass(frozen=True)
class OnePlatform(Placement):
    """The answers for one device, which need not be here: a plan may compile for another."""

    kind: str

    @property
    def platform(self) -> str:
        """Returns the kind of the device."""
        return self.kind

    @property
    def kernels(self) -> bool:
        """Returns True: there is nothing to share out."""
        return True


UNPLACED = Placement()
