"""Rows that start and end independently: a row can enter, leave and return between two tokens.

A row is the place of one completion in `DecodingRows`. Its slots are the places of tokens in its
cache; a completion outside the rows is a `RowState`.

All functions are pure; the caller compiles them, and decides which row has which place.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.types import Forward, Model, Tree
from lora_jax.models.layers.cache import Cache, Recurrent, init_cache
from lora_jax.models.sampling.choice import (
    Sampling,
    choose_tokens,
    find_likeliest,
    log_probability,
    scale_logits,
    token_keys,
)
from lora_jax.models.sampling.loop import next_logits

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)
Number = jax.Array | np.int32  # [] int32
Flag = jax.Array | np.bool_  # [] bool


class DecodingRows(NamedTuple):
    """Completions in progress, one in each row.

    Attributes:
      cache: keys and values; slot i has the token at position i.
      last: [rows] int32, the newest token, which is not in the cache yet.
      drawn: [rows] int32, the number of tokens drawn.
      adapters: [rows] int32, for a caller whose rows have different ones; see `lora_jax.bank`.
      sampling: [rows] each.
    """

    cache: Cache
    last: jax.Array
    drawn: jax.Array
    adapters: jax.Array
    sampling: Sampling


class RowState(NamedTuple):
    """A completion that is not in the rows; see `DecodingRows`.

    Attributes:
      cache: that of one row: the prompt's tokens, and all tokens drawn but the newest.
      n: [] int32, the number of its tokens.
      last, drawn, adapter: [] int32.
      sampling: [] each.
    """

    cache: Cache
    n: Number
    last: Number
    drawn: Number
    adapter: Number
    sampling: Sampling


class DrawnTokens(NamedTuple, Generic[ArrayT]):
    """One drawn token per row, on the device or on the host.

    Attributes:
      ids: [rows] int32.
      logps: [rows] fp32, of the distribution at the row's temperature.
      top: ids and log-probabilities of the likeliest, [rows, k] each; zeros if not wanted.
    """

    ids: ArrayT
    logps: ArrayT
    top: tuple[ArrayT, ArrayT]


def empty_rows(model: Model, rows: int, length: int, *, with_routing: bool = False) -> DecodingRows:
    """Returns rows without completions, with caches of this length; see `init_cache`."""
    cache = init_cache(model.config, rows, length, model.dtype, with_routing=with_routing)
    # Each field is an array of its own: a program to which rows are donated takes no array twice.
    return DecodingRows(
        cache=cache._replace(filled=None),
        last=jnp.zeros(rows, jnp.int32),
        drawn=jnp.zeros(rows, jnp.int32),
        adapters=jnp.zeros(rows, jnp.int32),
        sampling=Sampling(
            temperature=jnp.ones(rows, jnp.float32),
            top_p=jnp.ones(rows, jnp.float32),
            top_k=jnp.full(rows, model.config.vocab_size, jnp.int32),
            key=jax.random.split(jax.random.key(0), rows),
        ),
    )


def run_chunk(
    run: Forward, params: Tree, ids: jax.Array | np.ndarray, n: Number, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs a chunk of a prompt; returns the logits after its last token, [1, vocab].

    Args:
      run: the model's ``apply``, or the function in its place.
      params: the parameters that ``run`` takes.
      ids: [1, chunk] int32, padded on the right.
      n: [] int32, the number of tokens without padding.
      cache: the cache of the prompt's tokens before the chunk.
    """
    is_token = jnp.arange(ids.shape[1], dtype=jnp.int32) < n
    last_token = jnp.broadcast_to(n - 1, 1)
    return next_logits(run, params, ids, cache, is_token[None], logit_index=last_token)


def draw_tokens(
    logits: jax.Array,
    sampling: Sampling,
    step: jax.Array,
    top: int,
    with_top: Flag,
    adjusted: jax.Array | None = None,
) -> DrawnTokens[jax.Array]:
    """Draws one token per row; log-probabilities come from the unadjusted logits.

    Args:
      logits: [rows, vocab].
      sampling: [rows] each.
      step: [rows] int32, the number of tokens drawn before.
      top: the number of likeliest tokens.
      with_top: [] bool, whether they are wanted.
      adjusted: the logits to choose from, by `adjust_logits`; by default `logits`.
    """
    adjusted = logits if adjusted is None else adjusted
    ids = choose_tokens(adjusted, sampling, token_keys(sampling.key, step))
    return DrawnTokens(
        ids=ids,
        logps=log_probability(logits, ids, sampling.temperature),
        top=find_likeliest(scale_logits(logits, sampling.temperature), top, with_top),
    )


