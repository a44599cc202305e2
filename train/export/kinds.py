"""The names that transformers and PEFT have for kinds of models."""

from collections.abc import Mapping
from typing import Any

from lora_jax.models import EncoderConfig


def task_type(model: Any, fields: Mapping[str, Any]) -> str | None:
    """Returns PEFT's task type of the model; None if it has none.

    A classifier that does not train has none: with SEQ_CLS, PEFT would look for a trained head in
    the adapter's file.
    """
    config = model.config
    if not isinstance(config, EncoderConfig):
        return "CAUSAL_LM"
    if config.head == "classification":
        return "SEQ_CLS" if "classifier" in (fields["modules_to_save"] or ()) else None
    return None if config.head == "masked_lm" else "FEATURE_EXTRACTION"


def auto_class(model: Any) -> str:
    """Returns the name of the transformers class that loads the model."""
    if not isinstance(model.config, EncoderConfig):
        return "AutoModelForCausalLM"
    heads = {
        "classification": "AutoModelForSequenceClassification",
        "masked_lm": "AutoModelForMaskedLM",
    }
    return heads.get(model.config.head, "AutoModel")
