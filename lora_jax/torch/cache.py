"""Caches for torch modules: `CachedCall` holds keys and values, and `Tokens` holds tokens.

A module that cannot use cached keys and values computes all tokens again, so it gets `Tokens`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import torch
import transformers

from lora_jax.models.layers.cache import Cache
from lora_jax.models.layers.trunk import causal_mask, extend_cache, place_tokens, put_slots
from lora_jax.torch.backend import to_torch
from lora_jax.torch.packages import TorchModelError

# Keys and values, [batch, heads, n, head_dim] each, by the index of the layer that computed them.
# Stacked layers have one entry, with an axis of layers in front, by the index of the first layer.
KeyValues = dict[int, tuple[Any, Any]]
_Cache: Any = transformers.Cache
OTHER_STATE = "it has other state than keys and values between calls"


def empty_cache(entries: KeyValues, batch: int, max_len: int) -> Cache:
    """Makes a cache without tokens, whose field `key` holds all layers' keys and values.

    Args:
      entries: stacked entries, of which only the shapes are used.
      batch: the number of rows.
      max_len: the number of slots of a row.
    """

    def zeros(x: Any) -> jax.Array:
        layers, _, heads, _, size = x.shape
        return jnp.zeros((layers, batch, heads, max_len, size), x.dtype)

    keys_and_values: Any = jax.tree.map(zeros, entries)
    no_values: Any = {}
    return Cache(
        key=keys_and_values,
        value=no_values,
        positions=jnp.full((batch, max_len), -1, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
    )


class CachedCall(_Cache):  # type: ignore[misc]  # it lacks methods of its base
    """The cache that a module receives in one call.

    It offers keys, values and the sizes of masks. It raises an error if a module asks for more,
    because the module then has other state between calls.

    Args:
      cache: the tokens before the call; its entries are empty if no layer has been called.
      ids: [batch, seq] int32.
      mask: [batch, seq], False at padding; None for none.

    Attributes:
      mask: the slots that each token may see.
      positions: [batch, seq] int32, the positions of the tokens in their rows.
    """

    is_compileable = False
    is_sliding = is_linear = is_dummy = ()

    def __init__(self, cache: Cache, ids: jax.Array, mask: jax.Array | None):
        self._cache = cache
        self._placed = place_tokens(ids, mask, None, cache, None)
        self.mask = causal_mask(self._placed, None, cache)
        self.positions = self._placed.positions
        self._entries: Any = cache.key
        self._earlier: KeyValues = jax.tree.map(lambda x: x[0], self._entries)
        self._new: KeyValues = {}
        self._stacked: KeyValues = {}

    @property
    def layers(self) -> NoReturn:
        """Raises a TorchModelError: a module that reads layers has another kind of state."""
        raise TorchModelError(OTHER_STATE)

    def get_seq_length(self, layer_idx: int = 0) -> NoReturn:
        raise TorchModelError("it uses the number of cached tokens, which differs between rows")

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0  # `mask` says where the queries are

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._cache.max_len, 0

    def update(
        self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        """Stores a layer's new keys and values, and returns all keys and values so far."""
        if layer_idx in self._new:
            raise TorchModelError(f"layer {layer_idx} computes keys and values twice in one call")
        new_keys_and_values = key_states.jax(), value_states.jax()
        self._new[layer_idx] = new_keys_and_values
        if self._entries:
            earlier_keys_and_values = self._earlier[layer_idx]
        else:  # the first call of the module
            earlier_keys_and_values = (
                self._empty_slots(new_keys_and_values[0]),
                self._empty_slots(new_keys_and_values[1]),
            )
        updated = []
        for earlier, new in zip(earlier_keys_and_values, new_keys_and_values, strict=True):
            slots = put_slots(earlier, new, self._placed.first_slot, batch=0, axis=2)
            updated.append(to_torch(slots.astype(new.dtype)))
        return tuple(updated)

    def _empty_slots(self, states: jax.Array) -> jax.Array:
        """Returns zeros for all slots of a layer's keys or values, [batch, heads, n, head_dim]."""
        batch, heads, _, head_dim = states.shape
        return jnp.zeros((batch, heads, self._cache.max_len, head_dim), states.dtype)

    def entries_of(self, layers: range) -> KeyValues:
        """Returns the cache entries of these layers before the call."""
        return {layer: entry for layer, entry in self._entries.items() if layer in layers}

    @contextlib.contextmanager
    def use_entries(self, entries: KeyValues) -> Iterator[KeyValues]:
        """Gives these entries to a scan's layers within a block; yields the new entries."""
        outer_earlier, outer_new = self._earlier, self._new
        self._earlier = outer_earlier | entries
        self._new = {}
        try:
            yield self._new
        finally:
            self._earlier = outer_earlier
            self._new = outer_new

    def add(self, entries: KeyValues, layers: range) -> None:
        """Adds the new entries of the layers of a stack.

        Raises:
          TorchModelError: entries of other layers are among them.
        """
        other_layers = entries.keys() - set(layers)
        if other_layers:
            raise TorchModelError(
                f"its stacked layers give the cache the layer index {min(other_layers)}, which is "
                "not theirs"
            )
        self._stacked |= entries

    @property
    def new_entries(self) -> KeyValues:
        """The entries that the call added, stacked by layer."""
        entries: KeyValues = jax.tree.map(lambda x: x[None], self._new)
        return entries | self._stacked

    def extended(self) -> Cache:
        """Returns the cache with the call's tokens and entries."""
        # [layers, batch, heads, n, head_dim] -> [layers, batch, n, heads, head_dim]
        token_major = jax.tree.map(lambda x: x.swapaxes(2, 3), self.new_entries)
        return extend_cache(self._cache, self._placed, (token_major, {}))


class Tokens(NamedTuple):
    """The tokens of each row, without padding; the model recomputes all of them in each call.

    The only requirement is that no token sees a later one, because slots after a row's end may hold
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
        """The maximum number of tokens of a row."""
        return self.ids.shape[1]

    @property
    def example_axes(self) -> Tokens:
        """The row axis of each array; see `lora_jax.bank`."""
        return Tokens(0, 0)  # type: ignore[arg-type]

    def repeated(self, n: int) -> Tokens:
        """Returns each row repeated n times, as adjacent rows."""
        return Tokens(jnp.repeat(self.ids, n, axis=0), jnp.repeat(self.length, n, axis=0))

    def extended(self, ids: jax.Array, mask: jax.Array | None) -> tuple[Tokens, jax.Array]:
        """Returns the rows with new tokens, and the slot of each new token.

        Args:
          ids: [batch, seq] int32.
          mask: [batch, seq], False at padding, which is not added; None for no padding.
        """
        mask = jnp.ones(ids.shape, bool) if mask is None else mask.astype(bool)
        slots = self.length[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
        rows = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
        target_slots = jnp.where(mask, slots, self.max_len)  # padding is dropped
        all_ids = self.ids.at[rows, target_slots].set(ids.astype(jnp.int32), mode="drop")
        length = self.length + jnp.sum(mask, axis=1, dtype=jnp.int32)
        return Tokens(all_ids, length), jnp.clip(slots, 0, self.max_len - 1)
