"""A vision model's family, its options, and its config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.core.types import Fields
from lora_jax.hf.fields import (
    ConfigError,
    check_no_unknown_fields,
    check_supported,
)
from lora_jax.models.fields import (
    FieldTable,
    check_classes,
    check_transformer,
    read_classes,
    read_head,
    write_classes,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionFamily:
    """The declaration of one family.

    Attributes:
      class_name: the beginning of transformers' names of its classes.
      prefix: the name of the encoder inside a model with a head.
      defaults: transformers' defaults of the fields that the families differ in; others are not of
        the family.
      attention_norm, mlp_norm: the names of a layer's norms.
      mlp: the names of the MLP's two layers.
      layer_scale: whether what attention and MLP add is scaled by a vector each.
      mean_patch: whether the classes are told from the first token and the mean of the patches,
        one after the other, or from the first token alone.
      in_module: pieces of names in files, and what transformers 5's modules have there.
      written: further fields of config.json, as the forward pass here has them.
    """

    class_name: str
    prefix: str
    defaults: Fields
    attention_norm: str
    mlp_norm: str
    mlp: tuple[str, str]
    layer_scale: bool
    mean_patch: bool
    in_module: Mapping[str, str]
    written: Mapping[str, object]


_ATTENTION = {
    **{f"attention.attention.{n}": f"attention.{n[0]}_proj" for n in ("query", "key", "value")},
    "attention.output.dense": "attention.o_proj",
}

FAMILIES: dict[str, VisionFamily] = {
    "vit": VisionFamily(
        class_name="ViT",
        prefix="vit",
        defaults={"layer_norm_eps": 1e-12, "patch_size": 16, "intermediate_size": 3072},
        attention_norm="layernorm_before",
        mlp_norm="layernorm_after",
        mlp=("intermediate/dense", "output/dense"),
        layer_scale=False,
        mean_patch=False,
        in_module=_ATTENTION
        | {
            "encoder.layer.": "layers.",
            "}.intermediate.dense": "}.mlp.fc1",
            "}.output.dense": "}.mlp.fc2",
        },
        written={},
    ),
    "dinov2": VisionFamily(
        class_name="Dinov2",
        prefix="dinov2",
        defaults={"layer_norm_eps": 1e-6, "patch_size": 14, "mlp_ratio": 4},
        attention_norm="norm1",
        mlp_norm="norm2",
        mlp=("mlp/fc1", "mlp/fc2"),
        layer_scale=True,
        mean_patch=True,
        in_module=_ATTENTION,
        written={"use_mask_token": False},
    ),
}


OPTIONS = frozenset({"head", "num_labels"})

# transformers' class names for a model with the head; the first is the one that is written.
_ARCHITECTURES = {"none": ("Model",), "classification": ("ForImageClassification",)}

# Without an effect on the output: of training and initial values, of the pooler, of masked images
# and of the use as a backbone.
_NO_EFFECT = frozenset(
    """
    hidden_dropout_prob attention_probs_dropout_prob drop_path_rate layerscale_value pooler_act
    pooler_output_size encoder_stride use_mask_token apply_layernorm reshape_hidden_states
    out_features out_indices stage_names
    """.split()
)
# Known options that would change the forward pass, and the only value that is supported.
_UNSUPPORTED: dict[str, object] = {"use_swiglu_ffn": False}

_PAIRS = ("image_size", "patch_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """An image encoder of the ViT and DINOv2 kind, with its head. Hashable.

    Sizes are in elements; those of images and patches are (height, width) in pixels. ``head`` is
    "none" (final hidden states) or "classification" (logits of ``num_labels`` classes).

    Raises:
      ConfigError: if the fields contradict each other.
    """

    model_type: str = "vit"
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    image_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (16, 16)
    num_channels: int = 3
    qkv_bias: bool = True
    head: str = "none"
    num_labels: int = 2
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_transformer(self)
        check_supported("model_type", self.model_type, FAMILIES)
        check_supported("head", self.head, _ARCHITECTURES)
        if min(self.grid) < 1:
            raise ConfigError(
                f"image_size {self.image_size} is smaller than patch_size {self.patch_size}. Check "
                "both fields."
            )
        check_classes(self.num_labels, self.label_names)

    @property
    def family(self) -> VisionFamily:
        """The declaration of the model's family."""
        return FAMILIES[self.model_type]

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of patches in the position table."""
        return self.grid_of(*self.image_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Returns the rows and columns of patches of an image, without leftover pixels."""
        return height // self.patch_size[0], width // self.patch_size[1]

    @property
    def max_tokens(self) -> int:
        """The number of tokens of an image of ``image_size``: patches, and a class token."""
        return 1 + self.grid[0] * self.grid[1]

    @classmethod
    def from_hf(cls, config: Fields, **options: Any) -> "VisionConfig":
        """Reads a config.json of transformers 4 or 5.

        Args:
          config: the parsed config.json. Its ``architectures`` tells the head.
          **options: head and num_labels, instead of the file's.

        Returns:
          The configuration.

        Raises:
          ConfigError: names the fields that are missing, unsupported or unknown, and options that
            do not go with the head.
        """
        family = check_supported("model_type", config.get("model_type"), FAMILIES)
        facts = FAMILIES[family]
        field_names = (_FIELDS.file_names - {"intermediate_size"}).union(facts.defaults)
        known_names = field_names | _NO_EFFECT | {"num_labels"}
        check_no_unknown_fields(config, family, known_names, _UNSUPPORTED)
        class_names = [vision_family.class_name for vision_family in FAMILIES.values()]
        head = options.get("head") or read_head(config, class_names, _ARCHITECTURES)
        if "num_labels" in options and head != "classification":
            raise ConfigError(
                f"num_labels needs head='classification', but the head is {head!r}. Pass "
                "head='classification', or remove num_labels."
            )
        num_labels, label_names = read_classes(config, options.get("num_labels"))
        fields = dict(facts.defaults)
        fields |= {name: config[name] for name in field_names if name in config}
        if "mlp_ratio" in fields:
            hidden_size = fields.get("hidden_size", cls.hidden_size)
            fields["intermediate_size"] = int(hidden_size * fields.pop("mlp_ratio"))
        for name in _PAIRS:
            size = fields.get(name, getattr(cls, name))
            fields[name] = (size, size) if isinstance(size, int) else tuple(size)
        return cls(**fields, head=head, num_labels=num_labels, label_names=label_names)

    def to_hf(self) -> dict[str, object]:
        """Returns the config.json that ``from_hf`` reads back as this configuration."""
        fields = _FIELDS.write(self) | dict(self.family.written)
        for name in _PAIRS:
            height, width = getattr(self, name)
            fields[name] = height if height == width else [height, width]
        if "mlp_ratio" in self.family.defaults:
            del fields["intermediate_size"]
            mlp_ratio = self.intermediate_size / self.hidden_size
            fields["mlp_ratio"] = int(mlp_ratio) if mlp_ratio.is_integer() else mlp_ratio
        fields["architectures"] = [self.family.class_name + _ARCHITECTURES[self.head][0]]
        return fields | write_classes(self.num_labels, self.label_names)


_FIELDS = FieldTable(VisionConfig, excluded=(*OPTIONS, "label_names"))
