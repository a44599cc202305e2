"""The families of vision models: the facts by which they differ."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionFamily:
    """The facts of one family.

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
    defaults: Mapping[str, Any]
    attention_norm: str
    mlp_norm: str
    mlp: tuple[str, str]
    layer_scale: bool
    mean_patch: bool
    in_module: Mapping[str, str]
    written: Mapping[str, Any]


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
