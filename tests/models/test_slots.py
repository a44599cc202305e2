"""Rows that change places, and caches that change lengths, keep what belongs to their tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import tree_leaves, tree_map

from lora_jax.models import Decoder
from lora_jax.models.layers.cache import Recurrent, init_cache
from lora_jax.models.sampling.blocks import take_block
from lora_jax.models.sampling.slots import (
    RowState,
    empty_rows,
    fit_rows,
    insert_row,
    resize_cache,
    run_chunk,
)
from lora_jax.models.sampling.turns import DrawingRows, begin_turn, copy_row, decode_turns
from tests.models import tiny
from tests.support import draw

N, LENGTH, WIDER = 4, 6, 9


def test_a_block_outlives_the_cache_that_it_was_taken_of() -> None:
    """The next chunk takes the cache's memory; who shares the prompt later would find none."""
    memory = Recurrent(jnp.array(draw(1, (1, 1, 2, 3))), jnp.array(draw(2, (1, 1, 2, 3, 3))))
    cache = init_cache(tiny.config("llama3"), 1, LENGTH)._replace(recurrent=memory)
    block = take_block(cache, np.int32(0), 2)
    expected = tree_map(np.array, memory)
    for array in tree_leaves(memory):
        array.delete()  # as a program does that the cache is donated to
    assert block.recurrent is not None
    np.testing.assert_array_equal(block.recurrent.tail, expected.tail)
    np.testing.assert_array_equal(block.recurrent.state, expected.state)


@pytest.mark.slow
def test_experts_move_with_the_keys_of_their_tokens() -> None:
    model = Decoder(tiny.config("mixtral"))
    alone = init_cache(model.config, 1, 7, with_routing=True)
    assert alone.routing is not None
    alone = alone._replace(
        key=draw(0, alone.key.shape),
        value=draw(1, alone.value.shape),
        routing=jnp.arange(alone.routing.size, dtype=jnp.int16).reshape(alone.routing.shape),
    )
    rows, zero = empty_rows(model, 3, LENGTH, with_routing=True), np.int32(0)
    arrays = tree_leaves(rows)
    assert len({*map(id, arrays)}) == len(arrays), "each is donated once"
    sampling = tree_leaves(rows.sampling)
    state = RowState(resize_cache(alone, 8), np.int32(N), zero, zero, zero, rows.sampling)
    state = state._replace(sampling=type(rows.sampling)(*(x[0] for x in sampling)))
    moved = fit_rows(insert_row(rows, np.int32(1), state), np.array([2, 1]), WIDER)
    back = copy_row(moved, np.int32(1), np.int32(N), WIDER + 2)
    assert back.routing is not None and moved.cache.routing is not None
    assert moved.cache.routing.shape[1:3] == (2, WIDER) and back.routing.shape[2] == WIDER + 2
    np.testing.assert_array_equal(back.key[:, :, :, :N], alone.key[:, :, :, :N])
    np.testing.assert_array_equal(back.routing[:, :, :N], alone.routing[:, :, :N])
    assert (moved.cache.routing[:, 0] == -1).all(), "the row beside it is empty"


def test_rows_of_turns_keep_their_types_where_64_bits_are_enabled() -> None:
    """A loop's state must have one type: the new tokens are 32 bits wide, as the rows are."""
    model = Decoder(tiny.config("llama3"))
    _, params = tiny.decoder("llama3")
    ends, ones = np.array([3], np.int32), np.ones(3, np.int32)
    active = DrawingRows(np.ones(3, bool), ones, ends, np.int32(3))

    def turn(params: Any) -> Any:
        rows, first = empty_rows(model, 3, LENGTH), np.int32(1)
        cache = init_cache(model.config, 1, LENGTH)
        logits, cache = run_chunk(model.apply, params, ends[None], first, cache)
        alone = tree_map(lambda x: x[0], rows.sampling)
        rows, _ = begin_turn(rows, first, cache, logits, alone)
        return decode_turns(model.apply, params, rows, active, N)

    with jax.enable_x64(True):
        rows, block = jax.eval_shape(turn, params)
    assert (block.ids.dtype, block.logps.dtype) == (np.int32, np.float32)
    assert rows.sampling.temperature.dtype == np.float32
