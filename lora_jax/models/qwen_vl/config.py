"""The configuration of Qwen3.5 with images: decoder, image encoder, and config.json."""

import dataclasses
import math
from typing import Any

import numpy as np

from lora_jax.core.types import Fields
from lora_jax.hf.fields import (
    ConfigError,
    check_field_values,
    check_no_unknown_fields,
    check_supported,
)
from lora_jax.hf.generation import Generation
from lora_jax.hf.vision.readers import ImageForm
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.fields import FieldTable, check_transformer

# model_type -> the beginning of the name of transformers' class.
CLASSES = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
_NAMES = {  # ours -> Hugging Face's, where they differ
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "num_channels": "in_channels",
}
_SECTION = "mrope_section"
# The tokens around images, and of videos, which are not read: kept for the file.
_TOKENS = ("video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """An encoder of images of any size, by patches. Hashable; sizes are in elements and pixels.

    Attributes:
      temporal_patch_size: the frames that a patch's kernel is for; an image is so many equal ones.
      spatial_merge_size: a square of so many patches a side becomes one token.
      num_position_embeddings: the size of the square table of positions, which is interpolated.
      rope_theta: RoPE's base, of rows and of columns.
    """

    num_hidden_layers: int = 27
    hidden_size: int = 1152
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: int = 4304
    num_attention_heads: int = 16
    num_channels: int = 3
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304
    initializer_range: float = 0.02
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        check_transformer(self, _NAMES)
        if self.head_dim % 4:
            raise ConfigError(
                f"The encoder's heads have {self.head_dim} dimensions. RoPE needs a multiple of 4, "
                "because half of the pairs turn by rows. Check hidden_size and num_heads."
            )
        if self.side**2 != self.num_position_embeddings:
            raise ConfigError(
                f"num_position_embeddings is {self.num_position_embeddings}, but the table of "
                "positions is a square. Use a square number."
            )

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def side(self) -> int:
        """The number of rows, and of columns, of the position table."""
        return math.isqrt(self.num_position_embeddings)

    @property
    def layer_norm_eps(self) -> float:
        """The epsilon of all norms."""
        return 1e-6

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """The shape of a patch: channels, height, width."""
        return self.num_channels, self.patch_size, self.patch_size

    @classmethod
    def from_hf(cls, fields: Fields, kind: str) -> "QwenVisionConfig":
        """Reads a vision_config of a model of this kind.

        Raises:
          ConfigError: names the fields that are unsupported or unknown.
        """
        others = {"model_type", "rope_parameters", "deepstack_visual_indexes"}
        check_no_unknown_fields(
            fields, f"{kind}'s vision_config", _VISION_FIELDS.file_names | others
        )
        deepstack_layers = fields.get("deepstack_visual_indexes")
        if deepstack_layers:
            raise ConfigError(
                f"deepstack_visual_indexes={deepstack_layers} is not supported, only [] is. Use "
                "another model."
            )
        rope = dict(fields.get("rope_parameters") or {})
        rope_type = rope.get("rope_type", "axial")
        if rope_type != "axial":
            raise ConfigError(
                f"RoPE type {rope_type!r} is not supported for images, only 'axial' is. Use "
                "another model."
            )
        theta = float(rope.get("rope_theta", cls.rope_theta))
        return cls(**_VISION_FIELDS.read(fields), rope_theta=theta)

    def to_hf(self) -> dict[str, object]:
        """Returns the vision_config that ``from_hf`` reads back."""
        rope = {"rope_type": "axial", "rope_theta": self.rope_theta}
        return _VISION_FIELDS.write(self) | {"rope_parameters": rope}


_VISION_FIELDS = FieldTable(QwenVisionConfig, excluded=("rope_theta",), renamed=_NAMES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVLConfig:
    """A Qwen3.5 decoder that reads images. Hashable.

    Every field of the decoder's configuration is one of this, too.

    Attributes:
      text: the decoder's configuration.
      vision: the configuration of the encoder of images.
      image_token_id: the token in whose place an image's next vector stands.
      mrope_section: how many of RoPE's pairs go by a token's time, row and column in an image: in
        turns, as long as rows and columns have some left.
      tokens: further tokens of config.json, by name.
      generation: what the model's generation_config.json says; None without one.

    Raises:
      ConfigError: if the fields contradict each other.
    """

    model_type: str = "qwen3_5"
    text: DecoderConfig
    vision: QwenVisionConfig
    image_token_id: int = 248056
    mrope_section: tuple[int, int, int] = (11, 11, 10)
    tokens: tuple[tuple[str, int], ...] = ()
    generation: Generation | None = None

    def __post_init__(self) -> None:
        check_field_values(self)
        check_supported("model_type", self.model_type, CLASSES)
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ConfigError(
                f"The encoder of images returns vectors of size {self.vision.out_hidden_size} "
                f"(out_hidden_size), but the text model's hidden_size is {self.text.hidden_size}. "
                "Set both to the same number."
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "text":
            raise AttributeError(name)
        return getattr(self.text, name)

    @property
    def image_form(self) -> ImageForm:
        """The form in which the model takes images."""
        return "patches"

    @property
    def rotated_by(self) -> np.ndarray:
        """The coordinate that rotates each RoPE pair: 0 time, 1 row, 2 column."""
        pairs = np.arange((self.text.rotary_dim + 1) // 2)
        axes = pairs % 3
        return np.where(pairs < 3 * np.array(self.mrope_section)[axes], axes, 0)

    @classmethod
    def from_hf(cls, config: Fields) -> "QwenVLConfig":
        """Reads a config.json of transformers 5.

        Args:
          config: the parsed config.json.

        Raises:
          ConfigError: names the fields that are missing, unsupported or unknown.
        """
        kind = check_supported("model_type", config.get("model_type"), CLASSES)
        text = DecoderConfig.from_hf(config)
        vision = config.get("vision_config")
        if not isinstance(vision, dict):
            raise ConfigError(
                f"config.json of {kind} lacks vision_config, so the model reads no images. Load it "
                "without images=True."
            )
        fields = config["text_config"]
        rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        if not rope.get("mrope_interleaved", True):
            raise ConfigError(
                "mrope_interleaved=False is not supported, only True is. Use another model."
            )
        optional_fields: dict[str, Any] = {}
        if _SECTION in rope:
            optional_fields[_SECTION] = tuple(rope[_SECTION])
        if "image_token_id" in config:
            optional_fields["image_token_id"] = config["image_token_id"]
        return cls(
            model_type=kind,
            text=text,
            vision=QwenVisionConfig.from_hf(vision, kind),
            tokens=tuple((name, config[name]) for name in _TOKENS if name in config),
            **optional_fields,
        )

    def to_hf(self) -> dict[str, object]:
        """Returns the config.json that ``from_hf`` reads back as this configuration."""
        text: dict[str, Any] = self.text.to_hf()
        # All fields on RoPE stand in rope_parameters.
        rope = {"rope_type": "default", **(text.pop("rope_scaling", None) or {})}
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in text:
                rope[name] = text.pop(name)
        rope |= {_SECTION: list(self.mrope_section), "mrope_interleaved": True}
        return {
            "model_type": self.model_type,
            "architectures": [f"{CLASSES[self.model_type]}ForConditionalGeneration"],
            "text_config": {**text, "rope_parameters": rope},
            "vision_config": {**self.vision.to_hf(), "model_type": f"{self.model_type}_vision"},
            "image_token_id": self.image_token_id,
            **dict(self.tokens),
            "tie_word_embeddings": self.text.tie_word_embeddings,
        }
