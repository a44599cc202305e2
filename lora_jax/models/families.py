"""The families of models, by ``model_type``: module, file format, place on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from lora_jax.hf.format import Config, Format, Formats
from lora_jax.hf.keys import Row
from lora_jax.models import specs
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import Experts, check_experts
from lora_jax.models.decoder.fields import FAMILIES as DECODERS
from lora_jax.models.decoder.gguf import config_from_gguf
from lora_jax.models.decoder.keys import decoder_parts, decoder_table
from lora_jax.models.decoder.model import Decoder
from lora_jax.models.encoder import config as encoder_config
from lora_jax.models.encoder.config import EncoderConfig
from lora_jax.models.encoder.keys import OTHER_HEADS, encoder_name, encoder_table
from lora_jax.models.encoder.model import Encoder
from lora_jax.models.gpt2.config import GPT2Config
from lora_jax.models.gpt2.keys import gpt2_name, gpt2_table
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.layers.attend import Attend
from lora_jax.models.specs import Specs


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      module: see ``module_of``.
      specs: how its parameters are sharded; see ``specs``.
      format: how files hold its configuration and parameters.
    """

    module: type[nn.Module]
    specs: Specs
    format: Format


_DECODERS = Family(
    Decoder, specs.DECODER, Format(DecoderConfig.from_hf, decoder_table, decoder_parts)
)

_ENCODERS = Family(
    Encoder,
    specs.ENCODER,
    Format(
        EncoderConfig.from_hf,
        encoder_table,
        options=encoder_config.OPTIONS,
        name=encoder_name,
        ignored=OTHER_HEADS,
    ),
)

_GPT2 = Family(GPT2, specs.GPT2, Format(GPT2Config.from_hf, gpt2_table, name=gpt2_name))

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(DECODERS, _DECODERS),
    **dict.fromkeys(encoder_config.FAMILIES, _ENCODERS),
    "gpt2": _GPT2,
}

FORMATS = Formats({name: family.format for name, family in FAMILIES.items()}, config_from_gguf)


def family_of(model_type: Any) -> Family:
    """Returns the family of a model_type.

    Raises:
      ConfigError: for an unknown model_type; lists the known ones.
    """
    FORMATS.of(model_type)  # raises
    return FAMILIES[model_type]


def module_of(
    config: Any,
    dtype: Any,
    param_dtype: Any,
    *,
    remat: bool | str = False,
    attention: str | Attend = "auto",
    experts: str | Experts = "auto",
) -> Any:
    """Makes a configuration's module.

    Args:
      config: of any family.
      dtype, param_dtype, remat, attention, experts: see ``Decoder``.

    Raises:
      ConfigError: if ``experts`` are given for a model without experts.
    """
    check_experts(config, experts)
    module = family_of(config.model_type).module
    more = {"experts": experts} if module is Decoder else {}
    return module(config, dtype, param_dtype, remat=remat, attention=attention, **more)


def read_config(fields: Mapping[str, Any], **options: Any) -> Any:
    """Reads a configuration from a parsed config.json.

    Args:
      fields: the parsed config.json.
      **options: the reader's keywords, such as ``head="classification"``; see ``EncoderConfig``.

    Returns:
      The family's configuration.

    Raises:
      ConfigError: names what is missing, unsupported or unknown, in the file or the options.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> config.hidden_size
    8
    """
    return FORMATS.read_config(fields, **options)


def key_table(config: Config) -> list[Row]:
    """Returns every parameter of the model, once, in the order of the forward pass.

    Args:
      config: the configuration of a model of ``lora_jax.models``.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> models.key_table(config)[0].hf
    'transformer.wte.weight'
    """
    return family_of(config.model_type).format.table(config)


def partition_specs(config: Config) -> Specs:
    """Returns how parameters are sharded over a mesh: a table for ``lora_jax.sharding``.

    Each line has a regular expression for the whole path, and the spec of the last axes.

    Args:
      config: the configuration of a model of ``lora_jax.models``.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> len(models.partition_specs(config)) > 0
    True
    """
    return family_of(config.model_type).specs
