"""Linear layers: the chunked delta rule against NumPy's step by step, and packed rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import Decoder, DecoderConfig, Shared, init_cache, sample
from lora_jax.models.layers.cache import Cache, Recurrent
from lora_jax.models.layers.delta import RecurrentTokens, gated_delta_rule, short_convolution
from lora_jax.models.sampling.slots import run_chunk
from tests.models import tiny
from tests.support import over, thorough

BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 3, 5, 4
SEGMENTS = (7, 64, 1, 90, 12)  # across chunks, within one, and on their edges


def draw(seq: int, decay: float = 1.0) -> dict[str, np.ndarray]:
    """Arguments of the rule in fp64; keys are of length one, as the layer makes them."""
    rng = np.random.default_rng(seq)
    q, k = rng.standard_normal((2, BATCH, seq, HEADS, KEY_DIM))
    return {
        "q": q,
        "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
        "v": rng.standard_normal((BATCH, seq, HEADS, VALUE_DIM)),
        "log_decay": -decay * rng.exponential(size=(BATCH, seq, HEADS)),
        "beta": rng.uniform(size=(BATCH, seq, HEADS)),
        "state": rng.standard_normal((BATCH, HEADS, KEY_DIM, VALUE_DIM)),
    }


def by_steps(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    log_decay: np.ndarray,
    beta: np.ndarray,
    state: np.ndarray,
    segments: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    state, out = state.copy(), np.zeros_like(v)
    for t in range(q.shape[1]):
        if segments is not None and t:
            state[segments[:, t] != segments[:, t - 1]] = 0
        state *= np.exp(log_decay[:, t])[..., None, None]
        error = v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], state)
        state += np.einsum("bhk,bh,bhv->bhkv", k[:, t], beta[:, t], error)
        out[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return out, state


def in_single(values: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def lengths_of_segments() -> np.ndarray:
    """[2, 174] int32: the rows have their segments in opposite orders."""
    numbers = [
        np.repeat(np.arange(5, dtype=np.int32), order) for order in (SEGMENTS, SEGMENTS[::-1])
    ]
    return np.stack(numbers)


@pytest.mark.parametrize("seq", [1, 5, 64, 173])
def test_chunks_are_steps(seq: int) -> None:
    values = draw(seq, 0.3)
    got = jax.jit(gated_delta_rule)(**in_single(values))
    jax.tree.map(lambda a, b: tiny.assert_close(a, b, 2e-6), got, by_steps(**values))


def test_segments_do_not_meet() -> None:
    segments = lengths_of_segments()
    values = draw(segments.shape[1], 0.05)
    got = jax.jit(gated_delta_rule)(**in_single(values), segments=segments)
    want = by_steps(**values, segments=segments)
    assert np.abs(want[0] - by_steps(**values)[0]).max() > 0.1
    jax.tree.map(lambda a, b: tiny.assert_close(a, b, 2e-6), got, want)


@over("decay", [1e-6, 30.0, 1e4], often=[])
def test_gradients_of_any_decay(decay: float) -> None:
    """exp of what a chunk sums up to would overflow, and exp(-sum) be zero."""
    values = draw(100, decay)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(values["v"].shape)

    def loss(values: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(gated_delta_rule(**values)[0] * weights.astype(np.float32))

    got = jax.jit(jax.grad(loss))(in_single(values))
    for name, gradient in got.items():
        assert np.isfinite(gradient).all(), name
        at = tuple(n - 1 for n in gradient.shape)
        step = 1e-4 * max(1.0, decay if name == "log_decay" else 1.0)
        sides = []
        for sign in (1, -1):
            moved = values[name].copy()
            moved[at] += sign * step
            sides.append(np.sum(by_steps(**values | {name: moved})[0] * weights))
        tiny.assert_close(gradient[at], (sides[0] - sides[1]) / (2 * step), 2e-3)


@pytest.mark.slow
def test_convolution_sees_real_tokens_of_its_segment() -> None:
    """A cached call with padding between tokens is one without it; NumPy sums tap by tap."""
    rng = np.random.default_rng(4)
    taps = rng.standard_normal((6, 1, 4)).astype(np.float32)
    x = rng.standard_normal((2, 9, 6)).astype(np.float32)
    segments = np.array([[0, 0, 1, 1, 1, 1, 1, 2, 2], [3] * 9], np.int32)
    want = np.zeros_like(x)
    for b, t, back in np.ndindex(2, 9, 4):
        if t >= back and segments[b, t] == segments[b, t - back]:
            want[b, t] += taps[:, 0, 3 - back] * x[b, t - back]
    there = np.ones((2, 9), bool)
    got, _ = short_convolution(x, taps, RecurrentTokens(there, segments), None)
    tiny.assert_close(got, want, 1e-6)

    # Row 1 again, in two calls with a cache, padded anywhere; row 0 is longer.
    first = np.array([[1, 1, 1, 1, 1], [0, 1, 0, 1, 0]], bool)
    second = np.array([[1, 1, 1, 1], [1, 0, 1, 1]], bool)
    tail, parts, rows = np.zeros((2, 3, 6), np.float32), [], np.arange(2)[:, None]
    start = np.zeros(2, np.int64)
    for present in (first, second):
        at = start[:, None] + np.maximum(np.cumsum(present, axis=1) - 1, 0)
        garbage = np.where(present[..., None], x[rows, at], 99)
        out, tail = short_convolution(garbage, taps, RecurrentTokens(present, None), tail)
        parts.append(np.asarray(out)[1][present[1]])
        start += present.sum(axis=1)
    tiny.assert_close(np.concatenate(parts), want[1, :5], 1e-6)
    np.testing.assert_array_equal(tail[1], x[1, 2:5])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3.5"])
def test_a_packed_row_is_each_sequence_alone(case: str, float64: None) -> None:
    model, params = tiny.decoder(case, dtype=jnp.float64)
    segments = lengths_of_segments()
    ids = tiny.tokens(2, *segments.shape)
    packed = np.asarray(tiny.run(model, params, ids, segment_ids=segments))
    alone = np.zeros_like(packed)
    for row, order in enumerate((SEGMENTS, SEGMENTS[::-1])):
        edges = np.cumsum([0, *order])
        sequences = np.zeros((5, max(order)), np.int32)
        for i, n in enumerate(order):
            sequences[i, :n] = ids[row, edges[i] : edges[i + 1]]
        got = np.asarray(tiny.run(model, params, sequences))
        for i, n in enumerate(order):
            alone[row, edges[i] : edges[i + 1]] = got[i, :n]
    tiny.assert_close(packed, alone, 1e-9)
    assert np.abs(packed - np.asarray(tiny.run(model, params, ids))).max() > 0.1


@pytest.mark.slow
def test_a_row_that_is_padding_keeps_its_state() -> None:
    model, params = tiny.decoder("qwen3.5")
    ids = tiny.tokens(3, 2, 6)
    _, before = tiny.run(model, params, ids, cache=init_cache(model.config, 2, 9))
    nothing = np.array([[1], [0]], np.int32)
    _, after = tiny.run(model, params, ids[:, :1], nothing, cache=before)
    for old, new in zip(before.recurrent, after.recurrent, strict=True):
        np.testing.assert_array_equal(old[:, 1], new[:, 1])
        assert np.abs(old[:, 0] - new[:, 0]).max() > 1e-2


def test_tokens_that_another_model_shared() -> None:
    config = tiny.config("qwen3.5")
    shared = Shared(*np.zeros((2, 2, 3, 4, 16), np.float32))
    with pytest.raises(ValueError, match="by a model with other layers"):
        init_cache(config, 2, 9, shared=shared)
    memory = Recurrent(*(np.zeros((4, 1, *shape)) for shape in config.recurrent_shapes))
    assert init_cache(config, 2, 9, shared=shared._replace(recurrent=memory)).length[1] == 4
    with pytest.raises(ValueError, match="by a model with other layers"):
        init_cache(tiny.config("qwen3"), 2, 9, shared=shared._replace(recurrent=memory))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3-next", "qwen3.5 with every option"])
def test_prompts_run_in_chunks(case: str) -> None:
    """Cut anywhere and filled up, a prompt has the logits of the whole; so has what follows a copy.

    The copy has the memory at its own end: that of the whole prompt gives other logits.
    """
    model, params = tiny.decoder(case)
    params = jax.tree.map(lambda x: 0.4 * x, params)  # large weights amplify rounding
    ids, other = tiny.tokens(3, 2, 72)
    run = jax.jit(functools.partial(run_chunk, model.apply), compiler_options=tiny.FAST_COMPILE)

    def whole(ids: np.ndarray) -> np.ndarray:
        return np.asarray(tiny.run(model, params, ids[None]))[0]

    def through(chunk: int, ids: np.ndarray, cache: Cache) -> dict[int, tuple[Any, Cache]]:
        ends = {}
        for first in range(0, len(ids), chunk):
            part = np.full((1, chunk), 7, np.int32)
            n = len(ids[first : first + chunk])
            part[0, :n] = ids[first : first + chunk]
            logits, cache = run(params, part, np.int32(n), cache)
            ends[first + n] = logits[0], cache
        return ends

    want = whole(ids)
    for chunk in (5, 32, 66, 72):
        ends = through(chunk, ids, init_cache(model.config, 1, 144))
        for end, (logits, _) in ends.items():
            tiny.assert_close(logits, want[end - 1], 1e-5)
        if chunk != 32:
            continue
        branched = np.concatenate([ids[:32], other[32:]])
        cache = ends[72][1]
        errors = []
        for memory in (ends[32][1].recurrent, cache.recurrent):
            start = cache._replace(
                positions=jnp.where(cache.positions < 32, cache.positions, -1),
                filled=jnp.int32(32),
                length=jnp.full_like(cache.length, 32),
                recurrent=memory,
            )
            got, _ = through(chunk, branched[32:], start)[40]
            errors.append(np.abs(got - whole(branched)[-1]).max())
        assert errors[0] < 1e-5 * max(1, np.abs(want).max()) and errors[1] > 1e-3


@pytest.mark.slow
def test_several_answers_to_a_prompt() -> None:
    """The likeliest tokens, twice each, are those without a cache."""
    model, params = tiny.decoder("qwen3.5")
    ids = tiny.tokens(7, 2, 5)
    drawn = sample(
        model, params, ids, n=2, max_new_tokens=4, temperature=0.0, key=jax.random.key(1)
    )
    want = np.stack([tiny.greedy_loop(model, params, row, 4) for row in ids])
    np.testing.assert_array_equal(drawn.tokens, np.repeat(want, 2, axis=0))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["offload", pytest.param(True, marks=thorough)])
def test_what_is_recomputed_is_the_same(remat: bool | str, float64: None) -> None:
    model, params = tiny.decoder("qwen3.5", dtype=jnp.float64, param_dtype=jnp.float64)
    ids = tiny.tokens(7, 2, 70)

    def gradient(model: Decoder) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(model.apply({"params": params}, ids) ** 2)

        return jax.jit(jax.grad(loss), compiler_options=tiny.FAST_COMPILE)(params)

    both = gradient(model.clone(remat=remat)), gradient(model)
    jax.tree.map(lambda a, b: tiny.assert_close(a, b, 1e-9), *both)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_value_heads": 8}, r"linear_num_value_heads \(8\) must be a multiple"),
        ({"layer_types": ["linear_attention"] * 6}, "All layers are linear"),
        ({"layer_types": ["sliding_attention"] * 6}, "do not describe 6 layers"),
        ({"linear_conv_kernel_dim": 0}, "need a linear_conv_kernel_dim of at least 1"),
        ({"attn_output_gate": False}, "attn_output_gate=False is not supported"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type='sigmoid' is not supported"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype='bfloat16' is not supported"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf({**tiny.fields("qwen3.5"), **changes})


def test_layers_that_repeat_are_stacked() -> None:
    fields = tiny.fields("qwen3.5")
    model = Decoder(DecoderConfig.from_hf({**fields, "num_hidden_layers": 12}))
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    layers = tree["model"]["layers"]
    assert list(layers) == ["0of3", "1of3", "2of3"]
    assert layers["2of3"]["self_attn"]["q_proj"]["kernel"].shape == (4, 24, 2 * 6 * 16)
    assert layers["1of3"]["linear_attn"]["conv1d"].shape == (4, 2 * 3 * 7 + 9 * 5, 1, 4)
