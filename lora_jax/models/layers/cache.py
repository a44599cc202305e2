"""The cache of keys, values and states of earlier tokens: a pytree for step-by-step decoding."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

# The keys, values and memories that one call adds to a cache, stacked by layers.
NewEntries: TypeAlias = Any


class Cached(Protocol):
    """A configuration with the sizes of its model's keys and values."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class Recurrent(NamedTuple):
    """The state of linear layers, whose size is independent of the number of tokens.

    Attributes:
      tail: [layers, batch, n, channels], the last n real tokens before the convolution; zeros where
        there were fewer. Without the first axis for one layer.
      state: [layers, batch, heads, key_dim, value_dim], fp32 at least; so, too.
    """

    tail: jax.Array
    state: jax.Array

    def repeat(self, n: int) -> Recurrent:
        """Returns the states with each row repeated n times, as adjacent rows."""
        return Recurrent(*(jnp.repeat(x, n, axis=1) for x in self))

    def replace_rows(self, rows: jax.Array, others: Recurrent) -> Recurrent:
        """Returns the states with some rows, [batch] bool, taken from another one."""
        return Recurrent(
            *(
                jnp.where(rows.reshape(-1, *[1] * (x.ndim - 2)), other, x)
                for x, other in zip(self, others, strict=True)
            )
        )


class Shared(NamedTuple):
    """Tokens with which all rows start, stored once; see ``lora_jax.models.share``.

    Attributes:
      key: [layers, kv_heads, n, head_dim], rotated where the model rotates. Without the first axis
        for one layer.
      value: as key.
      recurrent: the memory of linear layers after these tokens, of one row: each row goes on from a
        copy of its own. None without such layers, and for one layer.
    """

    key: jax.Array
    value: jax.Array
    recurrent: Recurrent | None = None

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        return self.key.shape[-2]

    def repeat(self, batch: int) -> Shared:
        """Returns one layer's keys and values in attention's layout, copied for each row.

        Args:
          batch: the number of rows.

        Returns:
          Keys and values, [batch, n, kv_heads, head_dim] each.
        """
        key, value = (
            jnp.broadcast_to(x.swapaxes(0, 1), (batch, *x.swapaxes(0, 1).shape))
            for x in (self.key, self.value)
        )
        return Shared(key, value)


class LayerCache(NamedTuple):
    """The part of a cache for one layer, stacked on axis 0 for the scan.

    Attributes:
      key, value: [batch, kv_heads, max_len, head_dim].
      shared: this layer's keys and values of what all rows begin with, or None.
    """

    key: jax.Array
    value: jax.Array
    shared: Shared | None


