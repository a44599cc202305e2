"""The key table of vision models, and the names that files use beside it."""

import dataclasses
import re

from lora_jax.hf.keys import Row
from lora_jax.models.key_rows import KeyTable, with_prefix
from lora_jax.models.specs import COLUMNS, REPLICATED, ROWS
from lora_jax.models.vision.config import VisionConfig

_TRUNK = re.compile(r"(?:(?:vit|dinov2)\.)?((?:embeddings|encoder|layernorm)\..+)")

# Tensors without a use here, which a file may hold: of the pooler, of masked images and of a
# classifier.
OTHER_PARTS = re.compile(
    r"((vit|dinov2)\.)?(pooler\.dense\.(weight|bias)|embeddings\.mask_token)"
    r"|(decoder\.0|classifier)\.(weight|bias)"
)


def vision_name(name: str, config: VisionConfig) -> str:
    """Returns the table's name of a file's tensor: a bare encoder's has no prefix ("vit.")."""
    match = _TRUNK.fullmatch(name)
    return _prefix(config) + match[1] if match else name


def _prefix(config: VisionConfig) -> str:
    return "" if config.head == "none" else f"{config.family.prefix}."


def vision_table(config: VisionConfig) -> list[Row]:
    """Returns every parameter of the encoder and its head, in the order of the forward pass.

    The head is an optional part: a file without it still loads.
    """
    facts, width = config.family, config.hidden_size
    trunk = facts.prefix
    layer, embeddings = f"{trunk}/encoder/layer", f"{trunk}/embeddings"
    rows = KeyTable(layer, config.num_hidden_layers)
    rows.add("patches", embeddings, "cls_token", (1, 1, width))
    projection = f"{embeddings}/patch_embeddings/projection"
    patch = (*config.patch_size[::-1], config.num_channels, width)  # files: reversed
    rows.add("patches", projection, "kernel", patch)
    rows.add("patches", projection, "bias", (width,))
    rows.add("positions", embeddings, "position_embeddings", (1, config.max_tokens, width))
    first, second = facts.mlp
    rows.layer_norm(f"{layer}/{facts.attention_norm}", width)
    for name in ("query", "key", "value"):
        path = f"{layer}/attention/attention/{name}"
        rows.linear("attention", path, (width, width), COLUMNS, bias=config.qkv_bias)
    rows.linear("attention", f"{layer}/attention/output/dense", (width, width), ROWS)
    if facts.layer_scale:
        rows.add("norm", f"{layer}/layer_scale1", "lambda1", (width,))
    rows.layer_norm(f"{layer}/{facts.mlp_norm}", width)
    rows.linear("mlp", f"{layer}/{first}", (width, config.intermediate_size), COLUMNS)
    rows.linear("mlp", f"{layer}/{second}", (config.intermediate_size, width), ROWS)
    if facts.layer_scale:
        rows.add("norm", f"{layer}/layer_scale2", "lambda1", (width,))
    rows.layer_norm(f"{trunk}/layernorm", width)
    if config.head == "classification":
        shape = (width * (2 if facts.mean_patch else 1), config.num_labels)
        rows.linear("classifier", "classifier", shape, REPLICATED, part="classifier")
    return [_named(row, config) for row in with_prefix(rows, f"{trunk}.", _prefix(config))]


def _named(row: Row, config: VisionConfig) -> Row:
    """Returns a row with its name in transformers 5's module."""
    in_module = row.hf
    for piece, new in config.family.in_module.items():
        in_module = in_module.replace(piece, new)
    return dataclasses.replace(row, in_module=in_module if in_module != row.hf else None)
