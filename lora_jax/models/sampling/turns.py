"""Completions of several turns: between two turns, a row receives tokens that were not drawn.

Rows wait and go on independently: a row that waits keeps its place and its cache. A turn begins
with a chunk of tokens (the prompt, or the answer to the turn before), run for that row alone; then
all rows that are drawing take a token at a time. All shapes are fixed, so that neither the other
rows nor the time at which a row goes on change the tokens that it draws.

All functions are pure; the caller compiles them, and decides which row has which place.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.types import Forward, Tree
from lora_jax.models.layers.cache import Cache
from lora_jax.models.sampling.blocks import with_length
from lora_jax.models.sampling.choice import Sampling
from lora_jax.models.sampling.slots import (
    DecodingRows,
    DrawnTokens,
    Number,
    RowState,
    decode_rows,
    draw_tokens,
    insert_row,
    resize_cache,
    take_recurrent,
    take_routing,
    take_row,
)

_TURNS = 2**31  # beyond the index of any token, so that no turn's key is that of a token
_NO_TOP = np.bool_(False)  # the likeliest tokens are not computed


class DrawingRows(NamedTuple):
    """The rows that draw tokens, and their limits.

    Attributes:
      drawing: [rows] bool; the others wait, or are empty.
      room: [rows] int32, the tokens that each may still draw.
      ends: [n] int32, the tokens that end a turn.
      until: [] int32, the number of tokens after which all stop.
    """

    drawing: jax.Array | np.ndarray
    room: jax.Array | np.ndarray
    ends: jax.Array | np.ndarray
    until: Number


class TokenBlock(NamedTuple):
    """Consecutive tokens of the drawing rows.

    Attributes:
      steps: [] int32, the number of tokens of each.
      ids: [rows, n] int32; the columns from `steps` on are zeros.
      logps: fp32, as ids; see `DrawnTokens`.
    """

    steps: jax.Array
    ids: jax.Array
    logps: jax.Array


def turn_key(key: jax.Array, turn: int) -> jax.Array:
    """Returns the key of a row's turn; the first turn uses the row's own key, as in `sample`."""
    return key if turn == 0 else jax.random.fold_in(key, _TURNS + turn)


def copy_row(rows: DecodingRows, row: Number, n: Number, length: int) -> Cache:
    """Returns a row with n tokens, [] int32, as a cache of this length for `run_chunk`."""
    key, value = take_row(rows, row)
    cache = rows.cache._replace(
        key=key,
        value=value,
        recurrent=take_recurrent(rows, row),
        routing=take_routing(rows, row),
    )
    return resize_cache(with_length(cache, n), length)


def row_routing(rows: DecodingRows, row: Number) -> jax.Array:
    """Returns the experts of a row's tokens, [slots, layers, k]; -1 in empty slots."""
    routing = take_routing(rows, row)
    slots = jnp.arange(rows.cache.positions.shape[1], dtype=jnp.int32)
    assert routing is not None, "the cache of such rows keeps experts"
    has_token = slots < rows.cache.length[row]
    return jnp.where(has_token[:, None, None], jnp.moveaxis(routing[:, 0], 0, 1), -1)


def begin_turn(
    rows: DecodingRows, row: Number, cache: Cache, logits: jax.Array, sampling: Sampling
) -> tuple[DecodingRows, DrawnTokens[jax.Array]]:
    """Draws the first token of a turn, and inserts its row.

    Args:
      rows: the rows.
      row: [] int32, the place.
      cache: the cache of one row, with all tokens before the turn.
      logits: [1, vocab], after these tokens.
      sampling: [] each, with the key of the turn.
    """
    sampling_of_row = jax.tree.map(lambda x: x[None], sampling)
    step = jnp.zeros(1, jnp.int32)
    tokens = draw_tokens(logits, sampling_of_row, step, top=1, with_top=_NO_TOP)
    state = RowState(
        cache=cache,
        n=cache.length[0],
        last=tokens.ids[0],
        drawn=jnp.ones((), jnp.int32),
        adapter=jnp.zeros((), jnp.int32),
        sampling=sampling,
    )
    return insert_row(rows, row, state), tokens


def decode_turns(
    run: Forward, params: Tree, rows: DecodingRows, active: DrawingRows, n: int
) -> tuple[DecodingRows, TokenBlock]:
    """Draws tokens for the drawing rows until one of them must stop.

    Args:
      run: the model's ``apply``, or the function in its place.
      params: the parameters that ``run`` takes.
      rows: the rows; the newest token of each that draws is already known.
      active: the rows that draw. One whose newest token ends its turn, or that has no room left,
        stops all.
      n: the number of tokens that a block holds, at least ``active.until``.
    """
    drawing = jnp.asarray(active.drawing)

    def no_row_stops(state: tuple[DecodingRows, TokenBlock]) -> jax.Array:
        rows, block = state
        stops = jnp.isin(rows.last, active.ends) | (block.steps >= active.room)
        return (block.steps < active.until) & ~jnp.any(drawing & stops)

    def step(state: tuple[DecodingRows, TokenBlock]) -> tuple[DecodingRows, TokenBlock]:
        """Draws one token for each drawing row."""
        rows, block = state
        next_rows, tokens = decode_rows(run, params, rows, 1, _NO_TOP)
        # A row that waits writes its next slot again and again, until a token of the row overwrites
        # it. The memory of linear layers has no slots, and must stay.
        length = jnp.where(drawing, next_rows.cache.length, rows.cache.length)
        recurrent = rows.cache.recurrent
        if recurrent is not None and next_rows.cache.recurrent is not None:
            recurrent = recurrent.replace_rows(drawing, next_rows.cache.recurrent)
        next_rows = next_rows._replace(
            cache=next_rows.cache._replace(length=length, recurrent=recurrent),
            last=jnp.where(drawing, next_rows.last, rows.last),
            drawn=jnp.where(drawing, next_rows.drawn, rows.drawn),
        )
        update = lax.dynamic_update_slice_in_dim
        return next_rows, TokenBlock(
            steps=block.steps + 1,
            ids=update(block.ids, tokens.ids[:, None], block.steps, axis=1),
            logps=update(block.logps, tokens.logps[:, None], block.steps, axis=1),
        )

    shape = (len(drawing), n)
    empty_block = TokenBlock(
        steps=jnp.zeros((), jnp.int32),
        ids=jnp.zeros(shape, jnp.int32),
        logps=jnp.zeros(shape, jnp.float32),
    )
    return lax.while_loop(no_row_stops, step, (rows, empty_block))
