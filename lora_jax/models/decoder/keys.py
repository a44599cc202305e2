"""The decoder's key table, and the other layout in which a file may hold experts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_jax.hf.keys import Kind, Part, Row
from lora_jax.models.decoder.config import DecoderConfig


def decoder_table(config: DecoderConfig) -> list[Row]:
    """Returns every parameter of the decoder, once, in the order of the forward pass."""
    rows: list[Row] = []
    layers = (config.num_hidden_layers,)

    def add(
        path: str,
        leaf: str,
        shape: tuple[int, ...],
        kind: Kind,
        stack: tuple[int, ...] = layers,
    ) -> None:
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
                kind=kind,
            )
        )

    def linear(kind: Kind, path: str, d_in: int, d_out: int, bias: bool = False) -> None:
        add(f"model/layers/{path}", "kernel", (d_in, d_out), kind)
        if bias:
            add(f"model/layers/{path}", "bias", (d_out,), kind)

    def norm(path: str, size: int) -> None:
        add(f"model/layers/{path}", "scale", (size,), "norm")

    width, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_out, kv_out = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    add("model/embed_tokens", "embedding", (config.vocab_size, width), "embedding", ())
    norm("input_layernorm", width)
    if config.fused_projections:
        linear("attention", "self_attn/qkv_proj", width, q_out + 2 * kv_out, config.qkv_bias)
    else:
        linear("attention", "self_attn/q_proj", width, q_out, config.qkv_bias)
        linear("attention", "self_attn/k_proj", width, kv_out, config.qkv_bias)
        linear("attention", "self_attn/v_proj", width, kv_out, config.qkv_bias)
    if config.qk_norm:
        norm("self_attn/q_norm", head_dim)
        norm("self_attn/k_norm", head_dim)
    linear("attention", "self_attn/o_proj", q_out, width, config.o_bias)
    norm("post_attention_layernorm", width)
    if config.post_norms:
        norm("pre_feedforward_layernorm", width)
    if config.num_experts:
        linear("router", f"{config.family.mlp_name}/gate", width, config.num_experts)
        gate, up, down = config.family.expert_names
        size = config.moe_intermediate_size
        for name, shape in ((gate, (width, size)), (up, (width, size)), (down, (size, width))):
            path = f"model/layers/{config.family.mlp_name}/experts/{name}"
            add(path, "kernel", shape, "experts", (*layers, config.num_experts))
    else:
        if config.fused_projections:
            linear("mlp", "mlp/gate_up_proj", width, 2 * inner, config.mlp_bias)
        else:
            linear("mlp", "mlp/gate_proj", width, inner, config.mlp_bias)
            linear("mlp", "mlp/up_proj", width, inner, config.mlp_bias)
        linear("mlp", "mlp/down_proj", inner, width, config.mlp_bias)
    if config.post_norms:
        norm("post_feedforward_layernorm", width)
    add("model/norm", "scale", (width,), "norm", ())
    if not config.tie_word_embeddings:
        add("lm_head", "kernel", (width, config.vocab_size), "head", ())
    return rows


_FUSED = re.compile(
    r"(model\.layers\.\d+)\.mlp\.(experts\.gate_up_proj|experts\.down_proj|gate\.weight)"
)


def decoder_parts(config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """Finds the table's tensors in a file that holds a layer's experts in two.

    transformers 5 runs experts as gate_up_proj, [experts, 2 * inner, d_model], and down_proj,
    [experts, d_model, inner], under the name ``mlp`` in all families. It saves them as the table
    has them, unless asked for ``save_original_format=False``.

    Args:
      config: the decoder's.
      shapes: the names and shapes in the file.

    Returns:
      The table's name of each tensor -> its place in the file; {} for a file of another layout.
    """
    parts: dict[str, Part] = {}
    if not any(name.endswith(".mlp.experts.gate_up_proj") for name in shapes):
        return parts
    gate, up, down = config.family.expert_names
    inner = config.moe_intermediate_size
    halves = {gate: slice(0, inner), up: slice(inner, None)}
    for name, shape in shapes.items():
        if (match := _FUSED.fullmatch(name)) is None:
            continue
        mlp = f"{match[1]}.{config.family.mlp_name}"
        if match[2] == "gate.weight":
            parts[f"{mlp}.gate.weight"] = Part(name, ())
            continue
        for expert in range(shape[0]):
            hf = f"{mlp}.experts.{expert}"
            if match[2] == "experts.down_proj":
                parts[f"{hf}.{down}.weight"] = Part(name, (expert,))
            else:
                for kernel, half in halves.items():
                    parts[f"{hf}.{kernel}.weight"] = Part(name, (expert, half))
    return parts
