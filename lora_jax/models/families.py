"""What there is for each ``model_type``: its configuration, its module, its key table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flax import linen as nn

from lora_jax.models.config import DecoderConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_fields import FAMILIES as DECODERS
from lora_jax.models.decoder_keys import decoder_parts, decoder_table
from lora_jax.models.fields import ConfigError
from lora_jax.models.keys import Part, Row


class Config(Protocol):
    """A family's configuration: hashable, and read from and written as a config.json."""

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the family."""
        ...

    def to_hf(self) -> dict[str, Any]:
        """The config.json that reads back as this configuration."""
        ...


@dataclasses.dataclass(frozen=True)
class Family:
    """What reads, runs and names the parameters of a model.

    Attributes:
      read: from the parsed config.json to the configuration.
      module: called as ``module(config, dtype, param_dtype, remat=…)``.
      table: every parameter of a configuration; see ``keys.Row``.
      parts: the table's tensors that a file, of such names and shapes, holds within others.
    """

    read: Callable[[Mapping[str, Any]], Any]
    module: type[nn.Module]
    table: Callable[[Any], list[Row]]
    parts: Callable[[Any, Mapping[str, tuple[int, ...]]], dict[str, Part]] = lambda *_: {}


_DECODERS = Family(DecoderConfig.from_hf, Decoder, decoder_table, decoder_parts)

FAMILIES: dict[str, Family] = dict.fromkeys(DECODERS, _DECODERS)


def family_of(model_type: Any) -> Family:
    """The family of a model_type; ConfigError where there is none."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def read_config(fields: Mapping[str, Any]) -> Any:
    """The configuration that a parsed config.json describes.

    Raises ConfigError that names what is missing, unsupported or unknown.
    """
    return family_of(fields.get("model_type")).read(fields)


def key_table(config: Config) -> list[Row]:
    """Every parameter of the model, once, in the order of the forward pass."""
    return family_of(config.model_type).table(config)


def parts(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """The table's tensors that a file, of such names and shapes, holds within others."""
    return family_of(config.model_type).parts(config, shapes)
