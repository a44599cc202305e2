"""Tiny decoders of every family, and random weights under which every option matters."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lora_jax.models import Decoder, DecoderConfig, hf_tensors, key_table

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

# Case -> the fields of config.json, as transformers 5 names them.
CASES: dict[str, dict[str, Any]] = {
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
}


def fields(case: str) -> dict[str, Any]:
    """The config.json of a case."""
    return {**SIZES, **CASES[case]}


def config(case: str) -> DecoderConfig:
    return DecoderConfig.from_hf(fields(case))


def decoder(case: str, **kwargs: Any) -> tuple[Decoder, dict[str, Any]]:
    """A model of the case and its parameters, all of them random and far from their defaults."""
    model = Decoder(config(case), **kwargs)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves, treedef = jax.tree.flatten_with_path(shapes)
    rng = np.random.default_rng(5)
    values = [
        jnp.asarray(draw(rng, jax.tree_util.keystr(path), leaf.shape), leaf.dtype)
        for path, leaf in leaves
    ]
    return model, jax.tree.unflatten(treedef, values)


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights: kernels keep the scale of their input, norms lie about 1."""
    values = rng.standard_normal(shape).astype(np.float32)
    if "norm" in name:
        return 1 + 0.4 * values
    if "bias" in name:
        return 0.7 * values
    return values if "embed" in name else values * np.float32(1.3 / np.sqrt(shape[-2]))


# Compiling takes most of the tests' time.
FAST_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 0}


@functools.partial(
    jax.jit, static_argnames=("model", "method", "return_hidden"), compiler_options=FAST_COMPILE
)
def run(model: Decoder, params: Any, *args: Any, **kwargs: Any) -> Any:
    """model.apply, compiled: equal models share it."""
    return model.apply({"params": params}, *args, **kwargs)


def tokens(seed: int, batch: int, seq: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (batch, seq), np.int32)


def write_folder(folder: Path, case: str, params: Any, **changes: Any) -> dict[str, np.ndarray]:
    """Writes config.json and model.safetensors; returns the tensors written."""
    tensors = dict(hf_tensors(params, key_table(config(case))))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**fields(case), **changes}))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def assert_close(got: Any, want: Any, tol: float = 1e-4) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = np.abs(got - want).max()
    assert error <= tol * max(1.0, np.abs(want).max()), f"max difference {error}"
