"""SmolVLM's configuration: decoder, image encoder, and config.json."""

import dataclasses
from typing import Any

from lora_jax.core.types import Fields
from lora_jax.hf.fields import (
    ConfigError,
    check_field_values,
    check_no_unknown_fields,
    check_supported,
    read_boolean,
)
from lora_jax.hf.generation import Generation
from lora_jax.hf.vision.readers import ImageForm
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.fields import FieldTable, check_transformer

# model_type -> the beginning of the name of transformers' class.
CLASSES = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}
_OWN = frozenset({"text_config", "vision_config", "scale_factor", "image_token_id"})
# Without an effect on the output: of training, of the processor, and of parts that are not there.
_NO_EFFECT = frozenset(
    """
    model_type tie_word_embeddings vocab_size pad_token_id _pad_token_id bos_token_id eos_token_id
    image_seq_len attention_dropout max_image_size size
    """.split()
)
_OF_OLD_TEXT = frozenset(
    "_flash_attn_2_enabled neftune_noise_alpha perceiver_config pixel_shuffle_factor".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """An image encoder of the SigLIP kind. Hashable; sizes are in elements and pixels."""

    hidden_size: int = 1152
    intermediate_size: int = 3072
    image_size: int = 224
    patch_size: int = 32
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_channels: int = 3
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        check_transformer(self)

    @property
    def side(self) -> int:
        """The number of patches along a side of an image."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolVLMConfig:
    """A decoder that reads images: SmolVLM, and Idefics 3 with a Llama. Hashable.

    Every field of the decoder's configuration is one of this, too.

    Attributes:
      text: the decoder's configuration.
      vision: the configuration of the encoder of images.
      scale_factor: a square of so many patches a side becomes one token.
      image_token_id: the token in whose place an image's next vector stands.
      generation: what the model's generation_config.json says; None without one.

    Raises:
      ConfigError: if the fields contradict each other.
    """

    model_type: str = "smolvlm"
    text: DecoderConfig
    vision: SiglipConfig
    scale_factor: int = 2
    image_token_id: int = 128257
    generation: Generation | None = None

    def __post_init__(self) -> None:
        check_field_values(self)
        check_supported("model_type", self.model_type, CLASSES)
        if self.scale_factor < 1 or self.vision.side % self.scale_factor:
            raise ConfigError(
                f"An image has {self.vision.side} patches along a side, which is not a multiple of "
                f"scale_factor ({self.scale_factor}). Check scale_factor, image_size and "
                "patch_size."
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "text":
            raise AttributeError(name)
        return getattr(self.text, name)

    @property
    def image_form(self) -> ImageForm:
        """The form in which the model takes images."""
        return "tiles"

    @property
    def tokens_per_image(self) -> int:
        """The number of tokens that stand for an image."""
        return (self.vision.side // self.scale_factor) ** 2

    @classmethod
    def from_hf(cls, config: Fields) -> "SmolVLMConfig":
        """Reads a config.json of transformers 4 or 5.

        Args:
          config: the parsed config.json.

        Raises:
          ConfigError: names the fields that are missing, unsupported or unknown.
        """
        kind = check_supported("model_type", config.get("model_type"), CLASSES)
        check_no_unknown_fields(config, kind, _OWN | _NO_EFFECT)
        parts = {}
        for name in ("text_config", "vision_config"):
            if not isinstance(config.get(name), dict):
                raise ConfigError(
                    f"config.json lacks {name}. Add the field, or download the model again."
                )
            parts[name] = dict(config[name])
        text, vision = parts.values()
        check_no_unknown_fields(
            vision, f"{kind}'s vision_config", _NO_EFFECT | _VISION_FIELDS.file_names
        )
        text = {name: value for name, value in text.items() if name not in _OF_OLD_TEXT}
        tied = "tie_word_embeddings"
        text[tied] = read_boolean(tied, config.get(tied))
        return cls(
            model_type=kind,
            text=DecoderConfig.from_hf({"model_type": "llama", **text}),
            vision=SiglipConfig(**_VISION_FIELDS.read(vision)),
            **_FIELDS.read(config),
        )

    def to_hf(self) -> dict[str, object]:
        """Returns the config.json that ``from_hf`` reads back as this configuration."""
        return {
            "model_type": self.model_type,
            **_FIELDS.write(self),
            "architectures": [f"{CLASSES[self.model_type]}ForConditionalGeneration"],
            "text_config": self.text.to_hf(),
            "vision_config": dataclasses.asdict(self.vision),
            "tie_word_embeddings": self.text.tie_word_embeddings,
        }


_FIELDS = FieldTable(SmolVLMConfig, excluded=("model_type", "text", "vision", "generation"))
_VISION_FIELDS = FieldTable(SiglipConfig)
