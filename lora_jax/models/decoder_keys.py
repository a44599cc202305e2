"""The decoder's key table."""

from __future__ import annotations

from lora_jax.models.config import DecoderConfig
from lora_jax.models.keys import Row


def decoder_table(config: DecoderConfig) -> list[Row]:
    """Every parameter of the decoder, once, in the order of the forward pass."""
    rows: list[Row] = []
    layers = (config.num_hidden_layers,)

    def add(path: str, leaf: str, shape: tuple[int, ...], stack: tuple[int, ...] = layers) -> None:
        hf_leaf = "bias" if leaf == "bias" else "weight"
        hf = f"{path}/{hf_leaf}".replace("/", ".").replace("layers.", "layers.{}.")
        tied = leaf == "embedding" and config.tie_word_embeddings
        rows.append(
            Row(
                path=f"{path}/{leaf}",
                hf=hf.replace("experts.", "experts.{}."),
                shape=shape,
                stack=stack,
                transpose=leaf == "kernel",
                aliases=("lm_head.weight",) if tied else (),
            )
        )

    def linear(path: str, d_in: int, d_out: int, bias: bool = False) -> None:
        add(f"model/layers/{path}", "kernel", (d_in, d_out))
        if bias:
            add(f"model/layers/{path}", "bias", (d_out,))

    def norm(path: str, size: int) -> None:
        add(f"model/layers/{path}", "scale", (size,))

    width, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_out, kv_out = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    add("model/embed_tokens", "embedding", (config.vocab_size, width), ())
    norm("input_layernorm", width)
    if config.fused_projections:
        linear("self_attn/qkv_proj", width, q_out + 2 * kv_out, config.qkv_bias)
    else:
        linear("self_attn/q_proj", width, q_out, config.qkv_bias)
        linear("self_attn/k_proj", width, kv_out, config.qkv_bias)
        linear("self_attn/v_proj", width, kv_out, config.qkv_bias)
    if config.qk_norm:
        norm("self_attn/q_norm", head_dim)
        norm("self_attn/k_norm", head_dim)
    linear("self_attn/o_proj", q_out, width, config.o_bias)
    norm("post_attention_layernorm", width)
    if config.post_norms:
        norm("pre_feedforward_layernorm", width)
    if config.num_experts:
        linear(f"{config.mlp_name}/gate", width, config.num_experts)
        gate, up, down = config.expert_names
        size = config.moe_intermediate_size
        for name, shape in ((gate, (width, size)), (up, (width, size)), (down, (size, width))):
            path = f"model/layers/{config.mlp_name}/experts/{name}"
            add(path, "kernel", shape, (*layers, config.num_experts))
    else:
        if config.fused_projections:
            linear("mlp/gate_up_proj", width, 2 * inner, config.mlp_bias)
        else:
            linear("mlp/gate_proj", width, inner, config.mlp_bias)
            linear("mlp/up_proj", width, inner, config.mlp_bias)
        linear("mlp/down_proj", inner, width, config.mlp_bias)
    if config.post_norms:
        norm("post_feedforward_layernorm", width)
    add("model/norm", "scale", (width,), ())
    if not config.tie_word_embeddings:
        add("lm_head", "kernel", (width, config.vocab_size), ())
    return rows
