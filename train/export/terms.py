"""An export in the terms of transformers, PEFT and servers."""

import json
from collections.abc import Sequence
from typing import Any

from lora_jax.buckets.store import bucket_path
from lora_jax.core.types import Fields, Model
from lora_jax.hf.coded import QUANTIZE_STORED
from lora_jax.models import EncoderConfig, QwenVLConfig, SmolVLMConfig, VisionConfig
from train.adapters.source import AdapterSource

# The quantization_config of transformers that makes the same codes.
_CONFIGS = {"nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")'}
_HEADS = {
    "classification": ("AutoModelForSequenceClassification", "text-classification"),
    "masked_lm": ("AutoModelForMaskedLM", "fill-mask"),
}
_OF_IMAGES: dict[type, tuple[str, str]] = {
    VisionConfig: ("AutoModelForImageClassification", "image-classification"),
    SmolVLMConfig: ("AutoModelForImageTextToText", "image-text-to-text"),
    QwenVLConfig: ("AutoModelForImageTextToText", "image-text-to-text"),
}


def task_type(model: Model, fields: Fields) -> str | None:
    """Returns PEFT's task type of the model; None if it has none.

    A classifier that does not train has none: with SEQ_CLS, PEFT would look for a trained head in
    the adapter's file. PEFT has none for images.
    """
    config = model.config
    if isinstance(config, VisionConfig):
        return None
    if not isinstance(config, EncoderConfig):
        return "CAUSAL_LM"
    if config.head == "classification":
        return "SEQ_CLS" if "classifier" in (fields["modules_to_save"] or ()) else None
    return None if config.head == "masked_lm" else "FEATURE_EXTRACTION"


def auto_class(model: Model) -> tuple[str, str]:
    """Returns the names of the transformers class that loads the model, and of its pipeline."""
    if type(model.config) in _OF_IMAGES:
        return _OF_IMAGES[type(model.config)]
    if not isinstance(model.config, EncoderConfig):
        return "AutoModelForCausalLM", "text-generation"
    return _HEADS.get(model.config.head, ("AutoModel", "feature-extraction"))


def loading_line(lora_jax_code: str, torch_code: str, folders: Sequence[str]) -> str:
    """Returns the line that says how to load an export.

    Args:
      lora_jax_code: the code for this library, which also reads folders in buckets.
      torch_code: the code for transformers and PEFT, which read folders on a disk alone.
      folders: the folders that the code reads, as they are shown.
    """
    in_buckets = [folder for folder in folders if bucket_path(folder)]
    if not in_buckets:
        return f"load it with: {torch_code}"
    return (
        f"load it with: {lora_jax_code}. transformers and PEFT cannot read a bucket: for them, "
        f"copy the folder to a disk (gcloud storage cp -r {' '.join(in_buckets)} FOLDER)"
    )


def loading_config(codes: str | None) -> str | None:
    """Returns the Python code that has transformers load a base in these codes; None for none.

    Args:
      codes: the value of --quantize that the adapter was trained with.
    """
    return _CONFIGS.get(codes) if codes else None


def codes_notice(codes: str, base: str) -> str:
    """Returns a notice about serving an adapter that was trained over a base in codes.

    Args:
      codes: the value of --quantize that it was trained with.
      base: the name of the base.
    """
    if codes == QUANTIZE_STORED:
        return f"it was trained over the codes that {base} is published in: serve it over the same"
    config = loading_config(codes)
    remedy = f"load it with quantization_config={config}, or " if config else ""
    return (
        f"it was trained over {codes} codes, and a server that loads {base} in floats sees other "
        f"kernels beneath it: {remedy}write the whole model with --merged"
    )


def scaled_fields(adapter: AdapterSource, model: Model) -> dict[str, Any]:
    """Returns the fields of config.json that differ from the base's if the run scaled RoPE.

    PEFT's files have no field for it.
    """
    if adapter.rope_scaling is None:
        return {}
    written = model.config.to_hf()
    theta = {"rope_theta": written["rope_theta"]}
    return {
        "rope_parameters": written["rope_scaling"] | theta,
        "max_position_embeddings": written["max_position_embeddings"],
    }


def loading_options(adapter: AdapterSource, model: Model) -> dict[str, Any]:
    """Returns the keywords with which transformers loads the base of a PEFT adapter.

    They are the number of classes, which the base's config.json need not have, and the fields of a
    scaled RoPE.
    """
    config = model.config
    classes = getattr(config, "head", None) == "classification"
    return ({"num_labels": config.num_labels} if classes else {}) | scaled_fields(adapter, model)


def rope_problems(adapter: AdapterSource, model: Model) -> list[str]:
    """Returns the line of --check-serving about a scaled RoPE, if there is one."""
    scaled = scaled_fields(adapter, model)
    if not scaled:
        return []
    return [
        "the adapter was trained with a scaled RoPE, and the base's config.json has another: "
        f"serve it with --hf-overrides '{json.dumps(scaled)}', or write a whole model with --merged"
    ]