def decode_rows(
    run: Forward, params: Tree, rows: DecodingRows, top: int, with_top: Flag
) -> tuple[DecodingRows, DrawnTokens[jax.Array]]:
    """Draws the next token of each row; see `draw_tokens`."""
    logits, rows = run_rows(run, params, rows)
    tokens = draw_tokens(logits, rows.sampling, rows.drawn, top, with_top)
    return rows._replace(last=tokens.ids, drawn=rows.drawn + 1), tokens


def run_rows(run: Forward, params: Tree, rows: DecodingRows) -> tuple[jax.Array, DecodingRows]:
    """Runs the newest token of each row; returns the logits after it, [rows, vocab]."""
    logits, cache = next_logits(run, params, rows.last[:, None], rows.cache)
    return logits, rows._replace(cache=cache)


def take_row(rows: DecodingRows, row: Number) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values of a row, [] int32."""
    key = lax.dynamic_slice_in_dim(rows.cache.key, row, 1, axis=1)
    value = lax.dynamic_slice_in_dim(rows.cache.value, row, 1, axis=1)
    return key, value


def take_recurrent(rows: DecodingRows, row: Number) -> Recurrent | None:
    """Returns the linear layers' state of a row, [] int32; None without linear layers."""
    memory: Recurrent | None = jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, row, 1, axis=1), rows.cache.recurrent
    )
    return memory


def take_routing(rows: DecodingRows, row: Number) -> jax.Array | None:
    """Returns the experts of a row's tokens, [layers, 1, slots, k]; None if not recorded."""
    routing = rows.cache.routing
    return None if routing is None else lax.dynamic_slice_in_dim(routing, row, 1, axis=1)


def insert_row(rows: DecodingRows, row: Number, state: RowState) -> DecodingRows:
    """Returns the rows with a completion inserted at index `row`, [] int32."""
    cache, row_cache = rows.cache, state.cache
    n_slots = cache.positions.shape[1]
    slots = jnp.arange(n_slots, dtype=jnp.int32)

    def update_row(arrays: jax.Array, array: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(arrays, array, row, axis=1)

    def set_entry(array: jax.Array, entry: jax.Array) -> jax.Array:
        return array.at[row].set(entry)

    def update_routing(routing: jax.Array, row_routing: jax.Array) -> jax.Array:
        return update_row(routing, row_routing[:, :, :n_slots])

    return DecodingRows(
        cache=cache._replace(
            key=update_row(cache.key, row_cache.key[:, :, :, :n_slots]),
            value=update_row(cache.value, row_cache.value[:, :, :, :n_slots]),
            recurrent=jax.tree.map(update_row, cache.recurrent, row_cache.recurrent),
            routing=jax.tree.map(update_routing, cache.routing, row_cache.routing),
            positions=cache.positions.at[row].set(jnp.where(slots < state.n, slots, -1)),
            length=cache.length.at[row].set(state.n),
        ),
        last=rows.last.at[row].set(state.last),
        drawn=rows.drawn.at[row].set(state.drawn),
        adapters=rows.adapters.at[row].set(state.adapter),
        sampling=jax.tree.map(set_entry, rows.sampling, state.sampling),
    )


def fit_rows(rows: DecodingRows, order: jax.Array | np.ndarray, length: int) -> DecodingRows:
    """Returns selected rows in a given order, with caches of another length.

    Args:
      rows: the rows.
      order: [n] int32, the indices of the rows to return.
      length: the number of slots of the caches.
    """
    cache = rows.cache

    def select(x: jax.Array) -> jax.Array:  # [layers, rows, …]
        return x[:, order]

    cache = cache._replace(
        key=select(cache.key),
        value=select(cache.value),
        positions=cache.positions[order],
        length=cache.length[order],
        recurrent=jax.tree.map(select, cache.recurrent),
        routing=jax.tree.map(select, cache.routing),
    )
    return DecodingRows(
        cache=resize_cache(cache, length),
        last=rows.last[order],
        drawn=rows.drawn[order],
        adapters=rows.adapters[order],
        sampling=jax.tree.map(lambda x: x[order], rows.sampling),
    )


def resize_cache(cache: Cache, length: int) -> Cache:
    """Returns a cache with this number of slots: the first ones, then empty slots."""

    def resize(x: jax.Array, axis: int, fill: int) -> jax.Array:
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, max(0, length - x.shape[axis]))
        padded = jnp.pad(x, pads, constant_values=fill)
        return lax.slice_in_dim(padded, 0, length, axis=axis)

    return cache._replace(
        key=resize(cache.key, 3, 0),
        value=resize(cache.value, 3, 0),
        positions=resize(cache.positions, 1, -1),
        routing=jax.tree.map(lambda x: resize(x, 2, -1), cache.routing),
    )
