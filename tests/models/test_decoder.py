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
from tests.support import over

WINDOWED = "qwen2 with some windows"


@pytest.mark.parametrize("case", list(tiny.CASES))
def test_parameters_are_the_key_table(case: str) -> None:
    model = Decoder(tiny.config(case))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    got = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(shapes)
    }
    assert got == {row.path: row.stacked_shape for row in key_table(model.config)}


def test_layers_are_scanned() -> None:
    """The program does not grow with the depth."""

    def size(layers: int) -> int:
        config = dataclasses.replace(tiny.config("llama3"), num_hidden_layers=layers)
        model = Decoder(config)
        ids = jnp.zeros((2, 5), jnp.int32)
        params = jax.eval_shape(model.init, jax.random.key(0), ids)
        return len(jax.jit(model.apply).lower(params, ids).as_text().splitlines())

    assert size(2) == size(9)


@pytest.mark.parametrize("case", ["llama3", WINDOWED])
def test_causal(case: str) -> None:
    model, params = tiny.decoder(case)
    ids = tiny.tokens(0, 1, 9)
    changed = ids.copy()
    changed[0, 6] = (ids[0, 6] + 1) % 61
    first, second = (np.asarray(tiny.run(model, params, x)) for x in (ids, changed))
    np.testing.assert_array_equal(first[:, :6], second[:, :6])
    assert np.abs(first[:, 6:] - second[:, 6:]).max(-1).min() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["llama3", WINDOWED])
def test_padding_changes_nothing(case: str, side: str) -> None:
    model, params = tiny.decoder(case)
    ids = tiny.tokens(0, 2, 7)
    pad = (4, 0) if side == "left" else (0, 4)
    padded = np.pad(ids, ((0, 0), pad), constant_values=9)
    mask = np.pad(np.ones_like(ids), ((0, 0), pad))
    want = tiny.run(model, params, ids)
    got = tiny.run(model, params, padded, mask)
    assert np.isfinite(got).all()
    tiny.assert_close(got[:, pad[0] : pad[0] + 7], want, 1e-5)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        ("llama2", (9,)),
        ("mistral with a window", (3, 1, 1, 4)),
        (WINDOWED, (4, 5)),
        ("gemma3 with every option", (3, 1, 1, 4)),
    ],
)
def test_a_cache_changes_nothing(case: str, sizes: tuple[int, ...]) -> None:
    model, params = tiny.decoder(case)
    ids = tiny.tokens(0, 2, 9)
    want = tiny.run(model, params, ids)
    cache = init_cache(model.config, 2, 12)
    parts = []
    for stop in np.cumsum(sizes):
        chunk = ids[:, int(cache.filled) : stop]
        logits, cache = tiny.run(model, params, chunk, cache=cache)
        parts.append(logits)
    tiny.assert_close(np.concatenate(parts, axis=1), want, 1e-5)
    assert cache.filled == 9
    np.testing.assert_array_equal(cache.length, [9, 9])


def test_a_window_counts_tokens_not_padding() -> None:
    """Right-padded prompts leave a gap in the cache that the window does not see."""
    model, params = tiny.decoder("mistral with a window")
    ids = tiny.tokens(0, 1, 9)
    want = tiny.run(model, params, ids)[:, 6:]
    cache = init_cache(model.config, 1, 16)
    prompt = np.pad(ids[:, :6], ((0, 0), (0, 5)))
    mask = np.arange(11)[None] < 6
    _, cache = tiny.run(model, params, prompt, mask, cache=cache)
    got, cache = tiny.run(model, params, ids[:, 6:], cache=cache)
    tiny.assert_close(got, want, 1e-5)


@pytest.mark.parametrize("case", ["llama3", WINDOWED])
def test_packed_segments_are_separate_sequences(case: str) -> None:
    model, params = tiny.decoder(case)
    parts = [tiny.tokens(i, 1, n) for i, n in enumerate((5, 3, 6))]
    packed = np.concatenate([*parts, np.zeros((1, 2), np.int32)], axis=1)
    segments = np.repeat([4, 7, 2, 0], [5, 3, 6, 2])[None]
    got = tiny.run(model, params, packed, segment_ids=segments)
    start = 0
    for ids in parts:
        want = tiny.run(model, params, ids)
        tiny.assert_close(got[:, start : start + ids.shape[1]], want, 1e-5)
        start += ids.shape[1]
    one = tiny.run(model, params, packed)
    assert np.abs(got - one)[:, 5:14].max(-1).min() > 1e-2
    masked = tiny.run(model, params, packed, segments > 0, segment_ids=segments)
    tiny.assert_close(masked[:, :14], got[:, :14], 1e-5)


def test_positions_are_honoured() -> None:
    """Attention sees distances alone: a shift changes nothing, a stretch does."""
    model, params = tiny.decoder("llama2")
    ids = tiny.tokens(0, 1, 6)
    at = np.arange(6)[None]
    want = tiny.run(model, params, ids)
    tiny.assert_close(tiny.run(model, params, ids, positions=at + 5), want)
    stretched = tiny.run(model, params, ids, positions=at * 2)
    assert np.abs(stretched - want).max() > 1e-2


