"""The decoder's key table."""

from __future__ import annotations

from lora_jax.models.config import DecoderConfig
from lora_jax.models.keys import Row


def decoder_table(config: DecoderConfig) -> list[Row]:
    """Every parameter of the decoder, once, in the order of the forward pass."""
    rows: list[Row] = []

    def add(path: str, leaf: str, shape: tuple[int, ...], *, stacked: bool = True) -> None:
        hf_leaf = "bias" if leaf == "bias" else "weight"
        tied = leaf == "embedding" and config.tie_word_embeddings
        rows.append(
            Row(
                path=f"{path}/{leaf}",
                hf=f"{path}/{hf_leaf}".replace("/", ".").replace("layers.", "layers.{}."),
                shape=shape,
                stack=(config.num_hidden_layers,) if stacked else (),
                transpose=leaf == "kernel",
                aliases=("lm_head.weight",) if tied else (),
            )
        )

    def linear(path: str, d_in: int, d_out: int, bias: bool) -> None:
        add(f"model/layers/{path}", "kernel", (d_in, d_out))
        if bias:
            add(f"model/layers/{path}", "bias", (d_out,))

    width, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_out, kv_out = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    add("model/embed_tokens", "embedding", (config.vocab_size, width), stacked=False)
    add("model/layers/input_layernorm", "scale", (width,))
    linear("self_attn/q_proj", width, q_out, config.qkv_bias)
    linear("self_attn/k_proj", width, kv_out, config.qkv_bias)
    linear("self_attn/v_proj", width, kv_out, config.qkv_bias)
    if config.qk_norm:
        add("model/layers/self_attn/q_norm", "scale", (head_dim,))
        add("model/layers/self_attn/k_norm", "scale", (head_dim,))
    linear("self_attn/o_proj", q_out, width, config.o_bias)
    add("model/layers/post_attention_layernorm", "scale", (width,))
    linear("mlp/gate_proj", width, inner, config.mlp_bias)
    linear("mlp/up_proj", width, inner, config.mlp_bias)
    linear("mlp/down_proj", inner, width, config.mlp_bias)
    add("model/norm", "scale", (width,), stacked=False)
    if not config.tie_word_embeddings:
        add("lm_head", "kernel", (width, config.vocab_size), stacked=False)
    return rows
