"""The tokenizer of a model, or the one that --tokenizer names in its place."""

from typing import Any

from lora_jax import models
from lora_jax.hf.format import ModelConfig
from lora_jax.hf.packaged import BUNDLES
from lora_jax.hf.tokenizer import load_tokenizer, tokenizer_path
from lora_jax.hf.vision.readers import reads_images
from train.console.errors import UserError, as_user_errors

MODEL_ERRORS = (models.ConfigError, models.WeightsError, models.ModelNotFound)


def read_tokenizer(
    name: str, given: str | None, config: ModelConfig, model_option: str = "--model"
) -> Any:
    """Reads the tokenizer of a model, or another one that is to take its place.

    Args:
      name: the model.
      given: the option --tokenizer, None for the model's own.
      config: the model's configuration.
      model_option: the option that names the model, for messages.

    Raises:
      UserError: it cannot be read, or has tokens that the model lacks.
    """
    if given is None:
        option, other = f"{model_option} {name}", "; or name another with --tokenizer"
    else:
        option, other = f"--tokenizer {given}", ""
        if reads_images(config):
            raise UserError(
                f"{option}: {model_option} {name} writes images with its own tokenizer alone"
            )
    with as_user_errors(*MODEL_ERRORS, prefix=f"{option}: ", suffix=other):
        if given in BUNDLES:
            models.fetch(given)
        tokenizer = load_tokenizer(name if given is None else tokenizer_path(given))
    if not tokenizer.is_fast:
        raise UserError(f"{option}: its tokenizer has no fast version (tokenizer.json)")
    last = max(tokenizer.get_vocab().values())
    if given is not None and last >= (size := getattr(config, "vocab_size", 0)):
        raise UserError(
            f"{option} has tokens up to {last:,}, and the vocabulary of {model_option} {name} "
            f"ends at {size - 1:,}: name the tokenizer that the model was trained with"
        )
    return tokenizer
