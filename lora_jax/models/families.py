"""The model families, by ``model_type``: module, file format, and PEFT's default targets."""

import dataclasses
import functools
import operator
from typing import Any

from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lora_jax.core.types import Fields, Tree
from lora_jax.hf.fields import check_supported
from lora_jax.hf.format import ModelConfig, ModelFormat, ModelFormats
from lora_jax.hf.keys import Kind, Row
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import IN_CODES, Experts, check_experts
from lora_jax.models.decoder.families.family import DecoderFamily
from lora_jax.models.decoder.families.registry import FAMILIES as DECODERS
from lora_jax.models.decoder.gguf import gguf_layout
from lora_jax.models.decoder.keys import decoder_name, decoder_parts, decoder_table
from lora_jax.models.decoder.model import Decoder
from lora_jax.models.encoder.config import FAMILIES as ENCODERS
from lora_jax.models.encoder.config import OPTIONS, EncoderConfig
from lora_jax.models.encoder.keys import OTHER_HEADS, encoder_name, encoder_table
from lora_jax.models.encoder.model import Encoder
from lora_jax.models.gpt2.config import GPT2Config
from lora_jax.models.gpt2.keys import gpt2_name, gpt2_table
from lora_jax.models.gpt2.model import GPT2
from lora_jax.models.layers.attend import Attend
from lora_jax.models.qwen_vl.config import CLASSES as QWEN_VL
from lora_jax.models.qwen_vl.config import QwenVLConfig
from lora_jax.models.qwen_vl.keys import FURTHER, qwen_vl_name, qwen_vl_table
from lora_jax.models.qwen_vl.model import QwenVL
from lora_jax.models.smolvlm.config import CLASSES as SMOLVLM
from lora_jax.models.smolvlm.config import SmolVLMConfig
from lora_jax.models.smolvlm.keys import smolvlm_name, smolvlm_table
from lora_jax.models.smolvlm.model import SmolVLM
from lora_jax.models.vision.config import FAMILIES as VISION
from lora_jax.models.vision.config import OPTIONS as VISION_OPTIONS
from lora_jax.models.vision.config import VisionConfig
from lora_jax.models.vision.keys import OTHER_PARTS, vision_name, vision_table
from lora_jax.models.vision.model import VisionEncoder
from lora_jax.quantized import is_coded

