"""The keys of the tensors in adapter_model.safetensors, for each array of each module."""

import dataclasses
from collections.abc import Collection

from lora_jax.peft.modules import Module
from lora_jax.variants import VARIANTS

WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
# The parts that PEFT's LoRA has, too, by name: a vector [out] for each adapted module.
VECTOR_PARTS = {part.name: v.in_peft for v in VARIANTS if v.in_peft for part in v.parts}


@dataclasses.dataclass(frozen=True)
class TensorKeys:
    """The keys of one adapted module.

    PEFT's A is [r, in] and its B is [out, r] for embeddings, linear layers and GPT-2's Conv1D. A
    part of a variant, by its name in `vectors`, is [out].
    """

    a: str
    b: str
    vectors: dict[str, str]
    base_weight: str


def keys_of(module: Module) -> TensorKeys:
    """Returns the keys of an adapted module."""
    stem = f"{KEY_PREFIX}{module.name}"
    is_embedding = module.is_embedding
    return TensorKeys(
        a=f"{stem}.lora_embedding_A" if is_embedding else f"{stem}.lora_A.weight",
        b=f"{stem}.lora_embedding_B" if is_embedding else f"{stem}.lora_B.weight",
        vectors={name: f"{stem}.{vector.tensor}" for name, vector in VECTOR_PARTS.items()},
        base_weight=f"{stem}.base_layer.weight",
    )


def token_key(name: str) -> str:
    """Returns the key of an embedding's trained rows, stored as values rather than changes."""
    return f"{KEY_PREFIX}{name}.token_adapter.trainable_tokens_delta"


def bias_key(name: str, adapted: Collection[str]) -> str:
    """Returns the key of a trained bias, which is inside the wrapper of an adapted module."""
    module = name.removesuffix(".bias")
    return f"{KEY_PREFIX}{module}.base_layer.bias" if module in adapted else f"{KEY_PREFIX}{name}"


def exact_name_pattern(name: str) -> str:
    """Returns a rank_pattern key that matches only this module."""
    return "^" + name.replace(".", r"\.")


def as_peft_number(value: float) -> float | int:
    """Returns an alpha as PEFT writes it: as an integer if it equals one in fp32."""
    integer = round(value)
    is_integer = abs(value - integer) <= 1e-5 * max(1.0, abs(value))
    return integer if is_integer else value
