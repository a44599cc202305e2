"""config.json: every option honoured or refused by name."""

import json
from typing import Any

import pytest

from lora_jax.models import ConfigError, DecoderConfig, RopeScaling
from tests.models import tiny

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
}


def read(**changes: Any) -> DecoderConfig:
    return DecoderConfig.from_hf({**BASE, **changes})


def test_defaults_are_those_of_transformers() -> None:
    config = read()
    assert (config.num_key_value_heads, config.head_dim) == (6, 4)
    assert (config.rope_theta, config.rms_norm_eps, config.hidden_act) == (10000.0, 1e-6, "silu")
    assert not config.tie_word_embeddings
    mistral = read(model_type="mistral", hidden_size=48, num_attention_heads=24)
    assert (mistral.num_key_value_heads, mistral.sliding_window) == (8, 4096)
    qwen3 = read(model_type="qwen3", num_key_value_heads=2)
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)
    qwen2 = read(model_type="qwen2", num_key_value_heads=2)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            7.0,
            RopeScaling(kind="linear", factor=2.0),
        ),
        (
            {"rope_theta": 7.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            7.0,
            RopeScaling(kind="llama3", **LLAMA3),
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **LLAMA3}},
            7.0,
            RopeScaling(kind="llama3", **LLAMA3),
        ),
    ],
)
def test_rope_as_transformers_4_and_5_write_it(
    fields: dict[str, Any], theta: float, scaling: RopeScaling | None
) -> None:
    config = read(**fields)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("fields", "window", "layers"),
    [
        ({"model_type": "mistral", "sliding_window": None}, None, ()),
        ({"model_type": "mistral", "sliding_window": 5}, 5, (0, 1, 2, 3)),
        ({"model_type": "qwen2", "sliding_window": 5, "max_window_layers": 2}, None, ()),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 5,
                "use_sliding_window": True,
                "max_window_layers": 2,
            },
            5,
            (2, 3),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 5,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            5,
            (0, 2),
        ),
    ],
)
def test_sliding_windows(
    fields: dict[str, Any], window: int | None, layers: tuple[int, ...]
) -> None:
    config = read(num_key_value_heads=2, **fields)
    assert (config.sliding_window, config.windowed_layers) == (window, layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "'gemma' is not supported.*llama, mistral"),
        ({"model_type": None}, "None is not supported"),
        ({"vocab_size": None, "hidden_size": None}, "lacks vocab_size, hidden_size"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "RoPE type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' lacks factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_interleaved": True}, "rope_interleaved=True is not supported"),
        ({"logit_scale": 2.0, "sliding_window": 7}, "logit_scale=2.0.*sliding_window=7"),
        ({"num_key_value_heads": 4}, "not a multiple"),
        ({"head_dim": 5}, "even head_dim"),
        (
            {"model_type": "qwen3", "num_key_value_heads": 2, "layer_types": ["chunked"] * 4},
            "layer_types",
        ),
        (
            {
                "model_type": "qwen3",
                "num_key_value_heads": 2,
                "layer_types": ["sliding_attention"] * 4,
            },
            "no sliding_window is in use",
        ),
    ],
    ids=str,
)
def test_refusals_name_the_option(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)


def test_harmless_fields_are_harmless() -> None:
    extra = {"torch_dtype": "bfloat16", "use_cache": True, "pretraining_tp": 1, "logit_scale": None}
    assert read(**extra) == read()
    assert read(rope_interleaved=False, attention_dropout=0.0) == read()
    assert read(eos_token_id=3).eos_token_ids == (3,)
    assert read(eos_token_id=[3, 5]).eos_token_ids == (3, 5)


@pytest.mark.parametrize("case", list(tiny.CASES))
def test_to_hf_is_the_inverse(case: str) -> None:
    config = tiny.config(case)
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(tiny.config(case))
