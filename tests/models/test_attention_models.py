"""Models whose attention goes block by block, against the same models with dense attention."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models import Decoder, from_pretrained, init_cache, save_pretrained
from lora_jax.models.layers.blockwise import Blockwise
from lora_jax.sharding import place
from lora_jax.training.layout import Layout
from tests.models import tiny, tiny_encoders
from tests.support import assert_close, lorafied, over, with_random_factors
from train.processes.mesh import make_mesh

BLOCKS = Blockwise(block=4, spans=2)
WINDOWED = "qwen2 with some windows"


def decoder(case: str) -> tuple[Any, Any, Any]:
    """(the model with dense attention, the same with blocks, its parameters)"""
    model, params = tiny.decoder(case)
    return model.clone(attention="dense"), model.clone(attention=BLOCKS), params


def programs(model: Any, params: Any, *args: Any, **kwargs: Any) -> str:
    return str(jax.make_jaxpr(lambda p: model.apply({"params": p}, *args, **kwargs))(params))


@pytest.mark.slow
@over("case", [WINDOWED, "gemma3 with every option"], often=[WINDOWED])
def test_logits(case: str) -> None:
    """Padded left and right, and packed: of the real tokens. (All families: test_parity.py.)"""
    dense, blocks, params = decoder(case)
    ids = tiny.tokens(1, 3, 13)
    at, lengths = np.arange(13)[None], np.array([[13], [9], [5]])
    one = np.ones_like(ids)
    several = np.repeat([[1, 2, 0]], [5, 6, 2], axis=1).repeat(3, axis=0).astype(np.int32)
    for mask, segments in ((at < lengths, one), (at >= 13 - lengths, one), (several > 0, several)):
        want, got = (
            np.asarray(tiny.run(m, params, ids, mask.astype(np.int32), segment_ids=segments))
            for m in (dense, blocks)
        )
        assert np.isfinite(got).all() and np.abs(want).max() > 1
        tiny.assert_close(got[mask], want[mask], 1e-5)


@pytest.mark.slow
def test_a_prompt_into_a_cache_and_on() -> None:
    dense, blocks, params = decoder(WINDOWED)
    ids = tiny.tokens(0, 2, 13)
    want = tiny.run(dense, params, ids)
    cache, parts = init_cache(blocks.config, 2, 15), []
    for start, stop in ((0, 6), (6, 12), (12, 13)):
        logits, cache = tiny.run(blocks, params, ids[:, start:stop], cache=cache)
        parts.append(logits)
    tiny.assert_close(np.concatenate(parts, axis=1), want, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoders(side: str) -> None:
    model, params = tiny_encoders.model("bert", "none")
    ids = tiny_encoders.tokens(1, 3, 11, model.config.pad_token_id)
    at, lengths = np.arange(11)[None], np.array([[11], [7], [4]])
    mask = at < lengths if side == "right" else at >= 11 - lengths
    ids = np.where(mask, ids, model.config.pad_token_id)
    want, got = (
        np.asarray(tiny.run(model.clone(attention=how), params, ids, mask.astype(np.int32)).hidden)
        for how in ("dense", BLOCKS)
    )
    assert np.abs(want).max() > 1
    tiny.assert_close(got[mask], want[mask], 1e-5)


@pytest.mark.slow
def test_gradients_of_an_adapted_model() -> None:
    """By the factored products, too."""
    dense, blocks, params = decoder(WINDOWED)
    ids = tiny.tokens(0, 2, 11)
    rules = [lj.LoraRule(targets="all-linear", rank=3, alpha=7)]
    adapter, base = lj.split(with_random_factors(lorafied(params, rules)))

    def gradient(model: Any) -> Any:
        forward = lj.adapt(model.clone(remat=True).apply, strict=True)

        def loss(adapter: Any) -> jax.Array:
            logits = forward({"params": lj.join(adapter, base)}, ids)
            return -jnp.mean(jax.nn.log_softmax(logits)[:, :, 3])

        return jax.jit(jax.value_and_grad(loss), compiler_options=tiny.FAST_COMPILE)(adapter)

    want, got = gradient(dense), gradient(blocks)
    assert_close(got, want, 5e-5)  # a model's depth adds to rounding: 1.1e-5 was seen
    assert max(np.abs(x).max() for x in jax.tree.leaves(want[1])) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "text"), [(WINDOWED, "sequence=2,tensor=2"), ("bert", "data=2,sequence=2")]
)
def test_meshes(case: str, text: str) -> None:
    """Values and gradients are one device's on every mesh, those that split sequences too."""
    if case == "bert":
        model, params = tiny_encoders.model(case, "none")
    else:
        model, params = tiny.decoder(case)
    blocks = model.clone(attention=BLOCKS)
    ids = tiny.tokens(0, 4, 16)
    layout = Layout.of(make_mesh(text, 4), model.config)
    assert layout.split(16) is not None

    def gradient(model: Any, params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(model.apply({"params": params}, ids, return_hidden=True) ** 2)

        return jax.jit(jax.value_and_grad(loss), compiler_options=tiny.FAST_COMPILE)(params)

    want = gradient(model.clone(attention="dense"), params)
    with jax.set_mesh(layout.mesh):
        there = place(params, layout.table, layout.mesh)
        got = gradient(layout.constrained(blocks), there)
    assert_close(got, want, 1e-5)


def test_the_choice_of_a_model(tmp_path: Any) -> None:
    """By its length, or what it was loaded with; a wrong name says which there are."""
    model, params = tiny.decoder("llama2")
    assert model.attention == "auto"
    save_pretrained(tmp_path / "model", model, params)
    blocks, params = from_pretrained(tmp_path / "model", attention="blockwise")
    assert blocks.attention == "blockwise" and "attention" not in blocks.config.to_hf()

    def loops(model: Decoder, seq: int) -> bool:
        return programs(model, params, jnp.zeros((1, seq), jnp.int32)).count("scan[") > 1

    assert loops(model, 512), "by its length"
    assert [loops(blocks, seq) for seq in (63, 64)] == [False, True]
    assert not loops(model.clone(attention="dense"), 512)
    with pytest.raises(ValueError, match="attention 'flesh'. Use one of auto, dense, blockwise"):
        model.clone(attention="flesh").apply({"params": params}, jnp.zeros((1, 3), jnp.int32))
