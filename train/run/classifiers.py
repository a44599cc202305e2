"""Reads the outline of a classifier: an encoder of texts or images with a head for classes."""

import dataclasses
import json
from typing import Any, Literal

from lora_jax import models
from lora_jax.models.encoder.config import FAMILIES as ENCODERS
from lora_jax.models.vision.config import FAMILIES as VISION
from train.console.errors import UserError
from train.run.model_code import open_model
from train.run.pretrained import ModelInfo, model_errors, read_tokenized, read_untokenized


def read_fields(name: str) -> dict[str, Any]:
    """Returns the fields of a model's config.json; {} for a GGUF file or a damaged config.json.

    Raises:
      UserError: the model cannot be found.
    """
    with model_errors(name):
        path = models.fetch(name)
    try:
        fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # the reader of the configuration reports what is wrong
    return fields if isinstance(fields, dict) else {}


def read_classifier_info(
    name: str,
    num_labels: int | None,
    of: Literal["texts", "images"] | None = "texts",
    tokenizer: str | None = None,
) -> ModelInfo:
    """Reads the outline of an encoder with a head for classes, as `read_model_info` does.

    Args:
      name: the model.
      num_labels: the number of classes; None for the number of the model's own head.
      of: the required inputs of the model; None for any.
      tokenizer: the tokenizer to use instead of the model's own; see --tokenizer.

    Raises:
      UserError: the model cannot be read, or is not such an encoder.
    """
    kind = read_fields(name).get("model_type")
    if kind is None:
        with model_errors(name):
            kind = open_model(models.fetch(name)).config.model_type
    inputs = _inputs_of_kind(kind)
    if inputs is None or of not in (None, inputs):
        raise UserError(
            f"--model {name} is a {kind} model, which cannot classify {of or 'anything'} here. "
            f"{_remedy(inputs)}"
        )
    head: dict[str, Any] = {"head": "classification"}
    if num_labels is not None:
        head["num_labels"] = num_labels
    if inputs == "texts":
        return read_tokenized(name, tokenizer, "--model", **head)
    if tokenizer is not None:
        raise UserError(
            f"--tokenizer {tokenizer} has no effect, because --model {name} reads images and no "
            "texts. Remove --tokenizer."
        )
    return _read_image_info(name, **head)


def _inputs_of_kind(kind: str) -> Literal["texts", "images"] | None:
    """Returns the inputs of a kind of encoder, texts or images; None for other models."""
    if kind in ENCODERS:
        return "texts"
    return "images" if kind in VISION else None


def _remedy(inputs: Literal["texts", "images"] | None) -> str:
    """Returns the advice of a message for a model that cannot classify the data.

    Args:
      inputs: the inputs of the model.
    """
    if inputs == "images":
        return (
            "It classifies images. Pass a folder of images with --dataset, or a field by --image."
        )
    if inputs == "texts":
        return "It classifies texts. Pass a ViT or DINOv2 for images."
    return "Pass a BERT, RoBERTa or XLM-RoBERTa model, or for images a ViT or DINOv2."


def _read_image_info(name: str, **head: Any) -> ModelInfo:
    """Returns the outline of an image classifier, with its image processor as the tokenizer."""
    outline: Any = read_untokenized(name, **head)
    with model_errors(name):
        processor = models.load_image_processor(name)
    config = outline.config
    channels, height, width = processor.shape
    has_patches = min(config.grid_of(height, width)) >= 1
    if channels != config.num_channels or not has_patches:
        raise UserError(
            f"--model {name}: preprocessor_config.json makes images of {channels} channels and "
            f"{height} x {width} pixels, but config.json needs {config.num_channels} channels and "
            f"patches of {config.patch_size} pixels. Use the two files of the same model."
        )
    return dataclasses.replace(outline, tokenizer=processor)
