"""Presets of targets: a model's attention, MLPs, experts or linear layers, by its key table.

>>> from lora_jax import LoraRule, models
>>> config = models.read_config({"model_type": "gpt2", "n_embd": 8, "n_head": 2})
>>> models.presets(config)["attention"]
['transformer/h/attn/c_attn/kernel', 'transformer/h/attn/c_proj/kernel']
>>> rule = LoraRule(targets=models.presets(config)["attention"])
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_jax.hf.format import Config
from lora_jax.hf.keys import Role
from lora_jax.models.families import key_table

# The roles whose kernels each preset selects. Tables, heads and classifiers are in none.
PRESETS: Mapping[str, frozenset[Role]] = {
    "attention": frozenset({"attention"}),
    "mlp": frozenset({"mlp"}),
    "experts": frozenset({"experts"}),
    "all-linear": frozenset({"attention", "mlp", "experts", "router", "pooler", "transform"}),
}


def roles(config: Config) -> dict[str, Role]:
    """Returns the role of each parameter, by path, in the order of the forward pass.

    Args:
      config: the configuration of a model of ``lora_jax.models``.

    Returns:
      Path -> role, such as "attention"; biases have the role of their kernel.
    """
    return {row.path: row.role for row in key_table(config) if row.role is not None}


def presets(config: Config) -> dict[str, list[str]]:
    """Returns the paths of the kernels that each preset selects, as targets of a ``LoraRule``.

    - "attention": the projections of queries, keys, values and outputs.
    - "mlp": the projections of dense MLPs; none in a mixture of experts.
    - "experts": the stacked kernels of a mixture's experts; none without experts.
    - "all-linear": all of these with routers, BERT's pooler and the dense layer inside a masked
      language model's head: every kernel but the head's or the classifier's, as PEFT's.

    Args:
      config: the configuration of a model of ``lora_jax.models``.

    Returns:
      Preset -> paths in the order of the forward pass; [] where the model has no such kernel.
    """
    kernels = [(row.path, row.role) for row in key_table(config) if len(row.shape) == 2]
    return {
        preset: [path for path, role in kernels if role in selected]
        for preset, selected in PRESETS.items()
    }
