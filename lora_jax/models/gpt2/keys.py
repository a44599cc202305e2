"""GPT-2's key table."""

from lora_jax.hf.keys import Row
from lora_jax.models.gpt2.config import GPT2Config
from lora_jax.models.key_rows import KeyTable, names_of_bare
from lora_jax.models.specs import COLUMNS, POSITIONS, ROWS

gpt2_name = names_of_bare(r"(wte|wpe|h\.\d+|ln_f)\..+", "transformer.")  # such as OpenAI's


def gpt2_table(config: GPT2Config) -> list[Row]:
    """Returns every parameter of GPT-2, once, in the order of the forward pass.

    Hugging Face stores its kernels as [in, out] (``Conv1D``), as Flax does.
    """
    layer = "transformer/h"
    rows = KeyTable(layer, config.num_hidden_layers, transpose=False)
    width = config.hidden_size
    inner = config.intermediate_size
    head_names = ("lm_head.weight",) if config.tie_word_embeddings else ()
    words_shape = (config.vocab_size, width)
    positions_shape = (config.max_position_embeddings, width)
    rows.add("embedding", "transformer/wte", "embedding", words_shape, ROWS, aliases=head_names)
    rows.add("positions", "transformer/wpe", "embedding", positions_shape, POSITIONS)
    rows.layer_norm(f"{layer}/ln_1", width)
    rows.linear("attention", f"{layer}/attn/c_attn", (width, 3 * width), COLUMNS)
    rows.linear("attention", f"{layer}/attn/c_proj", (width, width), ROWS)
    rows.layer_norm(f"{layer}/ln_2", width)
    rows.linear("mlp", f"{layer}/mlp/c_fc", (width, inner), COLUMNS)
    rows.linear("mlp", f"{layer}/mlp/c_proj", (inner, width), ROWS)
    rows.layer_norm("transformer/ln_f", width)
    if not config.tie_word_embeddings:
        head_shape = (width, config.vocab_size)
        rows.linear("head", "lm_head", head_shape, COLUMNS, bias=False, transpose=True)
    return rows
