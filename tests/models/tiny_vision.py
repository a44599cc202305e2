"""Tiny vision models, with random weights under which every option matters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.hf.keys import nest_leaves
from lora_jax.models import VisionEncoder, key_table, read_config
from tests.models import tiny_encoders
from tests.support import array

# No two sizes are equal.
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_channels": 2,
}
# Case -> the fields of config.json. Every option has a value other than its default somewhere.
CASES: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", "intermediate_size": 37, "image_size": 20, "patch_size": 5},
    "vit of oblong images and patches": {
        "model_type": "vit",
        "intermediate_size": 41,
        "image_size": [12, 35],
        "patch_size": [4, 7],
        "qkv_bias": False,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 0.3,
    },
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 3, "image_size": 20, "patch_size": 5},
    "dinov2 of oblong images": {
        "model_type": "dinov2",
        "mlp_ratio": 2,
        "image_size": 16,
        "patch_size": 4,
        "hidden_act": "relu",
        "layer_norm_eps": 0.3,
        "num_attention_heads": 4,
    },
}
LABELS = 3


def fields(case: str) -> dict[str, Any]:
    """The config.json of a case."""
    return {**VISION, **CASES[case]}


def config(case: str, head: str = "classification") -> Any:
    more = {"num_labels": LABELS} if head == "classification" else {}
    return read_config(fields(case), head=head, **more)


def model(case: str, head: str = "classification", **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """A model and its parameters, all of them random and far from their defaults."""
    read = config(case, head)
    rng = np.random.default_rng(5)
    leaves = ((row.path, _drawn(rng, row.path, row.stacked_shape)) for row in key_table(read))
    return VisionEncoder(read, **kwargs), nest_leaves(leaves)


def _drawn(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> jax.Array:
    if path.endswith("projection/kernel"):
        return array(rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)
    return array(tiny_encoders.draw(rng, path, shape), jnp.float32)


def pixels(case: str, *, n: int = 2, size: tuple[int, int] | None = None) -> np.ndarray:
    """Random pixel values, [n, channels, height, width], of the configuration's size by default."""
    read = config(case)
    shape = (n, read.num_channels, *(size or read.image_size))
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("model", "return_hidden"))
def run(model: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """model.apply, compiled."""
    return model.apply({"params": params}, *args, **kwargs)