@pytest.mark.parametrize("case", ["smollm2", "llama3"])
def test_hidden_states_and_chosen_logits(case: str) -> None:
    model, params = tiny.decoder(case)
    ids = tiny.tokens(0, 2, 5)
    full = tiny.run(model, params, ids)
    hidden = tiny.run(model, params, ids, return_hidden=True)
    assert hidden.shape == (2, 5, 24)
    tiny.assert_close(tiny.run(model, params, hidden, method="head"), full, 1e-6)
    at = np.array([[4, 0], [2, 3]])
    chosen = tiny.run(model, params, ids, logits_at=at)
    tiny.assert_close(chosen, np.take_along_axis(np.asarray(full), at[..., None], axis=1), 1e-6)


def _loss(params: Any, model: Decoder, ids: np.ndarray) -> jax.Array:
    logits = model.apply({"params": params}, ids)
    return -jnp.mean(jax.nn.log_softmax(logits)[:, :, 3])


_gradients = jax.jit(jax.grad(_loss), static_argnums=1, compiler_options=tiny.FAST_COMPILE)


@pytest.mark.parametrize("remat", [True, "dots_with_no_batch_dims_saveable"])
def test_remat_changes_no_value(remat: bool | str) -> None:
    model, params = tiny.decoder("qwen3")
    again = Decoder(model.config, remat=remat)
    ids = tiny.tokens(0, 2, 5)
    want, got = (_gradients(params, m, ids) for m in (model, again))
    jax.tree.map(lambda a, b: tiny.assert_close(b, a, 1e-6), want, got)
    programs = [str(_gradients.trace(params, m, ids).jaxpr) for m in (model, again)]
    activation, layer = (program.count("prevent_cse") for program in programs)
    assert 1 <= activation < layer


@pytest.mark.parametrize("name", ["save_everything", "save_only_these_names"])
def test_what_is_no_remat_policy_names_those_that_are(name: str) -> None:
    model = Decoder(tiny.config("llama2"), remat=name)
    with pytest.raises(ValueError, match=f"{name}.*everything_saveable"):
        model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_computation(param_dtype: Any) -> None:
    model, params = tiny.decoder("qwen3", dtype=jnp.bfloat16, param_dtype=param_dtype)
    ids = tiny.tokens(0, 2, 6)
    exact = tiny.run(
        Decoder(model.config), jax.tree.map(lambda x: x.astype(jnp.float32), params), ids
    )
    got = tiny.run(model, params, ids)
    assert got.dtype == jnp.float32
    assert tiny.run(model, params, ids, return_hidden=True).dtype == jnp.bfloat16
    assert 1e-4 < np.abs(got - exact).mean() < 0.05 * np.abs(exact).mean()
    cache = init_cache(model.config, 2, 6, jnp.bfloat16)
    cached, cache = tiny.run(model, params, ids, cache=cache)
    assert cache.key.dtype == jnp.bfloat16
    tiny.assert_close(cached, got, 1e-2)


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
        ("llama3", {"hidden_act": "relu"}),
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
        ("qwen3 moe", {"norm_topk_prob": True}),
        ("qwen3 moe", {"num_experts_per_tok": 2}),
    ],
    often=[
        "llama3, {'rope_theta': 50.0}",
        "llama3, {'query_pre_attn_scalar': 3}",
        "llama3, {'rms_norm_eps': 1e-06}",
        "gemma3 with every option, {'rope_local_theta': None}",
        "gemma3 with every option, {'attn_logit_softcapping': 1.5}",
        "gemma3 with every option, {'final_logit_softcapping': None}",
        "gemma3 with every option, {'scale_embeddings': False}",
        "qwen3 moe, {'norm_topk_prob': True}",
    ],
    called=lambda case: f"{case[0]}, {case[1]}",
)
def test_each_option_matters(case: str, change: dict[str, Any]) -> None:
    """Options that share a parameter tree: each gives visibly other logits."""
    model, params = tiny.decoder(case)
    ids = tiny.tokens(0, 1, 12)
    other = Decoder(dataclasses.replace(model.config, **change))
    difference = tiny.run(other, params, ids) - tiny.run(model, params, ids)
    assert np.abs(difference).max() > 1e-2


def test_a_long_context_takes_other_frequencies() -> None:
    """LongRoPE chooses by the longest row, or by what a cache can hold; here beyond 8 tokens."""
    model, params = tiny.decoder("phi3 with a long context")
    scaling = model.config.rope_scaling
    assert scaling is not None
    always = dataclasses.replace(scaling, short_factor=scaling.long_factor)
    long = Decoder(dataclasses.replace(model.config, rope_scaling=always))
    ids = tiny.tokens(0, 2, 9)
    for n, same in ((8, False), (9, True)):
        got, want = (np.asarray(tiny.run(m, params, ids[:, :n])) for m in (model, long))
        assert np.array_equal(got, want) == same
    for slots, same in ((8, False), (9, True)):
        cache = init_cache(model.config, 2, slots)
        got, _ = tiny.run(model, params, ids[:, :5], cache=cache)
        want = tiny.run(long, params, ids[:, :5])
        assert (np.abs(got - want).max() < 1e-4) == same


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


def test_a_wholly_padded_row_has_finite_gradients() -> None:
    model, params = tiny.decoder("llama3")
    ids = tiny.tokens(0, 2, 4)
    mask = np.array([[1, 1, 1, 1], [0, 0, 0, 0]])

    def loss(params: Any) -> jax.Array:
        return jnp.sum(model.apply({"params": params}, ids, mask)[0] ** 2)

    gradient = jax.jit(jax.grad(loss), compiler_options=tiny.FAST_COMPILE)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
