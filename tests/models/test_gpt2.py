"""GPT-2 against itself: caches, padding, packing, generation, config.json and files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.models import (
    GPT2,
    ConfigError,
    GPT2Config,
    WeightsError,
    from_pretrained,
    generate,
    init_cache,
    key_table,
    read_config,
)
from tests.models import tiny, tiny_encoders

CASES = list(tiny_encoders.GPT2S)


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_the_key_table(case: str) -> None:
    model = GPT2(tiny_encoders.config(case))
    got = {path: leaf.shape for path, leaf in tiny_encoders.init_shapes(model).items()}
    assert got == {row.path: row.stacked_shape for row in key_table(model.config)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("eos", [(), (5,), (5, 9)])
def test_configurations_round_trip(case: str, eos: tuple[int, ...]) -> None:
    config = dataclasses.replace(tiny_encoders.config(case), eos_token_ids=eos)
    assert read_config(json.loads(json.dumps(config.to_hf()))) == config


def test_defaults_are_those_of_transformers() -> None:
    config = GPT2Config.from_hf({"model_type": "gpt2"})
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (50257, 768, 3072)
    assert (config.eos_token_ids, config.head_dim, config.max_position_embeddings) == (
        (50256,),
        64,
        1024,
    )
    # Dropout acts in training only, and n_ctx repeats n_positions.
    same = {"model_type": "gpt2", "attn_pdrop": 0.5, "n_ctx": 1024, "summary_type": "first"}
    assert GPT2Config.from_hf(same) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ({"activation_function": "xielu"}, "activation_function 'xielu' is not supported"),
        ({"n_embd": 25}, r"n_embd \(25\) must be a multiple of n_head"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings \('false'\) must be true"),
        ({"layer_norm_epsilon": -1}, r"layer_norm_epsilon \(-1\) must be finite and at least 0"),
        ({"n_head": 0}, r"n_head \(0\) must be at least 1"),
        ({"rotary_dim": 64}, "rotary_dim=64 is not known for gpt2"),
    ],
)
def test_refusals_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT2Config.from_hf({**tiny_encoders.fields("gpt2"), **changes})


def write(folder: Path, case: str, change: Any) -> Any:
    """A folder whose tensors' names are changed; returns the parameters."""
    model, params = tiny_encoders.model(case)
    fields = tiny_encoders.fields(case)
    tensors = tiny_encoders.write_folder(folder, fields, params, model.config)
    save_file(change(tensors), folder / "model.safetensors")
    return params


def bare(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def with_buffers(tensors: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI's files have them."""
    buffers = {f"h.{i}.attn.bias": np.ones((1, 1, 29, 29), np.float32) for i in range(3)}
    return {**bare(tensors), **buffers, "h.0.attn.masked_bias": np.zeros((), np.float32)}


def with_head(tensors: dict[str, Any]) -> dict[str, Any]:
    return {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].copy()}


@pytest.mark.parametrize("change", [dict, bare, with_buffers, with_head])
def test_files_are_read_bitwise(change: Any, tmp_path: Path) -> None:
    params = write(tmp_path, "gpt2", change)
    _, loaded = from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_kernels_are_not_transposed(tmp_path: Path) -> None:
    """Hugging Face stores them as [in, out]; but an untied head as [out, in]."""
    case = "gpt2 with other options"
    model, params = tiny_encoders.model(case)
    fields = tiny_encoders.fields(case)
    tensors = tiny_encoders.write_folder(tmp_path, fields, params, model.config)
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (24, 72)
    assert tensors["lm_head.weight"].shape == (61, 24)
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path)[1], params)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    write(tmp_path, "gpt2", lambda tensors: {**tensors, "score.weight": np.zeros((2, 24))})
    with pytest.raises(WeightsError, match=r"unexpected score.weight \[2, 24\]"):
        from_pretrained(tmp_path)
    write(tmp_path, "gpt2", lambda tensors: {**tensors, "wte.weight": np.zeros((61, 24))})
    with pytest.raises(WeightsError, match="two names, transformer.wte.weight and wte"):
        from_pretrained(tmp_path)


