"""What there is for each ``model_type``: its configuration, its module, its key table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flax import linen as nn

from lora_jax.hf.fields import ConfigError
from lora_jax.hf.keys import Part, Row
from lora_jax.models import specs
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.fields import FAMILIES as DECODERS
from lora_jax.models.decoder.keys import decoder_parts, decoder_table
from lora_jax.models.decoder.model import Decoder
from lora_jax.models.encoder import config as encoder_config
from lora_jax.models.encoder.config import EncoderConfig
from lora_jax.models.encoder.keys import OTHER_HEADS, encoder_name, encoder_table
from lora_jax.models.encoder.model import Encoder
from lora_jax.models.gpt2.config import GPT2Config
from lora_jax.models.gpt2.keys import gpt2_name, gpt2_table
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.specs import Specs


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
      read: from the parsed config.json, and options by keyword, to the configuration.
      module: called as ``module(config, dtype, param_dtype, remat=…)``.
      table: every parameter of a configuration; see ``keys.Row``.
      specs: how its parameters lie on a mesh; see ``specs``.
      parts: the table's tensors that a file, of such names and shapes, holds within others.
      options: what ``read`` takes by keyword.
      name: (a file's name for a tensor, configuration) -> the table's name for it.
      ignored: tensors of other heads than the configuration's, which a file may hold.
    """

    read: Callable[..., Any]
    module: type[nn.Module]
    table: Callable[[Any], list[Row]]
    specs: Specs
    parts: Callable[[Any, Mapping[str, tuple[int, ...]]], dict[str, Part]] = lambda *_: {}
    options: frozenset[str] = frozenset()
    name: Callable[[str, Any], str] = lambda name, config: name
    ignored: re.Pattern[str] | None = None


_DECODERS = Family(DecoderConfig.from_hf, Decoder, decoder_table, specs.DECODER, decoder_parts)

_ENCODERS = Family(
    EncoderConfig.from_hf,
    Encoder,
    encoder_table,
    specs.ENCODER,
    options=encoder_config.OPTIONS,
    name=encoder_name,
    ignored=OTHER_HEADS,
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(DECODERS, _DECODERS),
    **dict.fromkeys(encoder_config.FAMILIES, _ENCODERS),
    "gpt2": Family(GPT2Config.from_hf, GPT2, gpt2_table, specs.GPT2, name=gpt2_name),
}


def family_of(model_type: Any) -> Family:
    """The family of a model_type; ConfigError where there is none."""
    if model_type not in FAMILIES:
        raise ConfigError(
            f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def read_config(fields: Mapping[str, Any], **options: Any) -> Any:
    """The configuration that a parsed config.json describes.

    Args:
      fields: the parsed config.json.
      **options: what to read it as, such as ``head="classification"``; see ``EncoderConfig``.

    Raises:
      ConfigError: names what is missing, unsupported or unknown, in the file or the options.
    """
    model_type = fields.get("model_type")
    family = family_of(model_type)
    if unknown := sorted(set(options) - family.options):
        raise ConfigError(f"a {model_type} model has no option {', '.join(unknown)}")
    return family.read(fields, **options)


def key_table(config: Config) -> list[Row]:
    """Every parameter of the model, once, in the order of the forward pass."""
    return family_of(config.model_type).table(config)


def partition_specs(config: Config) -> Specs:
    """How the model's parameters lie on a mesh: a table for ``lora_jax.sharding``.

    Of each line, the regular expression is for the whole path, and the spec for the last axes.
    """
    return family_of(config.model_type).specs


def parts(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """The table's tensors that a file, of such names and shapes, holds within others."""
    return family_of(config.model_type).parts(config, shapes)
