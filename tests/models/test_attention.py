"""Attention's implementations against each other: values, derivatives, memory, and the choice."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.cases.attention import AttentionShape
from lora_jax.models.layers.attend import (
    ATTENTION,
    IMPLEMENTATIONS,
    MIN_LONG_ROW_QUERIES,
    attend,
    choose_implementation,
    implementation,
)
from lora_jax.models.layers.attention import DENSE, AttentionCall, AttentionInputs
from lora_jax.models.layers.blockwise import Blockwise
from lora_jax.models.layers.kernels import flash
from lora_jax.models.layers.kernels.splash import Splash
from lora_jax.models.layers.masks import Mask, MaskTokens, Split, bidirectional_mask
from lora_jax.models.layers.placement import OLD_GPU, UNPLACED
from tests.support import assert_close, draw, over

CASES = {
    "causal": AttentionShape(23),
    "causal, whole blocks": AttentionShape(20),
    "shorter than a block": AttentionShape(4),
    "one query": AttentionShape(1),
    "many spans": AttentionShape(23),
    "one span": AttentionShape(23),
    "bidirectional": AttentionShape(23, causal=False),
    "bidirectional, padded right": AttentionShape(23, causal=False, padding="right"),
    "bidirectional, padded left": AttentionShape(16, causal=False, padding="left"),
    "padded right": AttentionShape(23, padding="right"),
    "padded left": AttentionShape(23, padding="left"),
    "a window": AttentionShape(23, window=4),
    "a window, padded left": AttentionShape(23, window=4, padding="left"),
    "a window wider than the text": AttentionShape(23, window=2**31 - 1),
    "packed": AttentionShape(23, packed=True),
    "packed, a window and padding": AttentionShape(23, packed=True, window=3, padding="right"),
    "capped": AttentionShape(23, cap=1.5, scale=0.9),
    "one head of keys": AttentionShape(17, kv_heads=1, group=4),
    "no groups": AttentionShape(17, kv_heads=3, group=1),
    "into a cache": AttentionShape(23, slots=31),
    "into a cache, a window and padding": AttentionShape(
        23, slots=31, window=4, padding="left", cap=2.0, sinks=True
    ),
    "sinks": AttentionShape(23, sinks=True),
    "a prompt and completions": AttentionShape(23, branched=True, padding="right", causal=False),
    "prompts and completions, packed": AttentionShape(23, branched=True, packed=True, window=9),
}


BLOCKS = Blockwise(block=5, spans=2)
OTHER_BLOCKS = {"many spans": Blockwise(block=2, spans=9), "one span": Blockwise(block=4, spans=1)}


@jax.jit
def visible(mask: Mask) -> tuple[jax.Array, jax.Array]:
    """All that a mask says, and the first query's sight of the last key, computed alone."""
    last = mask.keys.slots.shape[0] - 1
    return mask.visible(), mask.visible(mask.queries.take(0, 1), mask.keys.take(last, 1))


@pytest.mark.parametrize("name", CASES)
def test_a_mask_is_its_definition(name: str) -> None:
    """Pair by pair."""
    case = CASES[name]
    mask = case.mask()
    got, part = map(np.asarray, visible(mask))
    keys = case.slots or case.seq
    assert got.shape == (case.batch, case.seq, keys)
    positions, looked_at = (np.asarray(side.positions) for side in (mask.queries, mask.keys))
    first, segments = 3 if case.slots else 0, np.asarray(mask.keys.segments)
    for b, i, j in np.ndindex(*got.shape):
        sees = looked_at[b, j] >= 0
        if case.slots is None:
            assert sees == case.present[b, j]
        if case.causal:
            sees &= j <= first + i
        if case.packed:
            sees &= segments[b, i] == segments[b, j]
        if case.branched:
            sees &= case.branches[b, j] in (0, case.branches[b, i])
        if case.window:
            sees &= int(positions[b, i]) - int(looked_at[b, j]) < case.window
        assert got[b, i, j] == sees, (b, i, j)
    np.testing.assert_array_equal(part, got[:, :1, -1:])


OFTEN = [
    "one query",
    "prompts and completions, packed",
]


RARE = ["causal, whole blocks", "one span", "padded right", "a window", "no groups", "into a cache"]