IMAGES = "images"  # the option of models whose folders are read for their texts alone without it


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
      module: see ``module_of``.
      format: how files hold its configuration and parameters.
      default_targets: PEFT's default target_modules; None if it has none.
    """

    module: type[nn.Module]
    format: ModelFormat
    default_targets: tuple[str, ...] | None


_ENCODER = ModelFormat(
    EncoderConfig.from_hf,
    encoder_table,
    options=OPTIONS,
    table_name=encoder_name,
    ignored_tensors=OTHER_HEADS,
)
_VISION = ModelFormat(
    VisionConfig.from_hf,
    vision_table,
    options=VISION_OPTIONS,
    table_name=vision_name,
    ignored_tensors=OTHER_PARTS,
)


def _decoder_format(family: DecoderFamily) -> ModelFormat:
    """Returns the file format of a decoder family."""
    return ModelFormat(
        DecoderConfig.from_hf,
        decoder_table,
        decoder_parts,
        table_name=decoder_name,
        ignored_tensors=family.left_out,
        gguf=gguf_layout(family),
    )


def _read_text_or_images(fields: Fields, images: bool = False) -> ModelConfig:
    return QwenVLConfig.from_hf(fields) if images else DecoderConfig.from_hf(fields)


_QWEN_VL = ModelFormat(
    _read_text_or_images,
    qwen_vl_table,
    decoder_parts,
    options=frozenset({IMAGES}),
    table_name=qwen_vl_name,
    ignored_tensors=FURTHER,
)

_SMOLVLM = ModelFormat(SmolVLMConfig.from_hf, smolvlm_table, table_name=smolvlm_name)
_GPT2 = ModelFormat(GPT2Config.from_hf, gpt2_table, table_name=gpt2_name)


def _families() -> dict[str, Family]:
    """Returns all families, by ``model_type``."""
    families: dict[str, Family] = {}
    # Decoders of texts, also under the name of the model with images that contains them.
    for model_type, decoder in DECODERS.items():
        family = Family(Decoder, _decoder_format(decoder), decoder.default_targets)
        families[model_type] = family
        if decoder.with_images is not None:
            families[decoder.with_images] = family
    # Models that read images. They may replace the entry of a decoder.
    for model_type in QWEN_VL:
        families[model_type] = Family(QwenVL, _QWEN_VL, None)
    for model_type, encoder in ENCODERS.items():
        families[model_type] = Family(Encoder, _ENCODER, encoder.default_targets)
    for model_type in VISION:
        families[model_type] = Family(VisionEncoder, _VISION, None)
    for model_type in SMOLVLM:
        families[model_type] = Family(SmolVLM, _SMOLVLM, None)
    families["gpt2"] = Family(GPT2, _GPT2, ("c_attn",))
    return families


FAMILIES = _families()

FORMATS = ModelFormats({name: family.format for name, family in FAMILIES.items()})


def family_of(model_type: object) -> Family:
    """Returns the family of a model_type.

    Raises:
      ConfigError: for an unknown model_type; lists the known ones.
    """
    return FAMILIES[check_supported("model_type", model_type, FAMILIES)]


def has_images(fields: Fields) -> bool:
    """Returns True if a config.json has an image encoder that is read only on request."""
    return fields.get("model_type") in QWEN_VL and isinstance(fields.get("vision_config"), dict)


def reading_options(config: ModelConfig) -> dict[str, Any]:
    """Returns the options with which `read_config` reads this class of configuration.

    An encoder's head is left to the file: no tensor's name depends on it.
    """
    return {IMAGES: True} if config.model_type in QWEN_VL else {}


def declined_field(fields: Fields) -> str | None:
    """Returns the first unsupported field of a config.json, or None.

    Args:
      fields: the parsed config.json, of a family that `FAMILIES` has.
    """
    model_type = fields.get("model_type")
    text_fields = fields.get("text_config") or fields
    for decoder in DECODERS.values():
        if model_type in (decoder.model_type, decoder.with_images):
            for name in decoder.declines:
                if text_fields.get(name):
                    return name
    return None


def module_of(
    config: ModelConfig,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    *,
    remat: bool | str = False,
    attention: str | Attend = "auto",
    experts: str | Experts = "auto",
    params: Tree = None,
) -> Any:
    """Creates the module of a configuration.

    Args:
      config: configuration of any family.
      dtype, param_dtype, remat, attention, experts: see ``Decoder``.
      params: the parameters, or their shapes, which tell whether experts lie in codes; see
        ``lora_jax.models.decoder.experts.implementation``.

    Raises:
      ConfigError: if ``experts`` are given for a model without experts.
    """
    check_experts(config, experts)
    if experts == "auto" and params is not None and _has_coded_experts(config, params):
        experts = IN_CODES
    module = family_of(config.model_type).module
    options: dict[str, Any] = {"remat": remat, "attention": attention}
    if module in (Decoder, QwenVL):
        options["experts"] = experts
    return module(config, dtype, param_dtype, **options)


def _has_coded_experts(config: ModelConfig, params: Tree) -> bool:
    """Returns True if expert kernels are quantized."""
    for path, kind in kinds(config).items():
        if kind == "experts":
            leaf = functools.reduce(operator.getitem, path.split("/"), params)
            if is_coded(leaf):
                return True
    return False


def read_config(fields: Fields, **options: object) -> Any:
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


def key_table(config: ModelConfig) -> list[Row]:
    """Returns every parameter of the model, once, in the order of the forward pass.

    Args:
      config: the configuration of a model of ``lora_jax.models``.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> models.key_table(config)[0].hf
    'transformer.wte.weight'
    """
    key_rows = getattr(config, "key_rows", None)
    if key_rows is not None:  # a model of no family of ours
        return list(key_rows())
    return family_of(config.model_type).format.table(config)


def kinds(config: ModelConfig) -> dict[str, Kind]:
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


def partition_specs(config: ModelConfig) -> tuple[tuple[str, PartitionSpec], ...]:
    """Returns the sharding table of a model's parameters, for ``lora_jax.sharding``.

    Each line has a parameter's path, and the spec of its last axes; parameters without a line are
    replicated.

    Args:
      config: the configuration of a model of ``lora_jax.models``.

    >>> from lora_jax import models
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> config = models.read_config(fields | {"n_positions": 16})
    >>> models.partition_specs(config)[0][0]
    'transformer/wte/embedding'
    """
    return tuple((row.path, row.spec) for row in key_table(config) if row.spec)
