"""The key table of Qwen3.5 with images: the rows of its encoder and of its decoder."""

import dataclasses
import re
from collections.abc import Mapping

from lora_jax.hf.keys import Row, SubTensor
from lora_jax.models.decoder.keys import decoder_parts, decoder_table
from lora_jax.models.key_rows import KeyTable
from lora_jax.models.qwen_vl.config import QwenVLConfig
from lora_jax.models.specs import COLUMNS, POSITIONS, REPLICATED, ROWS

_TEXT = "language_model"

# Tensors of a bare model (transformers' AutoModel) come without the prefix.
_BARE = re.compile(rf"({_TEXT}|visual)\..+")

# Layers that predict tokens further on.
FURTHER = re.compile(r"mtp\..*")


def qwen_vl_name(name: str, config: QwenVLConfig) -> str:
    """Returns the table's name of a file's tensor: with the prefix ``model.``."""
    return f"model.{name}" if _BARE.fullmatch(name) else name


def qwen_vl_table(config: QwenVLConfig) -> list[Row]:
    """Returns every parameter of the model, once, in the order of the forward pass."""
    return [*_vision_table(config), *map(_text_row, decoder_table(config.text))]


def qwen_vl_parts(
    config: QwenVLConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, SubTensor]:
    """Finds the table's experts in a file that holds a layer's in two; see ``decoder_parts``."""
    return decoder_parts(config.text, shapes)


def _text_row(row: Row) -> Row:
    """Returns a row of the decoder where it stands here: "model." is "model.language_model."."""
    if not row.path.startswith("model/"):
        return row
    path, hf = row.path.removeprefix("model/"), row.hf.removeprefix("model.")
    return dataclasses.replace(row, path=f"model/{_TEXT}/{path}", hf=f"model.{_TEXT}.{hf}")


def _vision_table(config: QwenVLConfig) -> KeyTable:
    vision, trunk = config.vision, "model/visual"
    width, inner, side = vision.hidden_size, vision.intermediate_size, vision.patch_size
    layer, merger = f"{trunk}/blocks", f"{trunk}/merger"
    rows = KeyTable(layer, vision.num_hidden_layers)
    patch = (side, side, vision.temporal_patch_size, vision.num_channels, width)  # files: reversed
    rows.add("patches", f"{trunk}/patch_embed/proj", "kernel", patch)
    rows.add("patches", f"{trunk}/patch_embed/proj", "bias", (width,))
    table = (vision.num_position_embeddings, width)
    rows.add("positions", f"{trunk}/pos_embed", "embedding", table, POSITIONS)
    rows.layer_norm(f"{layer}/norm1", width)
    rows.linear("attention", f"{layer}/attn/qkv", (width, 3 * width), COLUMNS)
    rows.linear("attention", f"{layer}/attn/proj", (width, width), ROWS)
    rows.layer_norm(f"{layer}/norm2", width)
    rows.linear("mlp", f"{layer}/mlp/linear_fc1", (width, inner), COLUMNS)
    rows.linear("mlp", f"{layer}/mlp/linear_fc2", (inner, width), ROWS)
    rows.layer_norm(f"{merger}/norm", width)
    joined = width * vision.spatial_merge_size**2
    rows.linear("connector", f"{merger}/linear_fc1", (joined, joined), REPLICATED)
    out = (joined, vision.out_hidden_size)
    rows.linear("connector", f"{merger}/linear_fc2", out, REPLICATED)
    return rows
