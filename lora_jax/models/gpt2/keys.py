"""GPT-2's key table."""

from __future__ import annotations

import re

from lora_jax.hf.keys import Kind, Row
from lora_jax.models.gpt2.config import GPT2Config

# A bare GPT2Model's tensors, such as OpenAI's, come without the prefix.
_BARE = re.compile(r"(wte|wpe|h\.\d+|ln_f)\..+")


def gpt2_name(name: str, config: GPT2Config) -> str:
    """Returns the table's name of a file's tensor: with the prefix ``transformer.``."""
    return f"transformer.{name}" if _BARE.fullmatch(name) else name


def gpt2_table(config: GPT2Config) -> list[Row]:
    """Returns every parameter of GPT-2, once, in the order of the forward pass.

    Hugging Face stores its kernels as [in, out] (``Conv1D``), as Flax does.
    """
    rows: list[Row] = []

    def add(
        path: str, leaf: str, shape: tuple[int, ...], kind: Kind, aliases: tuple[str, ...] = ()
    ) -> None:
        stacked = path.startswith("transformer/h/")
        hf = f"{path}/{'bias' if leaf == 'bias' else 'weight'}".replace("/", ".")
        rows.append(
            Row(
                path=f"{path}/{leaf}",
                hf=hf.replace("transformer.h.", "transformer.h.{}."),
                shape=shape,
                stack=(config.num_hidden_layers,) if stacked else (),
                transpose=path == "lm_head",
                aliases=aliases,
                kind=kind,
            )
        )

    def layer_norm(path: str) -> None:
        add(path, "scale", (width,), "norm")
        add(path, "bias", (width,), "norm")

    def linear(kind: Kind, path: str, d_in: int, d_out: int) -> None:
        add(path, "kernel", (d_in, d_out), kind)
        add(path, "bias", (d_out,), kind)

    width, inner = config.hidden_size, config.intermediate_size
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    add("transformer/wte", "embedding", (config.vocab_size, width), "embedding", tied)
    positions = (config.max_position_embeddings, width)
    add("transformer/wpe", "embedding", positions, "positions")
    layer_norm("transformer/h/ln_1")
    linear("attention", "transformer/h/attn/c_attn", width, 3 * width)
    linear("attention", "transformer/h/attn/c_proj", width, width)
    layer_norm("transformer/h/ln_2")
    linear("mlp", "transformer/h/mlp/c_fc", width, inner)
    linear("mlp", "transformer/h/mlp/c_proj", inner, width)
    layer_norm("transformer/ln_f")
    if not config.tie_word_embeddings:
        add("lm_head", "kernel", (width, config.vocab_size), "head")
    return rows
