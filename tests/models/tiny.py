"""Tiny decoders of every family, and random weights under which every option matters."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import lora_jax as lj
from lora_jax.models import Decoder, DecoderConfig, hf_tensors, key_table
from tests.models import tiny_stacks

# No two sizes are equal, but for hidden = heads * head_dim where a family allows nothing else.
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}

YARN = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 300.0,
    "short_factor": [1.0, 1.3, 1.9, 2.2, 3.0],
    "long_factor": [1.5, 2.7, 4.0, 6.0, 9.0],
}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 5.0}

DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 9,
    "linear_key_head_dim": 7,
    "linear_value_head_dim": 5,
}

MIXTURE = {
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 13,
    "shared_expert_intermediate_size": 11,
}

# Case -> the fields of config.json, as transformers 5 names them.
CASES: dict[str, dict[str, Any]] = {
    **tiny_stacks.CASES,
    "llama2": {"model_type": "llama", "num_key_value_heads": 6, "head_dim": 4},
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-2},
    "linear rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 777.0},
    },
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True, "hidden_act": "gelu"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 4},
    "ministral3": {
        "model_type": "ministral3",
        "sliding_window": 6,
        "rope_parameters": {
            **YARN,
            "original_max_position_embeddings": 4,
            "max_position_embeddings": 64,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            "llama_4_scaling_beta": 0.6,
        },
    },
    "qwen2": {"model_type": "qwen2", "hidden_act": "gelu_pytorch_tanh"},
    "qwen2 with some windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3 with biases and layer types": {
        "model_type": "qwen3",
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "yarn": {
        "model_type": "qwen3",
        "rope_parameters": {**YARN, "original_max_position_embeddings": 16},
    },
    "yarn with every option": {
        "model_type": "llama",
        "rope_parameters": {
            **YARN,
            "original_max_position_embeddings": 20,
            "beta_fast": 2.0,
            "beta_slow": 0.3,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
            "truncate": False,
        },
    },
    "short longrope": {
        "model_type": "llama",
        "rope_parameters": {**LONG, "original_max_position_embeddings": 32, "factor": 5.0},
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5},
    "mixtral with a window": {
        "model_type": "mixtral",
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "sliding_window": 4,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
    },
    "qwen3 moe": {
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 13,
    },
    "qwen3 moe with every option": {
        "model_type": "qwen3_moe",
        "num_experts": 7,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 13,
        "norm_topk_prob": True,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": 4,
        "query_pre_attn_scalar": 7,
        "tie_word_embeddings": False,
        **CAPS,
    },
    "gemma2 without caps": {
        "model_type": "gemma2",
        "sliding_window": 3,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "relu",
        "attention_bias": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 7,
        "rope_theta": 900.0,
        "rope_local_base_freq": 40.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "gemma3 with every option": {
        "model_type": "gemma3_text",
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {**YARN, "original_max_position_embeddings": 16},
            "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
        },
        "final_logit_softcapping": 5.0,
        "attention_bias": True,
        "hidden_activation": "silu",
        "tie_word_embeddings": False,
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "smollm3 with every option": {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0},
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "olmo2": {"model_type": "olmo2", "rope_theta": 777.0, "head_dim": 4},
    "olmo3": {
        "model_type": "olmo3",
        "sliding_window": 4,
        "head_dim": 4,
        "num_hidden_layers": 4,
        "attention_bias": True,
        "rope_parameters": {
            "full_attention": {**YARN, "original_max_position_embeddings": 16},
            "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
        },
    },
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.3,
        "attention_bias": True,
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "intermediate_size": 14,
        "num_hidden_layers": 4,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
        "swiglu_limit": 0.7,
        "rope_parameters": {
            **YARN,
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
        "max_position_embeddings": 512,
    },
    "gpt-oss with other options": {
        "model_type": "gpt_oss",
        "intermediate_size": 14,
        "num_local_experts": 3,
        "num_experts_per_tok": 3,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "swiglu_limit": 0.4,
        "swiglu_alpha": 1.1,
        "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
        "tie_word_embeddings": True,
    },
    "qwen3-next": {
        "model_type": "qwen3_next",
        "num_hidden_layers": 6,
        "full_attention_interval": 3,
        **DELTA,
        **MIXTURE,
        "norm_topk_prob": False,
        "partial_rotary_factor": 0.5,
    },
    "qwen3.5 moe": {
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        **DELTA,
        **MIXTURE,
    },
    "qwen3.5": {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 6,
        "full_attention_interval": 3,
        **DELTA,
    },
    "qwen3.5 with every option": {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 4,
        "layer_types": [f"{kind}_attention" for kind in ("linear", "full", "full", "linear")],
        **DELTA,
        "linear_conv_kernel_dim": 3,
        "rope_parameters": {
            **YARN,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 16,
            "mrope_section": [1, 1, 1],
            "mrope_interleaved": True,
        },
        "attention_bias": True,
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
    },
    "phi3": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.6,
        "original_max_position_embeddings": 64,
    },
    "phi3 with a long context": {
        "model_type": "phi3",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "original_max_position_embeddings": 8,
        "rope_parameters": {
            **LONG,
            "partial_rotary_factor": 0.75,
            "short_factor": LONG["short_factor"][:3],
            "long_factor": LONG["long_factor"][:3],
        },
        "sliding_window": 6,
        "tie_word_embeddings": True,
    },
}


# The cases beyond one of each family: they differ from it in options that change no file's layout.
VARIED = [
    case
    for i, (case, own) in enumerate(CASES.items())
    if own["model_type"] in [other["model_type"] for other in [*CASES.values()][:i]]
]


def fields(case: str) -> dict[str, Any]:
    """The config.json of a case."""
    return {**SIZES, **CASES[case]}


def config(case: str) -> DecoderConfig:
    return DecoderConfig.from_hf(fields(case))


def decoder(case: str, **kwargs: Any) -> tuple[Decoder, dict[str, Any]]:
    """A model of the case and its parameters, all of them random and far from their defaults."""
    model = Decoder(config(case), **kwargs)
    leaves, treedef = shapes(case, model.param_dtype)
    rng = np.random.default_rng(5)
    values = [
        jax.device_put(np.asarray(draw(rng, path, leaf.shape), leaf.dtype)) for path, leaf in leaves
    ]
    return model, jax.tree.unflatten(treedef, values)


@functools.cache
def shapes(case: str, param_dtype: Any = jnp.float32) -> tuple[list[tuple[str, Any]], Any]:
    """Returns (path, shape and dtype) of each leaf of init's tree, and its structure."""
    model = Decoder(config(case), param_dtype=param_dtype)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves, treedef = jax.tree.flatten_with_path(tree)
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]
    return named, treedef


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights: kernels keep the scale of their input, norms lie about 1."""
    values = rng.standard_normal(shape).astype(np.float32)
    if "norm" in name or "scal" in name:
        return 1 + 0.4 * values
    if "bias" in name or "A_log" in name:
        return 0.7 * values
    if "sinks" in name:
        return 2 * values
    return values if "embed" in name else values * np.float32(1.3 / np.sqrt(shape[-2]))


# Compiling takes most of the tests' time.
FAST_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}


@functools.partial(
    jax.jit, static_argnames=("model", "method", "return_hidden"), compiler_options=FAST_COMPILE
)
def run(model: Decoder, params: Any, *args: Any, **kwargs: Any) -> Any:
    """model.apply, compiled: equal models share it."""
    return model.apply({"params": params}, *args, **kwargs)


def greedy_loop(model: Any, params: Any, prompt: np.ndarray, steps: int) -> np.ndarray:
    """Without a cache: one whole forward pass per token, over a buffer of fixed length."""
    ids = np.zeros((1, len(prompt) + steps), np.int32)
    ids[0, : len(prompt)] = prompt
    for i in range(len(prompt), ids.shape[1]):
        ids[0, i] = np.argmax(np.asarray(run(model, params, ids))[0, i - 1])
    return ids[0, len(prompt) :]


def tokens(seed: int, batch: int, seq: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (batch, seq), np.int32)


def write_folder(folder: Path, case: str, params: Any, **changes: Any) -> dict[str, np.ndarray]:
    """Writes config.json and model.safetensors; returns the tensors written."""
    tensors = dict(hf_tensors(params, key_table(config(case))))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**fields(case), **changes}))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def assert_same_logits(model: Any, params: Any, reference: Any) -> None:
    """The logits of a tree, of codes too, are those of transformers' model."""
    import torch

    ids = tokens(1, 2, 9)
    got = jax.jit(lj.adapt(model.apply))({"params": params}, ids)
    with torch.no_grad():
        want = reference(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    assert np.abs(want).max() > 0.1
    assert_close(got, want, 1e-4)


def assert_close(got: Any, want: Any, tol: float = 1e-4) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.abs(got - want).max()
    assert error <= tol * max(1.0, np.abs(want).max()), f"max difference {error}"
