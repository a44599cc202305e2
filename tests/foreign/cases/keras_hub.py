"""KerasHub on JAX: small backbones with random weights; nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from tests.foreign.case import Case, Made
from tests.foreign.cases.keras import keras, made
from tests.support import array

IDS = array([[3, 0, 9, 3, 10], [1, 5, 2, 2, 7]])
MASK = jnp.ones_like(IDS).at[1, -1].set(0)


def _case(model: str, weights: int, name: str, sizes: dict[str, Any], **more: Any) -> Case:
    def make() -> Made:
        keras()
        import keras_hub

        backbone = getattr(keras_hub.models, name)(**sizes)
        inputs = {"token_ids": IDS, "padding_mask": MASK, **more}
        return made(backbone, inputs)

    return Case("keras-hub", model, "stateless_call", weights, make)


def _of(*names: str) -> Callable[..., dict[str, Any]]:
    return lambda *sizes: dict(zip(names, sizes, strict=True))


_DECODER = _of(
    "vocabulary_size",
    "num_layers",
    "num_query_heads",
    "num_key_value_heads",
    "hidden_dim",
    "intermediate_dim",
)

CASES = (
    _case(
        "BertBackbone, two layers",
        15,
        "BertBackbone",
        {
            "vocabulary_size": 37,
            "num_layers": 2,
            "num_heads": 2,
            "hidden_dim": 14,
            "intermediate_dim": 22,
            "max_sequence_length": 13,
        },
        segment_ids=jnp.zeros_like(IDS),
    ),
    _case("LlamaBackbone, two layers", 15, "LlamaBackbone", _DECODER(37, 2, 2, 1, 12, 22)),
    _case(
        "GemmaBackbone, two layers",
        15,
        "GemmaBackbone",
        {**_DECODER(37, 2, 2, 1, 12, 22), "head_dim": 8},
    ),
)
