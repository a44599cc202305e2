"""The families of decoders, by ``model_type``."""

from lora_jax.models.decoder.families import (
    deepseek,
    gemma,
    glm,
    gpt_oss,
    granite,
    llama,
    mistral,
    olmo,
    phi,
    qwen,
    smollm,
)
from lora_jax.models.decoder.families.family import DecoderFamily

_ALL = (
    llama.LLAMA,
    mistral.MISTRAL,
    mistral.MIXTRAL,
    mistral.MINISTRAL3,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen.QWEN3_MOE,
    qwen.QWEN3_NEXT,
    qwen.QWEN3_5,
    qwen.QWEN3_5_MOE,
    gemma.GEMMA2,
    gemma.GEMMA3,
    gemma.GEMMA4,
    phi.PHI3,
    smollm.SMOLLM3,
    olmo.OLMO2,
    olmo.OLMO3,
    granite.GRANITE,
    gpt_oss.GPT_OSS,
    glm.GLM4_MOE,
    deepseek.DEEPSEEK_V3,
)

FAMILIES: dict[str, DecoderFamily] = {
    name: family for family in _ALL for name in (family.model_type, *family.other_types)
}
