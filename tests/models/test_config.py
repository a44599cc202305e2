"""config.json: every option honoured or refused by name."""

import json
import math
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
        ({"model_type": "gemma2"}, 4096, (0, 2)),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, 4096, (0, 1, 3)),
        ({"model_type": "gemma3_text"}, 4096, (0, 1, 2, 3)),
        ({"model_type": "mixtral", "sliding_window": 5}, 5, (0, 1, 2, 3)),
        ({"model_type": "qwen3_moe", "num_experts": 8}, None, ()),
        ({"model_type": "phi3", "sliding_window": 5}, 5, (0, 1, 2, 3)),
        ({"model_type": "olmo3"}, 4096, (0, 1, 2)),
        ({"model_type": "gpt_oss"}, 128, (0, 2)),
        ({"model_type": "smollm3", "sliding_window": 5, "use_sliding_window": True}, 5, (3,)),
        ({"model_type": "smollm3", "sliding_window": 5}, None, ()),
    ],
)
def test_sliding_windows(
    fields: dict[str, Any], window: int | None, layers: tuple[int, ...]
) -> None:
    config = read(num_key_value_heads=2, **fields)
    assert (config.sliding_window, config.windowed_layers) == (window, layers)


MOE = {"model_type": "qwen3_moe", "num_key_value_heads": 2, "num_experts": 5}
MIXTRAL = {"model_type": "mixtral", "num_key_value_heads": 2}
GEMMA2 = {"model_type": "gemma2", "num_key_value_heads": 2}
GEMMA3 = {"model_type": "gemma3_text", "num_key_value_heads": 2}
PHI3 = {"model_type": "phi3"}
WINDOWED = ["sliding_attention"] * 4
YARN = {"rope_type": "yarn", "factor": 2.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "'gemma' is not supported.*llama, mistral"),
        ({"model_type": None}, "None is not supported"),
        ({"vocab_size": None, "hidden_size": None}, "lacks vocab_size, hidden_size"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu'"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "RoPE type 'proportional'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' lacks factor"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "lacks long_factor, short_factor"),
        ({"rope_scaling": LONGROPE}, "short_factor has 3 numbers, but RoPE rotates 2 pairs"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "ramp": 3}}, "'linear' with ramp"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' lacks factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_interleaved": True}, "rope_interleaved=True is not supported"),
        ({"logit_scale": 2.0, "sliding_window": 7}, "logit_scale=2.0.*sliding_window=7"),
        ({"num_key_value_heads": 4}, "must be a multiple"),
        ({**MOE, "decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ({**MOE, "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
        ({**MOE, "num_experts_per_tok": 9}, "num_experts_per_tok is 9, but"),
        ({**MOE, "shared_expert_intermediate_size": 5}, "shared_expert_intermediate_size=5"),
        ({**MOE, "use_qk_norm": False}, "use_qk_norm=False is not supported"),
        ({"use_qk_norm": True}, "use_qk_norm=True is not known for llama"),
        ({**PHI3, "full_attn_mod": 2}, "full_attn_mod=2 is not supported"),
        ({**MIXTRAL, "router_jitter_noise": 0.1}, "router_jitter_noise=0.1 is not supported"),
        ({**GEMMA2, "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({**GEMMA2, "hidden_act": "gelu"}, "hidden_act='gelu' contradicts hidden_activation"),
        ({**GEMMA2, "sliding_window": None, "layer_types": WINDOWED}, "no sliding_window"),
        # transformers has the option in Gemma 3, too, and no code that would read it.
        ({**GEMMA3, "attn_logit_softcapping": 3.0}, "attn_logit_softcapping=3.0 is not known"),
        (
            {**GEMMA3, "rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "RoPE type 'yarn' of sliding_attention",
        ),
        ({**PHI3, "resid_pdrop": 0.1}, "resid_pdrop=0.1 is not supported"),
        ({**PHI3, "embd_pdrop": 0.1}, "embd_pdrop=0.1 is not supported"),
        ({**PHI3, "partial_rotary_factor": 0.1}, "partial_rotary_factor=0.1 rotates 0 of"),
        ({**PHI3, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not.* phi3"),
        ({"head_dim": 5}, "even head_dim"),
        (
            {"model_type": "gpt_oss", "num_key_value_heads": 2, "experts_per_token": 3},
            "experts_per_token=3 contradicts num_experts_per_tok=4",
        ),
        ({"model_type": "gpt_oss", "num_key_value_heads": 2, "mlp_bias": True}, "mlp_bias=True"),
        ({"model_type": "olmo2", "clip_qkv": 8.0}, "clip_qkv=8.0 is not supported"),
        ({"model_type": "olmo2", "mlp_bias": True}, "mlp_bias=True is not known for olmo2"),
        (
            {"model_type": "olmo3", "rope_parameters": {"sliding_attention": YARN}},
            "RoPE type 'yarn' of sliding_attention",
        ),
        ({"model_type": "granite", "num_local_experts": 4}, "num_local_experts=4 is not known"),
        ({"model_type": "granite", "position_embedding_type": "nope"}, "position_embedding_type"),
        (
            {"model_type": "smollm3", "num_key_value_heads": 2, "layer_types": WINDOWED},
            "no sliding_window",
        ),
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


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings \('false'\) must be true"),
        ({"attention_bias": "false"}, r"attention_bias \('false'\) must be true or false"),
        ({"attention_bias": 1}, r"attention_bias \(1\) must be true or false"),
        ({"mlp_bias": "no"}, r"mlp_bias \('no'\) must be true or false"),
        ({**MOE, "norm_topk_prob": "false"}, r"norm_topk_prob \('false'\) must be"),
        ({"model_type": "qwen2", "use_sliding_window": "no"}, r"use_sliding_window \('no'\) must"),
        ({"rms_norm_eps": NAN}, r"rms_norm_eps \(nan\) must be finite and at least 0"),
        ({"rms_norm_eps": -1}, r"rms_norm_eps \(-1\) must be finite and at least 0"),
        ({"rms_norm_eps": "1e-6"}, r"rms_norm_eps \('1e-6'\) must be a number"),
        ({"rms_norm_eps": None}, r"rms_norm_eps \(None\) must be a number"),
        ({"rope_theta": -1}, r"rope_theta \(-1.0\) must be finite and above 0"),
        ({"rope_theta": 0}, r"rope_theta \(0.0\) must be finite and above 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": NAN}}, r"rope_theta \(nan\)"),
        ({**GEMMA3, "rope_local_base_freq": 0}, r"rope_local_theta \(0.0\) must be"),
        ({**PHI3, "partial_rotary_factor": 0}, r"partial_rotary_factor \(0.0\) must be"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor=0 is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, r"factor \(-2.0\) must be"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, r"factor \(0\) must be"),
        ({"rope_scaling": {**YARN, "truncate": "false"}}, r"truncate \('false'\) must be true"),
        (
            {"rope_scaling": {**LONGROPE, "long_factor": [2.0, NAN], "short_factor": [1.0] * 2}},
            r"long_factor \(nan\) must be",
        ),
        ({"head_dim": 0}, r"head_dim \(0\) must be at least 1"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads \(0\) must be at least 1"),
        ({"num_attention_heads": -6}, r"num_attention_heads \(-6\) must be at least 1"),
        ({"hidden_size": 24.0}, r"hidden_size \(24.0\) must be a whole number"),
        ({"num_hidden_layers": True}, r"num_hidden_layers \(True\) must be a whole number"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers \(0\) must be at least 1"),
        ({"max_position_embeddings": -1}, r"max_position_embeddings \(-1\) must be at least 1"),
        ({"initializer_range": -0.1}, r"initializer_range \(-0.1\) must be"),
        ({"eos_token_id": "2"}, r"eos_token_ids \('2'\) must be a whole number"),
        ({**GEMMA2, "attn_logit_softcapping": 0.0}, r"attn_logit_softcapping \(0.0\) must be"),
        ({**GEMMA2, "query_pre_attn_scalar": 0}, r"query_pre_attn_scalar \(0\) must be"),
        ({"model_type": "granite", "logits_scaling": NAN}, r"logits_scaling \(nan\) must be"),
        ({"model_type": "granite", "residual_multiplier": NAN}, r"residual_multiplier \(nan\)"),
    ],
    ids=str,
)
def test_values_that_no_model_can_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**changes)


def test_values_that_stand_for_none() -> None:
    nothing = dict.fromkeys(("attention_bias", "tie_word_embeddings", "head_dim", "mlp_bias"))
    nothing |= dict.fromkeys(("num_key_value_heads", "sliding_window", "rope_scaling"))
    assert read(**nothing) == read()
    assert read(rms_norm_eps=0, pad_token_id=-1, bos_token_id=0).pad_token_id == -1


def test_defaults_of_other_families() -> None:
    mixtral = read(**MIXTRAL)
    assert (mixtral.num_experts, mixtral.num_experts_per_tok) == (8, 2)
    assert (mixtral.moe_intermediate_size, mixtral.norm_topk_prob) == (37, True)
    assert (mixtral.rope_theta, mixtral.rms_norm_eps) == (1e6, 1e-5)
    moe = read(model_type="qwen3_moe", num_key_value_heads=2)
    assert (moe.num_experts, moe.num_experts_per_tok) == (128, 8)
    assert (moe.moe_intermediate_size, moe.norm_topk_prob, moe.qk_norm) == (768, False, True)
    gemma2 = read(**GEMMA2)
    assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (50.0, 30.0)
    assert (gemma2.head_dim, gemma2.query_pre_attn_scalar) == (256, 256)
    assert (gemma2.hidden_act, gemma2.tie_word_embeddings) == ("gelu_pytorch_tanh", True)
    gemma3 = read(**GEMMA3)
    assert (gemma3.rope_theta, gemma3.rope_local_theta, gemma3.qk_norm) == (1e6, 1e4, True)
    assert gemma3.attn_logit_softcapping is gemma3.final_logit_softcapping is None
    phi3 = read(**PHI3)
    assert (phi3.rms_norm_eps, phi3.fused_projections, phi3.rotary_dim) == (1e-5, True, 4)


def test_gemma_3s_rope_as_transformers_4_and_5_write_it() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    old = read(**GEMMA3, rope_theta=9.0, rope_local_base_freq=7.0, rope_scaling=linear)
    nested = {
        "full_attention": {**linear, "rope_theta": 9.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 7.0},
    }
    assert read(**GEMMA3, rope_parameters=nested) == old
    assert (old.rope_theta, old.rope_local_theta) == (9.0, 7.0)
    assert old.rope_scaling == RopeScaling(kind="linear", factor=8.0)


def test_attention_factors() -> None:
    """As YaRN's and LongRoPE's papers derive them from the growth of the context."""

    def factor(**fields: Any) -> float:
        scaling = read(max_position_embeddings=64, rope_scaling=fields).rope_scaling
        assert scaling is not None
        return scaling.attention_factor

    yarn = {"rope_type": "yarn", "factor": 4.0}
    assert factor(**yarn) == pytest.approx(0.1 * math.log(4) + 1)
    assert factor(**yarn, attention_factor=0.7) == 0.7
    assert factor(**yarn, mscale=1.0, mscale_all_dim=1.0) == pytest.approx(1.0)
    long = {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
    assert factor(**long) == 1.0
    grown = factor(**long, original_max_position_embeddings=16)
    assert grown == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))
    assert factor(**long, original_max_position_embeddings=16, factor=1.0) == 1.0


def test_experts_as_transformers_4_and_5_name_them() -> None:
    fields = {"model_type": "qwen3_moe", "num_key_value_heads": 2, "num_experts_per_tok": 2}
    assert read(**fields, num_experts=7) == read(**fields, num_local_experts=7)


def test_harmless_fields_are_harmless() -> None:
    extra = {"torch_dtype": "bfloat16", "use_cache": True, "pretraining_tp": 1, "logit_scale": None}
    assert read(**extra) == read()
    assert read(rope_interleaved=False, attention_dropout=0.0) == read()
    # What is in files on the hub beside the fields that transformers reads.
    moe = {"use_qk_norm": True, "shared_expert_intermediate_size": 0, "qkv_bias": False}
    assert read(**MOE, **moe, num_experts_per_tok=2) == read(**MOE, num_experts_per_tok=2)
    phi = {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False}
    assert read(**PHI3, **phi, sliding_window=None) == read(**PHI3)
    gemma = {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
    assert read(**GEMMA2, **gemma) == read(**GEMMA2)
    mixtral = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    assert read(**MIXTRAL, **mixtral) == read(**MIXTRAL)
    assert read(eos_token_id=3).eos_token_ids == (3,)
    assert read(eos_token_id=[3, 5]).eos_token_ids == (3, 5)


@pytest.mark.parametrize("case", list(tiny.CASES))
def test_to_hf_is_the_inverse(case: str) -> None:
    config = tiny.config(case)
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(tiny.config(case))
