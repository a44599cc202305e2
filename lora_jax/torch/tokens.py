"""The tokens so far, in the place of a cache of keys and values."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """The tokens of each row, without padding; a model computes all of them anew at each call.

    It needs nothing of a model but that no token sees a later one: slots behind a row's end hold
    anything.

    Attributes:
      ids: [batch, max_len] int32.
      length: [batch] int32, the number of a row's tokens.
      filled, shared, routing: None; see `lora_jax.models.layers.cache.Cache`.
    """

    ids: jax.Array
    length: jax.Array
    filled: None = None
    shared: None = None
    routing: None = None

    @classmethod
    def empty(cls, batch: int, max_len: int) -> Tokens:
        """Returns rows without tokens."""
        return cls(jnp.zeros((batch, max_len), jnp.int32), jnp.zeros((batch,), jnp.int32))

    @property
    def max_len(self) -> int:
        """The most tokens of a row."""
        return self.ids.shape[1]

    @property
    def example_axes(self) -> Tokens:
        """The axis of the rows in each array; see `lora_jax.bank`."""
        return Tokens(0, 0)  # type: ignore[arg-type]

    def repeated(self, n: int) -> Tokens:
        """Returns each row n times, side by side."""
        return Tokens(jnp.repeat(self.ids, n, axis=0), jnp.repeat(self.length, n, axis=0))

    def extended(self, ids: jax.Array, mask: jax.Array | None) -> tuple[Tokens, jax.Array]:
        """Returns the rows with further tokens, and the slot of each of these.

        Args:
          ids: [batch, seq] int32.
          mask: [batch, seq], False at padding, which is left out; None for none.
        """
        mask = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        slots = self.length[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
        rows = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
        to = jnp.where(mask, slots, self.max_len)  # padding goes nowhere
        all_ids = self.ids.at[rows, to].set(ids.astype(jnp.int32), mode="drop")
        length = self.length + jnp.sum(mask, axis=1, dtype=jnp.int32)
        return Tokens(all_ids, length), jnp.clip(slots, 0, self.max_len - 1)