class Cache(NamedTuple):
    """Keys and values of the tokens so far. Slot i holds the i-th token that the model received.

    Attributes:
      key: [layers, batch, kv_heads, max_len, head_dim], rotated where the model rotates. Heads
        lead, so that attention reads a layer's slots in order and copies none of them. Linear
        layers have none. A torch module's are pairs of keys and values; see `lora_jax.torch.cache`.
      value: as key; empty for a torch module, whose keys and values lie in `key`.
      positions: [batch, max_len] int32, each slot's position; -1 in empty and padded slots.
      filled: [] int32, the number of slots in use, padding included; the same for every row. None
        where rows are of different age: then slot i of a row holds its token at position i, without
        padding, and a call feeds one token a row.
      length: [batch] int32, the next token's position: the number of the row's tokens, shared ones
        included, padding not.
      shared: the tokens before slot 0 of every row, or None.
      recurrent: what linear layers remember of each row, shared tokens included; None without such
        layers.
      routing: [layers, batch, max_len, k] int16, the experts that each token went through; None
        where nobody asks for them.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    filled: jax.Array | None
    length: jax.Array
    shared: Shared | None = None
    recurrent: Recurrent | None = None
    routing: jax.Array | None = None

    @property
    def max_len(self) -> int:
        """The number of tokens that a row can have, including padding and shared tokens."""
        return self.positions.shape[1] + (self.shared.n_tokens if self.shared else 0)

    @property
    def example_axes(self) -> Cache:
        """The row axis of each array, None where there is none; see `lora_jax.bank`."""
        recurrent = self.recurrent and Recurrent(tail=1, state=1)  # type: ignore[arg-type]
        axes = {"key": 1, "value": 1, "positions": 0, "filled": None, "length": 0}
        axes |= {"routing": 1} if self.routing is not None else {}
        return Cache(**axes, recurrent=recurrent)  # type: ignore[arg-type]

    def repeated(self, n: int) -> Cache:
        """Returns the cache with each row repeated n times; shared tokens stay shared."""
        return self._replace(
            key=jax.tree.map(lambda x: jnp.repeat(x, n, axis=1), self.key),
            value=jax.tree.map(lambda x: jnp.repeat(x, n, axis=1), self.value),
            positions=jnp.repeat(self.positions, n, axis=0),
            length=jnp.repeat(self.length, n, axis=0),
            recurrent=self.recurrent and self.recurrent.repeat(n),
            routing=None if self.routing is None else jnp.repeat(self.routing, n, axis=1),
        )

    @property
    def first(self) -> jax.Array:
        """The slot of the next token, [] int32, or [batch] where each row has its own."""
        return self.length if self.filled is None else self.filled

    @property
    def layers(self) -> LayerCache:
        """Keys and values of all attention layers, stacked on axis 0."""
        shared = self.shared and self.shared._replace(recurrent=None)
        return LayerCache(self.key, self.value, shared)


def init_cache(
    config: Cached,
    batch: int,
    max_len: int,
    dtype: DTypeLike = jnp.float32,
    *,
    shared: Shared | None = None,
    with_routing: bool = False,
) -> Cache:
    """Creates an empty cache.

    Args:
      config: the model's.
      batch: the number of rows.
      max_len: the number of tokens, padding included, that the cache can hold. Writing beyond it
        overwrites the last slots: under jit nothing can raise. RoPE of the kind "longrope"
        chooses its frequencies by this number plus that of the shared tokens.
      dtype: dtype of keys and values; the model's compute dtype.
      shared: what all rows begin with, before these tokens.
      with_routing: keep the experts of each token, of a mixture.

    Returns:
      The cache, for ``model.apply(…, cache=cache)``.

    Raises:
      ValueError: `shared` is of a model with other layers, or what the model cannot share.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> models.init_cache(config, batch=2, max_len=16).key.shape
    (1, 2, 2, 16, 4)
    """
    make_torch_cache = getattr(config, "empty_cache", None)
    if make_torch_cache is not None:  # a torch module makes a cache of its own form
        if shared is not None:
            raise ValueError(
                "The cache of a torch module cannot share tokens between rows. Remove shared=, and "
                "put the shared tokens into each prompt."
            )
        return make_torch_cache(batch, max_len, dtype)  # type: ignore[no-any-return]
    # Linear layers, and layers that reuse the keys of others, have no entry in the cache.
    n_linear = len(getattr(config, "linear_layers", ()))
    n_reusing = getattr(config, "num_kv_shared_layers", 0)
    n_layers = config.num_hidden_layers - n_linear - n_reusing
    heads, size = getattr(config, "cache_heads", (config.num_key_value_heads, config.head_dim))
    shape = (n_layers, batch, heads, max_len, size)
    return Cache(
        key=jnp.zeros(shape, dtype),
        value=jnp.zeros(shape, dtype),
        positions=jnp.full((batch, max_len), -1, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
        length=jnp.full((batch,), shared.n_tokens if shared else 0, jnp.int32),
        shared=shared,
        recurrent=_initial_recurrent(config, n_linear, batch, dtype, shared),
        routing=_empty_routing(config, batch, max_len) if with_routing else None,
    )


def depends_on_cache_length(config: object) -> bool:
    """Returns True if keys depend on the cache's length, as with "longrope"."""
    scaling = getattr(config, "rope_scaling", None)
    return scaling is not None and scaling.kind == "longrope"


def _initial_recurrent(
    config: Any, n_layers: int, batch: int, dtype: DTypeLike, shared: Shared | None
) -> Recurrent | None:
    """Returns the states of linear layers before a row's first token."""
    if shared is not None:
        model_has_memory = n_layers > 0
        if model_has_memory != (shared.recurrent is not None):
            raise ValueError(
                "shared= was computed by a model with other layers. Compute it with this model by "
                "`lora_jax.models.share`."
            )
        return shared.recurrent and shared.recurrent.repeat(batch)
    if not n_layers:
        return None
    tail_shape, state_shape = config.recurrent_shapes
    state_dtype = np.promote_types(dtype, np.float32)
    return Recurrent(
        tail=jnp.zeros((n_layers, batch, *tail_shape), dtype),
        state=jnp.zeros((n_layers, batch, *state_shape), state_dtype),
    )


def _empty_routing(config: Any, batch: int, max_len: int) -> jax.Array:
    """Returns the experts of an empty cache, -1 in each slot; raises an error for dense models."""
    if not (getattr(config, "num_experts", 0) or 0):
        raise ValueError(
            "with_routing=True stores the experts of each token, but this model has no experts. "
            "Remove with_routing."
        )
    shape = (config.num_hidden_layers, batch, max_len, config.num_experts_per_tok)
    return jnp.full(shape, -1, jnp.int16)


def write_slots(cached: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """Returns one layer's keys or values after writing new tokens, in attention's layout.

    Args:
      cached: [batch, kv_heads, max_len, head_dim].
      new: [batch, seq, kv_heads, head_dim].
      first: [] or [batch] int32, the slot of the first new token; see ``Cache.first``.

    Returns:
      [batch, max_len, kv_heads, head_dim], in the dtype of `new`. The axes are swapped in name
      only: attention swaps them back.
    """
    n_slots = cached.shape[2]
    new_slots = new.swapaxes(1, 2).astype(cached.dtype)
    is_one_token = new_slots.shape[2] == 1
    if is_one_token:  # in one pass with what takes the layer out of the stack
        token_slot = jnp.minimum(first, n_slots - 1)
        is_token_slot = jnp.arange(n_slots, dtype=jnp.int32) == token_slot[..., None]
        slots = jnp.where(is_token_slot[..., None, :, None], new_slots, cached)
    else:
        slots = lax.dynamic_update_slice_in_dim(cached, new_slots, first, axis=2)
    return slots.swapaxes(1, 2).astype(new.dtype)
