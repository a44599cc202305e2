"""The key table of vision models, and alternative names in files."""

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
    """Returns the table's name of a stored tensor; bare encoders lack the prefix ("vit.")."""
    match = _TRUNK.fullmatch(name)
    return _file_prefix(config) + match[1] if match else name


def _file_prefix(config: VisionConfig) -> str:
    """Returns the encoder's name prefix in files; "" for a bare encoder."""
    return "" if config.head == "none" else f"{config.family.prefix}."


def vision_table(config: VisionConfig) -> list[Row]:
    """Returns every parameter of the encoder and its head, in the order of the forward pass.

    The head is an optional part: a file without it still loads.
    """
    family = config.family
    width = config.hidden_size
    trunk = family.prefix
    layer = f"{trunk}/encoder/layer"
    embeddings = f"{trunk}/embeddings"
    rows = KeyTable(layer, config.num_hidden_layers)
    rows.add("patches", embeddings, "cls_token", (1, 1, width))
    projection = f"{embeddings}/patch_embeddings/projection"
    patch_height, patch_width = config.patch_size
    # Files have these axes in the opposite order.
    patch_shape = (patch_width, patch_height, config.num_channels, width)
    rows.add("patches", projection, "kernel", patch_shape)
    rows.add("patches", projection, "bias", (width,))
    rows.add("positions", embeddings, "position_embeddings", (1, config.max_tokens, width))
    up_name, down_name = family.mlp
    rows.layer_norm(f"{layer}/{family.attention_norm}", width)
    for name in ("query", "key", "value"):
        path = f"{layer}/attention/attention/{name}"
        rows.linear("attention", path, (width, width), COLUMNS, bias=config.qkv_bias)
    rows.linear("attention", f"{layer}/attention/output/dense", (width, width), ROWS)
    if family.layer_scale:
        rows.add("norm", f"{layer}/layer_scale1", "lambda1", (width,))
    rows.layer_norm(f"{layer}/{family.mlp_norm}", width)
    rows.linear("mlp", f"{layer}/{up_name}", (width, config.intermediate_size), COLUMNS)
    rows.linear("mlp", f"{layer}/{down_name}", (config.intermediate_size, width), ROWS)
    if family.layer_scale:
        rows.add("norm", f"{layer}/layer_scale2", "lambda1", (width,))
    rows.layer_norm(f"{trunk}/layernorm", width)
    if config.head == "classification":
        # The classes follow from the image's own token, and from the mean of the patches if used.
        n_inputs = 2 * width if family.mean_patch else width
        shape = (n_inputs, config.num_labels)
        rows.linear("classifier", "classifier", shape, REPLICATED, part="classifier")
    file_rows = with_prefix(rows, f"{trunk}.", _file_prefix(config))
    return [_add_module_name(row, config) for row in file_rows]


def _add_module_name(row: Row, config: VisionConfig) -> Row:
    """Returns a row with transformers 5's module name, if it differs from the file's."""
    module_name = row.hf
    for file_part, module_part in config.family.in_module.items():
        module_name = module_name.replace(file_part, module_part)
    return dataclasses.replace(row, in_module=module_name if module_name != row.hf else None)
