"""Kinds of parameters: the part of the model that each belongs to, by its key table."""

from __future__ import annotations

from lora_jax.hf.format import Config
from lora_jax.hf.keys import Kind
from lora_jax.models.families import key_table


def kinds(config: Config) -> dict[str, Kind]:
    """Returns the kind of each parameter, by path, in the order of the forward pass.

    `lora_jax.lorafy` uses them where a rule's targets are a preset:
    ``lorafy(params, [LoraRule(targets="attention")], kinds=kinds(model.config))``.

    Args:
      config: the configuration of a model of ``lora_jax.models``.

    Returns:
      Path -> kind, such as "attention"; biases have the kind of their kernel.

    >>> from lora_jax import models
    >>> config = models.read_config({"model_type": "gpt2", "n_embd": 8, "n_head": 2})
    >>> models.kinds(config)["transformer/h/attn/c_attn/kernel"]
    'attention'
    """
    return {row.path: row.kind for row in key_table(config) if row.kind is not None}
