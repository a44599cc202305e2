"""Rows that begin and end independently: each enters, leaves and comes back between two tokens.

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
    choose,
    likeliest,
    log_probability,
    scale,
    token_keys,
)
from lora_jax.models.sampling.loop import next_logits

ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)
Number = jax.Array | np.int32  # [] int32
Flag = jax.Array | np.bool_  # [] bool


class DecodingRows(NamedTuple):
    """Completions under way, a row each.

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
    """A completion outside the rows; see `DecodingRows`.

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
    """A token of each row, on the device or in the host's memory.

    Attributes:
      ids: [rows] int32.
      logps: [rows] fp32, of the distribution at the row's temperature.
      top: ids and log-probabilities of the likeliest, [rows, k] each; zeros if not wanted.
    """

    ids: ArrayT
    logps: ArrayT
    top: tuple[ArrayT, ArrayT]


def empty_rows(model: Model, rows: int, length: int, *, with_routing: bool = False) -> DecodingRows:
    """Returns rows without completions, whose caches hold so many tokens; see `init_cache`."""
    cache = init_cache(model.config, rows, length, model.dtype, with_routing=with_routing)
    cache = cache._replace(filled=None)
    vocab = jnp.full(rows, model.config.vocab_size, jnp.int32)
    keys = jax.random.split(jax.random.key(0), rows)
    last, drawn, adapters = (jnp.zeros(rows, jnp.int32) for _ in range(3))
    temperature, top_p = (jnp.ones(rows, jnp.float32) for _ in range(2))
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=vocab, key=keys)
    return DecodingRows(cache, last, drawn, adapters, sampling)


def run_chunk(
    run: Forward, params: Tree, ids: jax.Array | np.ndarray, n: Number, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Runs a chunk of a prompt; returns the logits after its last token, [1, vocab].

    Args:
      run: the model's ``apply``, or what takes its place.
      params: passed to it.
      ids: [1, chunk] int32, filled up on the right.
      n: [] int32, the tokens of the chunk.
      cache: the prompt's tokens so far.
    """
    mask, last = (jnp.arange(ids.shape[1], dtype=jnp.int32) < n)[None], jnp.broadcast_to(n - 1, 1)
    return next_logits(run, params, ids, cache, mask, at=last)


def draw_tokens(
    logits: jax.Array,
    sampling: Sampling,
    step: jax.Array,
    top: int,
    with_top: Flag,
    adjusted: jax.Array | None = None,
) -> DrawnTokens[jax.Array]:
    """Draws a token of each row; log-probabilities are those of the model's own logits.

    Args:
      logits: [rows, vocab].
      sampling: [rows] each.
      step: [rows] int32, the number of tokens drawn before.
      top: the number of likeliest tokens.
      with_top: [] bool, whether they are wanted.
      adjusted: the logits to choose from, by `adjust_logits`; by default `logits`.
    """
    choices = logits if adjusted is None else adjusted
    ids = choose(choices, sampling, token_keys(sampling.key, step))
    logps = log_probability(logits, ids, sampling.temperature)
    return DrawnTokens(ids, logps, likeliest(scale(logits, sampling.temperature), top, with_top))


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
    key, value = (
        lax.dynamic_slice_in_dim(x, row, 1, axis=1) for x in (rows.cache.key, rows.cache.value)
    )
    return key, value


def take_recurrent(rows: DecodingRows, row: Number) -> Recurrent | None:
    """Returns the memory of linear layers of a row, [] int32; None without such layers."""
    taken: Recurrent | None = jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, row, 1, axis=1), rows.cache.recurrent
    )
    return taken


def take_routing(rows: DecodingRows, row: Number) -> jax.Array | None:
    """Returns the experts of a row's tokens, [layers, 1, slots, k]; None where nobody asks."""
    routing = rows.cache.routing
    return None if routing is None else lax.dynamic_slice_in_dim(routing, row, 1, axis=1)


def insert_row(rows: DecodingRows, row: Number, state: RowState) -> DecodingRows:
    """Returns rows with a completion in one of them, [] int32."""
    length = rows.cache.positions.shape[1]
    slots = jnp.arange(length, dtype=jnp.int32)
    positions = jnp.where(slots < state.n, slots, -1)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(old, new, row, axis=1)

    old, new = rows.cache, state.cache
    routings = old.routing, new.routing
    return DecodingRows(
        cache=old._replace(
            key=put(old.key, new.key[:, :, :, :length]),
            value=put(old.value, new.value[:, :, :, :length]),
            recurrent=jax.tree.map(put, old.recurrent, new.recurrent),
            routing=jax.tree.map(lambda old, new: put(old, new[:, :, :length]), *routings),
            positions=old.positions.at[row].set(positions),
            length=old.length.at[row].set(state.n),
        ),
        last=rows.last.at[row].set(state.last),
        drawn=rows.drawn.at[row].set(state.drawn),
        adapters=rows.adapters.at[row].set(state.adapter),
        sampling=jax.tree.map(lambda x, new: x.at[row].set(new), rows.sampling, state.sampling),
    )


def fit_rows(rows: DecodingRows, order: jax.Array | np.ndarray, length: int) -> DecodingRows:
    """Returns chosen rows, with caches of another length.

    Args:
      rows: the rows.
      order: [n] int32, which of them.
      length: length of the caches.
    """

    cache = rows.cache
    of_layers = (cache.key, cache.value, cache.recurrent, cache.routing)
    key, value, recurrent, routing = jax.tree.map(lambda x: x[:, order], of_layers)
    cache = cache._replace(
        key=key,
        value=value,
        positions=cache.positions[order],
        length=cache.length[order],
        recurrent=recurrent,
        routing=routing,
    )
    rest = jax.tree.map(lambda x: x[order], rows[1:])
    return DecodingRows(resize_cache(cache, length), *rest)


def resize_cache(cache: Cache, length: int) -> Cache:
    """Returns a cache with so many slots: the first ones, and empty ones behind them."""

    def resize(x: jax.Array, axis: int, fill: int) -> jax.Array:
        room = [(0, 0)] * x.ndim
        room[axis] = (0, max(0, length - x.shape[axis]))
        padded = jnp.pad(x, room, constant_values=fill)
        return lax.slice_in_dim(padded, 0, length, axis=axis)

    return cache._replace(
        key=resize(cache.key, 3, 0),
        value=resize(cache.value, 3, 0),
        positions=resize(cache.positions, 1, -1),
        routing=jax.tree.map(lambda x: resize(x, 2, -1), cache.routing),
    )