@over("name", CASES, often=OFTEN, rare=RARE)
def test_blocks_compute_what_dense_attention_does(name: str) -> None:
    """Values, and gradients of what the queries that see anything give."""
    case = CASES[name]
    blocks = OTHER_BLOCKS.get(name, BLOCKS)
    mask, arrays = case.mask(), case.arrays()
    looks = np.asarray(visible(mask)[0]).any(-1)[..., None, None]
    cotangent = np.where(looks, draw(4, arrays[0].shape), np.float32(0))

    def gradient(how: Any, arrays: Any) -> Any:
        def run(arrays: Any, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            out = attend(AttentionInputs(*arrays, mask, case.scale, case.cap, sinks), attention=how)
            return jnp.sum(out * cotangent), out

        return jax.value_and_grad(run, (0, 1), has_aux=True)(arrays, case.head_sinks())

    both = jax.jit(lambda *arrays: [gradient(how, arrays) for how in (blocks, "dense")])
    ((_, out), got), ((_, expected), want) = both(*arrays)
    assert np.isfinite(out).all()
    assert_close(np.where(looks, out, 0), np.where(looks, expected, 0), 1e-5)
    assert_close(got, want, 1e-5)
    assert all(np.abs(x).max() > 1e-2 for x in jax.tree.leaves(want)[2:])


@pytest.mark.parametrize("with_sinks", [False, True])
def test_dense_attention_is_softmax_written_out(with_sinks: bool, float64: None) -> None:
    case = dataclasses.replace(CASES["packed, a window and padding"], sinks=with_sinks)
    mask = case.mask()
    q, k, v = (np.asarray(x, np.float64) for x in case.arrays())
    sees = np.asarray(visible(mask)[0])
    sinks = case.head_sinks()
    got = np.asarray(jax.jit(lambda *x: DENSE(*x, mask, 0.6, 1.5, sinks))(q, k, v))
    for b, i, h in np.ndindex(case.batch, case.seq, q.shape[2]):
        seen = sees[b, i]
        if seen.any():
            scores = 1.5 * np.tanh(0.6 * k[b, seen, h // case.group] @ q[b, i, h] / 1.5)
            more = 0.0 if sinks is None else np.exp(float(sinks[h]))
            weights = np.exp(scores) / (np.exp(scores).sum() + more)
            want = weights @ v[b, seen, h // case.group]
            np.testing.assert_allclose(got[b, i, h], want, rtol=1e-9, atol=1e-12)


def test_blocks_in_double_precision(float64: None) -> None:
    case = CASES["packed, a window and padding"]
    mask = case.mask()
    arrays = tuple(np.asarray(x, np.float64) for x in case.arrays())
    looks = np.asarray(visible(mask)[0]).any(-1)[..., None, None]
    both = jax.jit(lambda *x: [run(*x, mask) for run in (BLOCKS, DENSE)])(*arrays)
    got, want = (np.where(looks, out, 0) for out in both)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@over("name", ["packed, a window and padding", "bidirectional"], often=["bidirectional"])
def test_forward_mode(name: str) -> None:
    case = CASES[name]
    mask, arrays = case.mask(), case.arrays()
    along = tuple(draw(9 + i, x.shape) for i, x in enumerate(arrays))

    def derivative(run: Any, arrays: Any, along: Any) -> jax.Array:
        return jax.jvp(lambda *x: run(*x, mask, None, 2.0), arrays, along)[1]

    both = jax.jit(lambda *args: [derivative(run, *args) for run in (BLOCKS, DENSE)])
    got, want = both(arrays, along)
    assert np.abs(want).max() > 0.1
    assert_close(got, want, 1e-5)


def test_half_precision() -> None:
    """As near to fp32 as dense attention is: scores and softmax are fp32 in both."""
    case = CASES["causal"]
    mask, half = case.mask(), tuple(np.asarray(x, jnp.bfloat16) for x in case.arrays())

    @jax.jit
    def run(*half: jax.Array) -> Any:
        exact = DENSE(*(x.astype(jnp.float32) for x in half), mask)
        return exact, BLOCKS(*half, mask), DENSE(*half, mask)

    exact, *both = run(*half)
    assert all(out.dtype == jnp.bfloat16 for out in both)
    errors = [np.abs(np.asarray(out, np.float32) - exact).mean() for out in both]
    assert 0 < errors[0] <= 1.1 * errors[1]


def test_a_window_of_some_layers() -> None:
    """One program for the layers that have it, and for those that have none."""
    case = CASES["a window"]
    arrays = case.arrays()

    @jax.jit
    def run(windowed: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        got = BLOCKS(*arrays, case.mask().within(4, windowed))
        return got, [DENSE(*arrays, case.mask().within(window)) for window in (None, 4)]

    for windowed in (True, False):
        got, want = run(jnp.bool_(windowed))
        assert_close(got, want[windowed], 1e-5)


# Sizes of a layer; attention alone, on abstract shapes.
HEADS, KV_HEADS, HEAD_DIM = 3, 1, 8


@functools.cache
def compiled(how: str, seq: int, *, causal: bool = True) -> jax.stages.Compiled:
    """The gradient of attention over so many tokens."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        slots = jnp.arange(seq, dtype=jnp.int32)
        tokens = MaskTokens(slots, slots[None], segments)
        mask = Mask(queries=tokens, keys=tokens, window=900, causal=causal, aligned=True)
        return jnp.sum(attend(AttentionInputs(q, k, v, mask), attention=how) ** 2)

    shapes = [(1, seq, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    segments = jax.ShapeDtypeStruct((1, seq), jnp.int32)
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, segments).compile()


@over("causal", [True, False], often=())
def test_no_array_has_a_score_for_each_pair(causal: bool) -> None:
    seq = 1024

    def largest(how: str) -> int:
        shapes = re.findall(
            r"\b(?:f32|pred|s32)\[([\d,]+)\]", compiled(how, seq, causal=causal).as_text()
        )
        return max(math.prod(map(int, shape.split(","))) for shape in shapes)

    assert largest("blockwise") < 0.5 * seq**2
    assert largest("dense") >= HEADS * seq**2, "the control"


@over("causal", [True, False], often=["False"])
def test_memory_grows_with_the_length_and_not_its_square(causal: bool) -> None:
    def growth(how: str) -> float:
        few, many = (
            compiled(how, seq, causal=causal).memory_analysis().temp_size_in_bytes
            for seq in (1024, 8192)
        )
        print(f"{how}: {few / 1e6:.1f} MB, {many / 1e6:.1f} MB")
        return many / few

    assert growth("blockwise") < 9
    assert growth("dense") > 40, "the control"


def test_the_choice(monkeypatch: Any) -> None:
    """By length and platform; what a kernel does not serve goes to blocks, by name."""
    monkeypatch.setattr(flash, "missing_compiler", lambda: None)
    assert ATTENTION == ("auto", "dense", "blockwise", "splash", "flash", "cudnn")
    bests = {"cpu": "blockwise", "tpu": "splash", "gpu": "flash", OLD_GPU: "blockwise"}
    for platform, best in bests.items():
        known = dict(IMPLEMENTATIONS)
        if platform.startswith("gpu"):
            known["blockwise"] = Blockwise(spans=2)
        for seq, name in {
            1: "dense",
            MIN_LONG_ROW_QUERIES - 1: "dense",
            MIN_LONG_ROW_QUERIES: best,
        }.items():
            assert implementation("auto", seq, platform) == known[name]
            for asked in ("dense", "blockwise", best):
                assert implementation(asked, seq, platform) == known[asked]
    own = Blockwise(block=3)
    assert implementation(own, 1, "cpu") is own
    assert not UNPLACED.kernels, "here are four devices"
    assert (
        implementation("auto", MIN_LONG_ROW_QUERIES, "tpu", kernels=False)
        is IMPLEMENTATIONS["blockwise"]
    )

    def served(attention: Any, platform: str, **facts: Any) -> str:
        call = AttentionCall(**{"queries": 512, "head_dim": 64, "dtype": jnp.bfloat16} | facts)
        return str(choose_implementation(attention, call, 512, platform))

    assert served("auto", "cpu", cached=True) == "blockwise"
    assert served("auto", "tpu") == served(Splash(128), "tpu", capped=True, head_dim=80) == "splash"
    assert served("splash", "tpu", cached=True) == "blockwise (splash: keys lie in a cache)"
    assert "(splash: the kernel has no float64)" in served("auto", "tpu", dtype=jnp.float64)
    for queries, paired, fits in ((256, True, True), (128, True, False), (128, False, True)):
        told = served("auto", "tpu", queries=queries, split=Split("sequence", 4, paired))
        assert told == "splash" if fits else "64 tokens of a row at a time, no multiple" in told
    assert served("auto", "gpu") == served("flash", "gpu", capped=True, head_dim=96) == "flash"
    assert served("auto", "gpu", cached=True) == "blockwise (flash: keys lie in a cache)"
    assert "has 300 tokens of a row, no multiple of 128" in served(
        "auto", "gpu", queries=300, split=Split("sequence", 2, True)
    )
    assert served("cudnn", "gpu") == served("cudnn", "gpu", dtype=jnp.float16) == "cudnn"
    for facts, why in (
        ({"dtype": jnp.float32}, "cuDNN has no float32"),
        ({"head_dim": 256}, "multiples of 8 up to 128, not 256"),
        ({"head_dim": 60}, "multiples of 8 up to 128, not 60"),
        ({"capped": True}, "does not cap"),
        ({"sinks": True}, "no sinks"),
        ({"queries": 511}, "even number"),
        ({"queries": 8192}, "more than 4,096 tokens"),
        ({"split": Split("sequence", 2, True)}, "lie on several devices"),
    ):
        assert served("cudnn", "gpu", **facts).startswith("blockwise (cudnn: ")
        assert why in served("cudnn", "gpu", **facts)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="attention 'flesh'. Use one of auto, dense, bl"):
        implementation("flesh", 1, "cpu")
    with pytest.raises(ValueError, match="'splash' runs only on a tpu"):
        implementation("splash", 2048, "cpu")
    with pytest.raises(ValueError, match="block=100.*multiple of 128"):
        Splash(block=100)
    with pytest.raises(ValueError, match=r"block=0, spans=8.*at least 1"):
        Blockwise(block=0)
    mask = bidirectional_mask(jnp.ones((2, 3), bool))
    with pytest.raises(ValueError, match="queries of a mask with a window have no positions"):
        mask.within(4).visible()
    with pytest.raises(ValueError, match="keys of this mask have no positions"):
        dataclasses.replace(mask, keys=mask.queries).visible()
