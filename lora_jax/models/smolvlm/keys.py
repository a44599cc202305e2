"""SmolVLM's key table: the rows of its encoder, connector and decoder."""

from lora_jax.hf.keys import Row
from lora_jax.models.decoder.keys import text_table
from lora_jax.models.key_rows import KeyTable, names_of_bare
from lora_jax.models.smolvlm.config import SmolVLMConfig
from lora_jax.models.specs import COLUMNS, POSITIONS, REPLICATED, ROWS

smolvlm_name = names_of_bare(r"(text_model|vision_model|connector)\..+", "model.")


def smolvlm_table(config: SmolVLMConfig) -> list[Row]:
    """Returns every parameter of the model, once, in the order of the forward pass."""
    return [*_vision_table(config), *text_table(config.text, "text_model")]


def _vision_table(config: SmolVLMConfig) -> KeyTable:
    """Returns the rows of the image encoder."""
    vision = config.vision
    trunk = "model/vision_model"
    width = vision.hidden_size
    inner = vision.intermediate_size
    layer = f"{trunk}/encoder/layers"
    embeddings = f"{trunk}/embeddings"
    rows = KeyTable(layer, vision.num_hidden_layers)
    # Files have these axes in the opposite order.
    patch_shape = (vision.patch_size, vision.patch_size, vision.num_channels, width)
    rows.add("patches", f"{embeddings}/patch_embedding", "kernel", patch_shape)
    rows.add("patches", f"{embeddings}/patch_embedding", "bias", (width,))
    table_shape = (vision.side**2, width)
    rows.add("positions", f"{embeddings}/position_embedding", "embedding", table_shape, POSITIONS)
    rows.layer_norm(f"{layer}/layer_norm1", width)
    for name in ("q", "k", "v"):
        rows.linear("attention", f"{layer}/self_attn/{name}_proj", (width, width), COLUMNS)
    rows.linear("attention", f"{layer}/self_attn/out_proj", (width, width), ROWS)
    rows.layer_norm(f"{layer}/layer_norm2", width)
    rows.linear("mlp", f"{layer}/mlp/fc1", (width, inner), COLUMNS)
    rows.linear("mlp", f"{layer}/mlp/fc2", (inner, width), ROWS)
    rows.layer_norm(f"{trunk}/post_layernorm", width)
    # The connector joins a square of patches to one vector.
    connector_shape = (width * config.scale_factor**2, config.text.hidden_size)
    projection = "model/connector/modality_projection/proj"
    rows.linear("connector", projection, connector_shape, REPLICATED, bias=False)
    return rows
