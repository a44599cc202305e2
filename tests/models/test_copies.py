"""Arrays that a training step keeps for its backward pass, and that a decoding step copies."""

import importlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax.models.layers import trunk
from lora_jax.models.layers.attend import attend
from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.cache import write_slots
from lora_jax.models.layers.masks import Mask, MaskTokens
from tests.models import tiny
from tests.support import array, assert_close, draw

ACTIVATIONS = importlib.import_module("lora_jax.models.layers.blocks")


def by_softmax(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, scale: Any, _: Any) -> Any:
    """Attention as it is written in textbooks: weights, then their product with the values."""
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    factor = AttentionInputs(q, k, v, mask, scale).factor
    scores = jnp.einsum("bsngd,btnd->bngst", grouped, k) * factor
    scores = jnp.where(mask.visible()[:, None, None], scores, jnp.finfo(q.dtype).min)
    return jnp.einsum("bngst,btnd->bsngd", jax.nn.softmax(scores), v).reshape(q.shape)


def kept(shape: tuple[int, ...], attention: Any = "auto") -> int:
    """The number of arrays of a shape that a step keeps for each layer."""
    model, params = tiny.decoder("llama3", attention=attention)
    ids = tiny.tokens(2, 5, 7)

    def loss(params: Any) -> jax.Array:
        return jnp.sum(model.apply({"params": params}, ids))

    forward = next(
        eqn for eqn in jax.make_jaxpr(jax.grad(loss))(params).eqns if eqn.primitive.name == "scan"
    )
    return sum(out.aval.shape == (3, *shape) for out in forward.outvars)


def test_an_mlp_keeps_what_its_products_read_and_write(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = (5, 7, 37)
    assert kept(hidden) == 3, "gate, up and the input of down"
    monkeypatch.setattr(ACTIVATIONS.jax, "checkpoint", lambda fn, **_: fn)
    assert kept(hidden) > 3, "the control"


def test_attention_keeps_one_array_of_scores() -> None:
    scores = (5, 2, 3, 7, 7)
    assert kept(scores) == 1
    assert kept(scores, by_softmax) == 2, "the control"


LAYERS, BATCH, KV_HEADS, GROUP, HEAD_DIM, SLOTS = 3, 5, 2, 3, 10, 11


@pytest.mark.slow
@pytest.mark.parametrize("heads_lead", [True, False])
def test_a_decoding_step_reads_slots_where_they_lie(heads_lead: bool) -> None:
    """Layers take one token each; what holds all slots of a layer is neither moved nor copied."""
    lead = (KV_HEADS, SLOTS) if heads_lead else (SLOTS, KV_HEADS)
    stack = draw(0, (LAYERS, BATCH, *lead, HEAD_DIM))
    q = draw(1, (BATCH, 1, KV_HEADS * GROUP, HEAD_DIM))
    new = draw(2, (BATCH, 1, KV_HEADS, HEAD_DIM))
    slots = jnp.arange(SLOTS, dtype=jnp.int32)
    keys = MaskTokens(slots, jnp.broadcast_to(slots, (BATCH, SLOTS)))

    def slots_lead(cached: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(cached, new, (0, first, 0, 0))

    @jax.jit
    def step(stacks: Any, q: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
        mask = Mask(queries=MaskTokens(first[None], None), keys=keys, causal=True, aligned=False)

        def layer(q: jax.Array, cached: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            write = write_slots if heads_lead else slots_lead
            k, v = (write(part, new, first) for part in cached)
            return attend(AttentionInputs(q, k, v, mask)), None

        return lax.scan(layer, q, stacks)[0]

    args = ((stack, stack * 2), q, new, jnp.int32(4))
    hlo = step.lower(*args).compile().as_text()
    moves = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose|dynamic-update-slice)\(", hlo)
    whole = sorted((1, BATCH, KV_HEADS, SLOTS, HEAD_DIM))
    moved = [m for m in moves if sorted(map(int, m.split(","))) in (whole, whole[1:])]
    assert bool(moved) != heads_lead, "the control has the slots before the heads"
    if heads_lead:  # the same keys and values, whole, without a cache
        want = q
        for at in range(LAYERS):
            k, v = (part[at].at[:, :, 4].set(new[:, 0]).swapaxes(1, 2)[:, :5] for part in args[0])
            seen = MaskTokens(slots[:5], keys.positions[:, :5])
            mask = Mask(queries=MaskTokens(slots[4:5], None), keys=seen, causal=True, aligned=False)
            want = jax.jit(lambda *x, mask=mask: by_softmax(*x, mask, None, None))(want, k, v)
        assert_close(step(*args), want, 1e-5)


def under_vmap(cached: jax.Array, new: jax.Array, first: jax.Array, batch: int, axis: int) -> Any:
    """The obvious way to write each row's token into its own slot."""

    def put(cached: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(cached, new, first, axis - 1)

    return jax.vmap(put, (batch, batch, 0), batch)(cached, new, first)


@pytest.mark.parametrize("write", [trunk.put_slots, under_vmap])
def test_tokens_of_rows_of_different_age_are_written_where_the_cache_lies(write: Any) -> None:
    cached = draw(0, (LAYERS, BATCH, KV_HEADS, SLOTS, HEAD_DIM))
    new = draw(1, (LAYERS, BATCH, KV_HEADS, 1, HEAD_DIM))
    first = array([3, 0, SLOTS + 1, 7, SLOTS - 1])
    expected = np.array(cached)
    for row, slot in enumerate(np.minimum(first, SLOTS - 1)):
        expected[:, row, :, slot] = new[:, row, :, 0]
    step = jax.jit(lambda *args: write(*args, batch=1, axis=3), donate_argnums=0)
    temporary = step.lower(cached, new, first).compile().memory_analysis().temp_size_in_bytes
    assert (temporary < cached.nbytes / 2) == (write is trunk.put_slots), "the control copies it"
    np.testing.assert_array_equal(step(cached, new, first), expected)
