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
    width, inner = config.hidden_size, config.intermediate_size
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    words, positions = (config.vocab_size, width), (config.max_position_embeddings, width)
    rows.add("embedding", "transformer/wte", "embedding", words, ROWS, aliases=tied)
    rows.add("positions", "transformer/wpe", "embedding", positions, POSITIONS)
    rows.layer_norm(f"{layer}/ln_1", width)
    rows.linear("attention", f"{layer}/attn/c_attn", (width, 3 * width), COLUMNS)
    rows.linear("attention", f"{layer}/attn/c_proj", (width, width), ROWS)
    rows.layer_norm(f"{layer}/ln_2", width)
    rows.linear("mlp", f"{layer}/mlp/c_fc", (width, inner), COLUMNS)
    rows.linear("mlp", f"{layer}/mlp/c_proj", (inner, width), ROWS)
    rows.layer_norm("transformer/ln_f", width)
    if not config.tie_word_embeddings:
        rows.linear("head", "lm_head", words[::-1], COLUMNS, bias=False, transpose=True)
    return rows
