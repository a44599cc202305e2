"""Describes an export for transformers, PEFT and servers: classes, options and messages."""

import json
from collections.abc import Sequence
from typing import Any

from lora_jax.buckets.store import bucket_path
from lora_jax.core.types import Fields, Model
from lora_jax.hf.coded import QUANTIZE_STORED
from lora_jax.models import EncoderConfig, QwenVLConfig, SmolVLMConfig, VisionConfig
from train.adapters.source import AdapterSource

# The code of transformers' quantization_config for the same format, by the value of --quantize.
_QUANTIZATION_CONFIG_CODE = {
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")'
}
_CLASS_OF_HEAD = {
    "classification": ("AutoModelForSequenceClassification", "text-classification"),
    "masked_lm": ("AutoModelForMaskedLM", "fill-mask"),
}
_CLASS_OF_IMAGE_CONFIG: dict[type, tuple[str, str]] = {
    VisionConfig: ("AutoModelForImageClassification", "image-classification"),
    SmolVLMConfig: ("AutoModelForImageTextToText", "image-text-to-text"),
    QwenVLConfig: ("AutoModelForImageTextToText", "image-text-to-text"),
}


def task_type(model: Model, fields: Fields) -> str | None:
    """Returns PEFT's task type of the model, or None.

    A classifier whose head does not train has no task type: with SEQ_CLS, PEFT would look for a
    trained head in the adapter's file. PEFT has no task type for images.
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
    """Returns the names of transformers' class and of its pipeline for a model."""
    if type(model.config) in _CLASS_OF_IMAGE_CONFIG:
        return _CLASS_OF_IMAGE_CONFIG[type(model.config)]
    if not isinstance(model.config, EncoderConfig):
        return "AutoModelForCausalLM", "text-generation"
    return _CLASS_OF_HEAD.get(model.config.head, ("AutoModel", "feature-extraction"))


def describe_loading(lora_jax_code: str, torch_code: str, folders: Sequence[str]) -> str:
    """Returns the line that says how to load an export.

    Args:
      lora_jax_code: the code for this library, which also reads folders in buckets.
      torch_code: the code for transformers and PEFT, which read folders on a disk alone.
      folders: the folders that the code reads, as they are shown.
    """
    bucket_folders = [folder for folder in folders if bucket_path(folder)]
    if not bucket_folders:
        return f"Load it with: {torch_code}"
    return (
        f"Load it with: {lora_jax_code}. transformers and PEFT cannot read a bucket. For them, "
        f"copy the folder to a disk (gcloud storage cp -r {' '.join(bucket_folders)} FOLDER)."
    )


def quantization_config_code(codes: str | None) -> str | None:
    """Returns the Python code of transformers' quantization_config for a base, or None.

    Args:
      codes: the value of --quantize that the adapter was trained with.
    """
    return _QUANTIZATION_CONFIG_CODE.get(codes) if codes else None


def codes_notice(codes: str, base: str) -> str:
    """Returns a notice about serving an adapter that was trained over a quantized base.

    Args:
      codes: the value of --quantize that the adapter was trained with.
      base: the name of the base.
    """
    if codes == QUANTIZE_STORED:
        return (
            f"The adapter was trained over the quantized kernels of {base}. Serve it over the same "
            "files."
        )
    config = quantization_config_code(codes)
    remedy = "Write the whole model with --merged."
    if config:
        remedy = (
            f"Load it with quantization_config={config}, or write the whole model with --merged."
        )
    return (
        f"The adapter was trained over kernels quantized as {codes}. A server that loads {base} in "
        f"floats runs the adapter over slightly different kernels. {remedy}"
    )


def rope_config_fields(adapter: AdapterSource, model: Model) -> dict[str, Any]:
    """Returns the fields of config.json for the RoPE scaling of the adapter's run, or {}.

    PEFT's files have no field for it.
    """
    if adapter.rope_scaling is None:
        return {}
    config_fields = model.config.to_hf()
    rope_parameters = config_fields["rope_scaling"] | {"rope_theta": config_fields["rope_theta"]}
    return {
        "rope_parameters": rope_parameters,
        "max_position_embeddings": config_fields["max_position_embeddings"],
    }


def transformers_options(adapter: AdapterSource, model: Model) -> dict[str, Any]:
    """Returns the keywords with which transformers loads the base of a PEFT adapter.

    The keywords are the number of classes, which the base's config.json may lack, and the fields of
    a scaled RoPE.
    """
    config = model.config
    options: dict[str, Any] = {}
    if getattr(config, "head", None) == "classification":
        options["num_labels"] = config.num_labels
    return options | rope_config_fields(adapter, model)


def list_rope_problems(adapter: AdapterSource, model: Model) -> list[str]:
    """Returns the problem of --check-serving with a scaled RoPE, in a list, or []."""
    scaled = rope_config_fields(adapter, model)
    if not scaled:
        return []
    return [
        "The adapter was trained with a RoPE scaling that the base's config.json does not have. "
        f"Serve it with --hf-overrides '{json.dumps(scaled)}', or write a whole model with "
        "--merged."
    ]
