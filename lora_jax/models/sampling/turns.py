"""Completions of several turns: between two of a row, tokens join it that nobody drew.

Rows wait and go on independently: one that waits keeps its place, and what its cache holds. A turn
begins with a chunk of tokens (the prompt, or what answered the turn before), run for that row
alone; then all rows that are drawing take a token at a time. All shapes are fixed, so that neither
the other rows nor the time at which a row goes on change what it draws.

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

_TURNS = 2**31  # no token's number, so that no turn's key is that of a token
_NO_TOP = np.bool_(False)  # the likeliest tokens are not wanted


class DrawingRows(NamedTuple):
    """The rows that draw tokens, and where they stop.

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
    """Tokens that the drawing rows drew, one after the other.

    Attributes:
      steps: [] int32, the number of tokens of each.
      ids: [rows, n] int32; the columns from `steps` on are zeros.
      logps: fp32, as ids; see `DrawnTokens`.
    """

    steps: jax.Array
    ids: jax.Array
    logps: jax.Array


def turn_key(key: jax.Array, turn: int) -> jax.Array:
    """Returns the key of a row's turn: of the first one, the row's own, as `sample` has it."""
    return key if turn == 0 else jax.random.fold_in(key, _TURNS + turn)


def copy_row(rows: DecodingRows, row: Number, n: Number, length: int) -> Cache:
    """Returns a row, which has n tokens, [] int32, as a cache of this length for `run_chunk`."""
    key, value = take_row(rows, row)
    cache = rows.cache._replace(
        key=key,
        value=value,
        recurrent=take_recurrent(rows, row),
        routing=take_routing(rows, row),
    )
    return resize_cache(with_length(cache, n), length)


def row_routing(rows: DecodingRows, row: Number) -> jax.Array:
    """Returns the experts of the tokens that a row has run, [slots, layers, k]; -1 behind them."""
    routing = take_routing(rows, row)
    slots = jnp.arange(rows.cache.positions.shape[1], dtype=jnp.int32)
    assert routing is not None  # its cache keeps them
    has_run = slots < rows.cache.length[row]
    return jnp.where(has_run[:, None, None], jnp.moveaxis(routing[:, 0], 0, 1), -1)


def begin_turn(
    rows: DecodingRows, row: Number, cache: Cache, logits: jax.Array, sampling: Sampling
) -> tuple[DecodingRows, DrawnTokens[jax.Array]]:
    """Draws the first token of a turn, and puts its row into its place.

    Args:
      rows: the rows.
      row: [] int32, the place.
      cache: that of one row: all tokens before the turn.
      logits: [1, vocab], after them.
      sampling: [] each, with the key of the turn.
    """
    alone = jax.tree.map(lambda x: x[None], sampling)
    tokens = draw_tokens(logits, alone, jnp.zeros(1, jnp.int32), 1, _NO_TOP)
    drawn = jnp.ones((), jnp.int32)
    state = RowState(cache, cache.length[0], tokens.ids[0], drawn, jnp.zeros_like(drawn), sampling)
    return insert_row(rows, row, state), tokens


def decode_turns(
    run: Forward, params: Tree, rows: DecodingRows, active: DrawingRows, n: int
) -> tuple[DecodingRows, TokenBlock]:
    """Draws tokens of the drawing rows until one of them has to stop.

    Args:
      run: the model's ``apply``, or what takes its place.
      params: passed to it.
      rows: the rows; the newest token of each that draws is already known.
      active: the rows that draw. One whose newest token ends its turn, or that has no room left,
        stops all.
      n: the number of tokens that a block holds, at least ``active.until``.
    """
    drawing = jnp.asarray(active.drawing)

    def goes_on(state: tuple[DecodingRows, TokenBlock]) -> jax.Array:
        rows, block = state
        stops = jnp.isin(rows.last, active.ends) | (block.steps >= active.room)
        return (block.steps < active.until) & ~jnp.any(drawing & stops)

    def step(state: tuple[DecodingRows, TokenBlock]) -> tuple[DecodingRows, TokenBlock]:
        before, block = state
        after, tokens = decode_rows(run, params, before, 1, _NO_TOP)
        # A row that waits writes its next slot again and again, until a token of its own does. A
        # memory without slots has to stay.
        length = jnp.where(drawing, after.cache.length, before.cache.length)
        recurrent = before.cache.recurrent
        if recurrent is not None and after.cache.recurrent is not None:
            recurrent = recurrent.replace_rows(drawing, after.cache.recurrent)
        rows = after._replace(
            cache=after.cache._replace(length=length, recurrent=recurrent),
            last=jnp.where(drawing, after.last, before.last),
            drawn=jnp.where(drawing, after.drawn, before.drawn),
        )
        put = lax.dynamic_update_slice_in_dim
        return rows, TokenBlock(
            block.steps + 1,
            put(block.ids, tokens.ids[:, None], block.steps, axis=1),
            put(block.logps, tokens.logps[:, None], block.steps, axis=1),
        )

    shape = (len(drawing), n)
    start = TokenBlock(
        jnp.zeros((), jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    )
    return lax.while_loop(goes_on, step, (rows, start))
