"""Tiny encoders and GPT-2s, and the parts of their tests that differ from the decoder's."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lora_jax.models import hf_tensors, key_table, read_config
from lora_jax.models.families import family_of
from tests.models import tiny
from tests.support import array

# No two sizes are equal.
ENCODER: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 29,
    "type_vocab_size": 5,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 29,
    "bos_token_id": None,
    "eos_token_id": None,
}

# Case -> the fields of config.json. Every option has a value other than its default somewhere.
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert"},
    "bert with other options": {
        "model_type": "bert",
        "hidden_act": "gelu_new",
        "layer_norm_eps": 0.3,
        "pad_token_id": 7,
        "num_attention_heads": 4,
    },
    "roberta": {"model_type": "roberta", "layer_norm_eps": 1e-5, "type_vocab_size": 1},
    "roberta with other options": {
        "model_type": "roberta",
        "hidden_act": "relu",
        "layer_norm_eps": 0.3,
        "pad_token_id": 4,
    },
    "xlm-roberta": {"model_type": "xlm-roberta", "hidden_act": "quick_gelu"},
}
GPT2S: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 with other options": {
        "n_inner": 37,
        "activation_function": "gelu",
        "layer_norm_epsilon": 0.3,
        "scale_attn_weights": False,
        "tie_word_embeddings": False,
    },
    "gpt2 scaled by layer": {
        "activation_function": "relu",
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "n_inner": 41,
    },
}
HEADS: dict[str, dict[str, Any]] = {
    "none": {},
    "masked_lm": {},
    "classification": {"num_labels": 3},
    "embedding": {"pooling": "mean"},
}


def fields(case: str) -> dict[str, Any]:
    """The config.json of a case."""
    return {**ENCODER, **ENCODERS[case]} if case in ENCODERS else {**GPT2, **GPT2S[case]}


def config(case: str, head: str | None = None, **options: Any) -> Any:
    options = options if head is None else {"head": head, **HEADS[head], **options}
    return read_config(fields(case), **options)


def model(case: str, head: str | None = None, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """A model and its parameters, all of them random and far from their defaults."""
    read = config(case, head)
    module: Any = family_of(read.model_type).module(read, **kwargs)
    rng = np.random.default_rng(5)
    tree: dict[str, Any] = {}
    for path, leaf in init_shapes(module).items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array(draw(rng, path, leaf.shape), leaf.dtype)
    return module, tree


@functools.cache
def init_shapes(module: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """By path, what the module's init makes."""
    ids = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(shapes)
    }


def draw(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights: kernels keep the scale of their input, scales of norms lie about 1."""
    values = rng.standard_normal(shape).astype(np.float32)
    leaf = path.rsplit("/", 1)[-1]
    if leaf == "scale":
        return 1 + 0.4 * values
    if leaf == "kernel":
        return values * np.float32(1.3 / np.sqrt(shape[-2]))
    return 0.7 * values


def write_folder(
    folder: Path, fields: dict[str, Any], params: Any, config: Any
) -> dict[str, np.ndarray]:
    """Writes config.json and model.safetensors; returns the tensors written."""
    tensors = dict(hf_tensors(params, key_table(config)))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def tokens(seed: int, batch: int, seq: int, pad: int | None = None) -> np.ndarray:
    """Random ids; none of them is the padding's."""
    ids = tiny.tokens(seed, batch, seq)
    return ids if pad is None else np.where(ids == pad, pad + 1, ids)
