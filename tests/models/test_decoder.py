"""The decoder against itself: caches, padding, packing, rematerialisation, dtypes, shapes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import Decoder, RopeScaling, init_cache, key_table
from lora_jax.models.layers.placement import Placement
from tests.models import tiny
from tests.support import equations, over

WINDOWED = "qwen2 with some windows"


# One case for each tree of parameters: other options change no shape.
TREES = {tuple((x.path, x.stacked_shape) for x in key_table(tiny.config(c))): c for c in tiny.CASES}


@pytest.mark.parametrize("case", TREES.values())
def test_parameters_are_the_key_table(case: str) -> None:
    got = {path: leaf.shape for path, leaf in tiny.shapes(case)[0]}
    assert got == {row.path: row.stacked_shape for row in key_table(tiny.config(case))}


def test_layers_are_scanned() -> None:
    """The program does not grow with the depth."""

    def size(layers: int) -> int:
        config = dataclasses.replace(tiny.config("llama3"), num_hidden_layers=layers)
        model = Decoder(config)
        ids = jnp.zeros((2, 5), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), ids)
        return len(str(jax.make_jaxpr(model.apply)(params, ids)).splitlines())

    assert size(2) == size(9)


class OnTPU(Placement):
    """Says that the devices are TPUs."""

    @property
    def platform(self) -> str:
        return "tpu"

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OnTPU)


@pytest.mark.slow
def test_no_product_has_the_activation_in_it_on_a_tpu() -> None:
    """There, what the gate and up products return is written before it; values are the same."""
    model, params = tiny.decoder("llama3")
    there = model.clone(placement=OnTPU(), attention="dense")
    ids = tiny.tokens(0, 2, 9)

    def barriers(model: Decoder) -> int:
        traced = jax.make_jaxpr(model.apply)({"params": params}, ids)
        return sum(eqn.primitive.name == "optimization_barrier" for eqn in equations(traced))

    assert (barriers(model), barriers(there)) == (0, 1)
    np.testing.assert_array_equal(
        plain(there, params), plain(model.clone(attention="dense"), params)
    )


def plain(model: Decoder, params: Any) -> np.ndarray:
    """The logits of two rows of nine tokens, which many tests compare with."""
    return np.asarray(tiny.run(model, params, tiny.tokens(0, 2, 9)))


@pytest.mark.parametrize("case", ["llama3", WINDOWED])
def test_causal(case: str) -> None:
    model, params = tiny.decoder(case)
    changed = tiny.tokens(0, 2, 9)
    changed[:, 6] = (changed[:, 6] + 1) % 61
    first, second = plain(model, params), np.asarray(tiny.run(model, params, changed))
    np.testing.assert_array_equal(first[:, :6], second[:, :6])
    assert np.abs(first[:, 6:] - second[:, 6:]).max(-1).min() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["llama3", WINDOWED])
def test_padding_changes_nothing(case: str, side: str) -> None:
    model, params = tiny.decoder(case)
    ids = tiny.tokens(0, 2, 9)
    pad = (4, 0) if side == "left" else (0, 4)
    padded = np.pad(ids, ((0, 0), pad), constant_values=9)
    mask = np.pad(np.ones_like(ids), ((0, 0), pad))
    got = np.asarray(tiny.run(model, params, padded, mask))
    assert np.isfinite(got).all()
    tiny.assert_close(got[:, pad[0] : pad[0] + 9], plain(model, params), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sizes"), [("llama2", (9,)), (WINDOWED, (4, 1, 4))])
def test_a_cache_changes_nothing(case: str, sizes: tuple[int, ...]) -> None:
    """Every kind of layer is compared with transformers in test_parity.py."""
    model, params = tiny.decoder(case)
    ids = tiny.tokens(0, 2, 9)
    cache = init_cache(model.config, 2, 12)
    parts = []
    for stop in np.cumsum(sizes):
        chunk = ids[:, int(cache.filled) : stop]
        logits, cache = tiny.run(model, params, chunk, cache=cache)
        parts.append(logits)
    tiny.assert_close(np.concatenate(parts, axis=1), plain(model, params), 1e-5)
    assert cache.filled == 9
    np.testing.assert_array_equal(cache.length, [9, 9])


@pytest.mark.slow
def test_a_window_counts_tokens_not_padding() -> None:
    """Right-padded prompts leave a gap in the cache that the window does not see."""
    model, params = tiny.decoder("mistral with a window")
    ids = tiny.tokens(0, 2, 9)
    cache = init_cache(model.config, 2, 16)
    prompt = np.pad(ids[:, :6], ((0, 0), (0, 5)))
    mask = np.broadcast_to(np.arange(11) < 6, (2, 11))
    _, cache = tiny.run(model, params, prompt, mask, cache=cache)
    got, cache = tiny.run(model, params, ids[:, 6:], cache=cache)
    tiny.assert_close(got, plain(model, params)[:, 6:], 1e-5)


@over("case", ["llama3", WINDOWED], often=["llama3"])
def test_packed_segments_are_separate_sequences(case: str) -> None:
    model, params = tiny.decoder(case)
    sizes, parts = (5, 3, 6), tiny.tokens(1, 3, 6)
    packed = np.concatenate([part[:n] for part, n in zip(parts, sizes, strict=True)] + [[0, 0]])
    segments = np.repeat(np.int32([4, 7, 2, 0]), [*sizes, 2])

    def run(segments: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.asarray(tiny.run(model, params, packed[None], mask, segment_ids=segments[None]))[
            0
        ]

    whole = np.ones((1, 16), bool)
    got = run(segments, whole)
    alone = np.asarray(tiny.run(model, params, parts))  # what comes later changes no logits
    want = np.concatenate([row[:n] for row, n in zip(alone, sizes, strict=True)])
    tiny.assert_close(got[:14], want, 1e-5)
    one = run(np.ones_like(segments), whole)
    assert np.abs(got - one)[5:14].max(-1).min() > 1e-2
    tiny.assert_close(run(segments, segments[None] > 0)[:14], got[:14], 1e-5)


def test_positions_are_honoured() -> None:
    """Attention sees distances alone: a shift changes nothing, a stretch does."""
    model, params = tiny.decoder("llama2")
    ids, at = tiny.tokens(0, 2, 9), np.broadcast_to(np.arange(9), (2, 9))
    want = plain(model, params)
    tiny.assert_close(tiny.run(model, params, ids, positions=at + 5), want)
    stretched = tiny.run(model, params, ids, positions=at * 2)
    assert np.abs(stretched - want).max() > 1e-2


@over("case", ["smollm2", "llama3"], often=["llama3"])
def test_hidden_states_and_chosen_logits(case: str) -> None:
    model, params = tiny.decoder(case)
    ids, full = tiny.tokens(0, 2, 9), plain(model, params)
    hidden = tiny.run(model, params, ids, return_hidden=True)
    assert hidden.shape == (2, 9, 24)
    tiny.assert_close(tiny.run(model, params, hidden, method="head"), full, 1e-6)
    at = np.array([[8, 0], [2, 3]])
    chosen = tiny.run(model, params, ids, logits_at=at)
    tiny.assert_close(chosen, np.take_along_axis(full, at[..., None], axis=1), 1e-6)


def _loss(params: Any, model: Decoder, ids: np.ndarray, mask: np.ndarray) -> jax.Array:
    logits = model.apply({"params": params}, ids, mask)
    return -jnp.mean(jax.nn.log_softmax(logits)[:, :, 3])


_gradients = jax.jit(jax.grad(_loss), static_argnums=1, compiler_options=tiny.FAST_COMPILE)
TWO_ROWS = tiny.tokens(0, 2, 5), np.array([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])


@pytest.mark.slow
def test_a_wholly_padded_row_has_finite_gradients() -> None:
    model, params = tiny.decoder("qwen3")
    gradient = _gradients(params, model, *TWO_ROWS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_remat_changes_no_value() -> None:
    """A policy changes none; test_laws_decoder.py compares a model that keeps nothing."""
    model, params = tiny.decoder("qwen3")
    policy, nothing = (model.clone(remat=x) for x in ("dots_with_no_batch_dims_saveable", True))
    want, got = (_gradients(params, m, *TWO_ROWS) for m in (model, policy))
    jax.tree.map(lambda a, b: tiny.assert_close(b, a, 1e-6), want, got)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(want)) > 1e-2
    programs = [str(_gradients.trace(params, m, *TWO_ROWS).jaxpr) for m in (model, policy, nothing)]
    activation, *layers = (program.count("prevent_cse") for program in programs)
    assert 1 <= activation < min(layers)


@pytest.mark.parametrize("name", ["save_everything", "save_only_these_names"])
def test_what_is_no_remat_policy_names_those_that_are(name: str) -> None:
    model = Decoder(tiny.config("llama2"), remat=name)
    with pytest.raises(ValueError, match=f"{name}.*everything_saveable"):
        model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize(
    "param_dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16]
)
def test_bfloat16_computation(param_dtype: Any) -> None:
    model, params = tiny.decoder("qwen3", dtype=jnp.bfloat16, param_dtype=param_dtype)
    single = jax.tree.map(lambda x: np.asarray(x).astype(np.float32), params)
    exact, got = plain(Decoder(model.config), single), plain(model, params)
    assert got.dtype == jnp.float32
    assert 1e-4 < np.abs(got - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.mark.slow
def test_a_cache_in_bfloat16() -> None:
    model, params = tiny.decoder("qwen3", dtype=jnp.bfloat16)
    cache, ids = init_cache(model.config, 2, 9, jnp.bfloat16), tiny.tokens(0, 2, 9)
    hidden = jax.eval_shape(lambda p: model.apply({"params": p}, ids, return_hidden=True), params)
    assert hidden.dtype == jnp.bfloat16
    cached, cache = tiny.run(model, params, ids, cache=cache)
    assert cache.key.dtype == jnp.bfloat16
    tiny.assert_close(cached, plain(model, params), 1e-2)


YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=32)


@over(
    ("case", "change"),
    [
        ("llama3", {"rope_scaling": None}),
        ("llama3", {"rope_scaling": RopeScaling(kind="linear", factor=2.0)}),
        ("llama3", {"rope_scaling": YARN}),
        ("llama3", {"rope_theta": 50.0}),
        ("llama3", {"rms_norm_eps": 1e-6}),
        ("llama3", {"hidden_act": "gelu"}),
        ("llama3", {"sliding_window": 3, "windowed_layers": (1,)}),
        ("llama3", {"sliding_window": 3, "windowed_layers": (0, 1, 2)}),
        ("llama3", {"query_pre_attn_scalar": 3}),
        ("gemma3 with every option", {"rope_local_theta": 900.0}),
        ("gemma3 with every option", {"rope_local_theta": None}),
        ("gemma3 with every option", {"attn_logit_softcapping": 1.5}),
        ("gemma3 with every option", {"final_logit_softcapping": None}),
        ("gemma3 with every option", {"norm_adds_one": False}),
        ("gemma3 with every option", {"scale_embeddings": False}),
        ("phi3", {"partial_rotary_factor": 1.0}),
        ("smollm3", {"rope_free_layers": ()}),
        ("gpt-oss", {"sinks": False}),
        ("gpt-oss", {"swiglu_limit": 7.0}),
        ("gpt-oss", {"swiglu_alpha": 1.0}),
        ("granite", {"embedding_multiplier": 1.0}),
        ("granite", {"residual_multiplier": 1.0}),
        ("granite", {"attention_multiplier": None}),
        ("granite", {"logits_scaling": 1.0}),
        ("qwen3 moe", {"norm_topk_prob": True}),
        ("qwen3 moe", {"num_experts_per_tok": 2}),
    ],
    often=[
        "llama3, {'query_pre_attn_scalar': 3}",
        "llama3, {'rms_norm_eps': 1e-06}",
        "gemma3 with every option, {'attn_logit_softcapping': 1.5}",
    ],
    called=lambda case: f"{case[0]}, {case[1]}",
)
def test_each_option_matters(case: str, change: dict[str, Any]) -> None:
    """Options that share a parameter tree: each gives visibly other logits."""
    model, params = tiny.decoder(case)
    other = Decoder(dataclasses.replace(model.config, **change))
    assert np.abs(plain(other, params) - plain(model, params)).max() > 1e-2


@pytest.mark.slow
def test_a_long_context_takes_other_frequencies() -> None:
    """LongRoPE chooses by the longest row, or by what a cache can hold; here beyond 8 tokens."""
    model, params = tiny.decoder("phi3 with a long context")
    scaling = model.config.rope_scaling
    assert scaling is not None
    always = dataclasses.replace(scaling, short_factor=scaling.long_factor)
    long = Decoder(dataclasses.replace(model.config, rope_scaling=always))
    ids, want = tiny.tokens(0, 2, 9), plain(long, params)
    np.testing.assert_array_equal(plain(model, params), want)
    short = tiny.run(model, params, ids[:, :8])
    assert np.abs(short - want[:, :8]).max() > 1e-2
    for slots, same in ((8, False), (9, True)):
        cache = init_cache(model.config, 2, slots)
        got, _ = tiny.run(model, params, ids[:, :5], cache=cache)
        assert (np.abs(got - want[:, :5]).max() < 1e-4) == same


@pytest.mark.parametrize("case", ["llama3", "gemma2", "phi3"])
def test_activations_can_be_constrained(case: str) -> None:
    """The stream at the embedding and behind each layer, and what each block's products read."""
    config = tiny.config(case)
    seen = set()

    class Seen(Placement):
        def constrain(self, x: jax.Array, kind: str) -> jax.Array:
            seen.add((kind, x.shape))
            return x

    model = Decoder(config, placement=Seen())
    jax.eval_shape(model.init, jax.random.key(0), tiny.tokens(0, 2, 5))
    n, n_kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert seen == {
        ("residual", (2, 5, config.hidden_size)),
        ("inputs", (2, 5, config.hidden_size)),
        *(("heads", (2, 5, heads, size)) for heads in (n, n_kv)),
        ("features", (2, 5, n * size)),
        ("features", (2, 5, config.intermediate_size)),
    }


def test_refusals() -> None:
    model, params = tiny.decoder("llama2")
    ids = tiny.tokens(0, 1, 4)
    cache = init_cache(model.config, 1, 3)
    with pytest.raises(ValueError, match="4 tokens do not fit into a cache of 3"):
        tiny.run(model, params, ids, cache=cache)
    with pytest.raises(ValueError, match="segment_ids"):
        tiny.run(model, params, ids[:, :2], cache=cache, segment_ids=ids[:, :2])
