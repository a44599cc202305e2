"""The families of decoders, by ``model_type``."""

from typing import Any

from lora_jax.hf.fields import ConfigError
from lora_jax.models.decoder.families import gemma, llama, mistral, phi, qwen
from lora_jax.models.decoder.families.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        llama.LLAMA,
        mistral.MISTRAL,
        mistral.MIXTRAL,
        qwen.QWEN2,
        qwen.QWEN3,
        qwen.QWEN3_MOE,
        gemma.GEMMA2,
        gemma.GEMMA3,
        phi.PHI3,
    )
}


def family_of(model_type: Any) -> Family:
    """Returns the family of a model_type.

    Raises:
      ConfigError: for an unknown model_type; lists the known ones.
    """
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