def plain(model: GPT2, params: Any) -> np.ndarray:
    """The logits of two rows of nine tokens, which many tests compare with."""
    return np.asarray(tiny.run(model, params, tiny.tokens(0, 2, 9)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model, params = tiny_encoders.model("gpt2")
    ids = tiny.tokens(0, 2, 9)
    pad = (4, 0) if side == "left" else (0, 4)
    padded = np.pad(ids, ((0, 0), pad), constant_values=9)
    mask = np.pad(np.ones_like(ids), ((0, 0), pad))
    got = np.asarray(tiny.run(model, params, padded, mask))[:, pad[0] : pad[0] + 9]
    tiny.assert_close(got, plain(model, params), 1e-5)


@pytest.mark.slow
def test_a_cache_changes_nothing() -> None:
    model, params = tiny_encoders.model("gpt2 scaled by layer")
    ids = tiny.tokens(0, 2, 9)
    cache = init_cache(model.config, 2, 12)
    parts = []
    for stop in (4, 8, 9):
        logits, cache = tiny.run(model, params, ids[:, int(cache.filled) : stop], cache=cache)
        parts.append(logits)
    tiny.assert_close(np.concatenate(parts, axis=1), plain(model, params), 1e-5)


def test_packed_segments_are_separate_sequences() -> None:
    model, params = tiny_encoders.model("gpt2")
    ids = tiny.tokens(0, 2, 9)
    segments = np.tile(np.repeat(np.int32([4, 7]), [5, 4]), (2, 1))
    packed = np.concatenate([ids[:, :5], ids[:, :4]], axis=1)
    got = np.asarray(tiny.run(model, params, packed, segment_ids=segments))
    want = plain(model, params)  # what comes later changes no logits
    tiny.assert_close(got[:, :5], want[:, :5], 1e-5)
    tiny.assert_close(got[:, 5:], want[:, :4], 1e-5)


def test_too_long_is_refused() -> None:
    model, params = tiny_encoders.model("gpt2")
    with pytest.raises(ValueError, match="30 tokens are more than the model's 29 positions"):
        tiny.run(model, params, tiny.tokens(0, 1, 30))
    with pytest.raises(ValueError, match="30 slots of a cache are more than the model's 29"):
        generate(model, params, tiny.tokens(0, 1, 20), max_new_tokens=11)


@pytest.mark.slow
def test_hidden_states_and_chosen_logits() -> None:
    model, params = tiny_encoders.model("gpt2")
    ids, full = tiny.tokens(0, 2, 9), plain(model, params)
    hidden = tiny.run(model, params, ids, return_hidden=True)
    tiny.assert_close(tiny.run(model, params, hidden, method="head"), full, 1e-6)
    at = np.array([[8, 0], [2, 3]])
    chosen = tiny.run(model, params, ids, logits_at=at)
    tiny.assert_close(chosen, np.take_along_axis(full, at[..., None], axis=1), 1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"hidden_act": "gelu"},
        {"layer_norm_eps": 1e-1},
    ],
    ids=str,
)
def test_each_option_matters(change: dict[str, Any]) -> None:
    model, params = tiny_encoders.model("gpt2")
    other = GPT2(dataclasses.replace(model.config, **change))
    assert np.abs(plain(other, params) - plain(model, params)).max() > 1e-3


@pytest.mark.slow
def test_bfloat16_computation() -> None:
    model, params = tiny_encoders.model("gpt2")
    half = model.clone(dtype=jnp.bfloat16)
    exact, got = plain(model, params), plain(half, params)
    assert got.dtype == np.float32
    assert 1e-4 < np.abs(got - exact).mean() < 0.05 * np.abs(exact).mean()
    cache = init_cache(model.config, 2, 9, jnp.bfloat16)
    cached, cache = tiny.run(half, params, tiny.tokens(0, 2, 9), cache=cache)
    assert cache.key.dtype == jnp.bfloat16
    tiny.assert_close(cached, got, 1e-2)
