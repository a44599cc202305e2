"""The key table of Qwen3.5 with images: the rows of its encoder and of its decoder."""

import re

from lora_jax.hf.keys import Row
from lora_jax.models.decoder.keys import text_table
from lora_jax.models.key_rows import KeyTable, names_of_bare
from lora_jax.models.qwen_vl.config import QwenVLConfig
from lora_jax.models.specs import COLUMNS, POSITIONS, REPLICATED, ROWS

_TEXT = "language_model"

qwen_vl_name = names_of_bare(rf"({_TEXT}|visual)\..+", "model.")

# Layers that predict tokens further on.
FURTHER = re.compile(r"mtp\..*")


def qwen_vl_table(config: QwenVLConfig) -> list[Row]:
    """Returns every parameter of the model, once, in the order of the forward pass."""
    return [*_vision_table(config), *text_table(config.text, _TEXT)]


def _vision_table(config: QwenVLConfig) -> KeyTable:
    """Returns the rows of the image encoder."""
    vision = config.vision
    trunk = "model/visual"
    width = vision.hidden_size
    inner = vision.intermediate_size
    layer = f"{trunk}/blocks"
    merger = f"{trunk}/merger"
    rows = KeyTable(layer, vision.num_hidden_layers)
    # Files have these axes in the opposite order.
    side = vision.patch_size
    patch_shape = (side, side, vision.temporal_patch_size, vision.num_channels, width)
    rows.add("patches", f"{trunk}/patch_embed/proj", "kernel", patch_shape)
    rows.add("patches", f"{trunk}/patch_embed/proj", "bias", (width,))
    table_shape = (vision.num_position_embeddings, width)
    rows.add("positions", f"{trunk}/pos_embed", "embedding", table_shape, POSITIONS)
    rows.layer_norm(f"{layer}/norm1", width)
    rows.linear("attention", f"{layer}/attn/qkv", (width, 3 * width), COLUMNS)
    rows.linear("attention", f"{layer}/attn/proj", (width, width), ROWS)
    rows.layer_norm(f"{layer}/norm2", width)
    rows.linear("mlp", f"{layer}/mlp/linear_fc1", (width, inner), COLUMNS)
    rows.linear("mlp", f"{layer}/mlp/linear_fc2", (inner, width), ROWS)
    rows.layer_norm(f"{merger}/norm", width)
    # The merger joins a square of patches to one vector.
    square_size = width * vision.spatial_merge_size**2
    rows.linear("connector", f"{merger}/linear_fc1", (square_size, square_size), REPLICATED)
    out_shape = (square_size, vision.out_hidden_size)
    rows.linear("connector", f"{merger}/linear_fc2", out_shape, REPLICATED)
    return rows
