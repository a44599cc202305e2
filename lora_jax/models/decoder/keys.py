"""The decoder's key table, and the other layout in which a file may hold experts."""

import dataclasses
import re
from collections.abc import Mapping

from jax.sharding import PartitionSpec as P

from lora_jax.hf.keys import Row, SubTensor
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.families.family import CORRECTION
from lora_jax.models.decoder.runs import LayerKind
from lora_jax.models.key_rows import KeyTable
from lora_jax.models.specs import (
    COLUMNS,
    EXPERT_COLUMNS,
    EXPERT_ROWS,
    REPLICATED,
    ROUTER,
    ROWS,
)


def decoder_table(config: DecoderConfig) -> list[Row]:
    """Returns every parameter of the decoder, once, in the order of the forward pass."""
    layers, width, n = "model/layers", config.hidden_size, config.num_hidden_layers
    rows = KeyTable(layers, n)
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    words = (config.vocab_size, width)
    rows.add("embedding", "model/embed_tokens", "embedding", words, ROWS, aliases=tied)
    if size := config.hidden_size_per_layer_input:
        both, table = n * size, "model/embed_tokens_per_layer"
        rows.add("positions", table, "embedding", (config.vocab_size_per_layer_input, both), ROWS)
        shape = (width, both)
        rows.linear("mlp", "model/per_layer_model_projection", shape, COLUMNS, bias=False)
        rows.add("norm", "model/per_layer_projection_norm", "scale", (size,))
    for place, numbers in config.stacks.items():
        if place:
            rows.begin(place, numbers)
        path = "/".join(filter(None, (layers, place)))
        _layer(rows, config, path, config.kind_of(numbers[0]))
    rows.add("norm", "model/norm", "scale", (width,))
    if not config.tie_word_embeddings:
        rows.linear("head", "lm_head", words[::-1], COLUMNS, bias=False)
    return rows


def text_table(config: DecoderConfig, name: str) -> list[Row]:
    """Returns the decoder's rows in a model that holds it as the module ``model.{name}``."""
    rows = []
    for row in decoder_table(config):
        if row.path.startswith("model/"):
            path, hf = row.path.removeprefix("model/"), row.hf.removeprefix("model.")
            row = dataclasses.replace(row, path=f"model/{name}/{path}", hf=f"model.{name}.{hf}")
        rows.append(row)
    return rows


def _layer(rows: KeyTable, config: DecoderConfig, layer: str, kind: LayerKind) -> None:
    """Adds the parameters of the stack of layers at a path."""
    mlp = f"{layer}/{config.family.mlp_name}"
    width = config.hidden_size

    def norm(path: str, size: int) -> None:
        rows.add("norm", path, "scale", (size,))

    if config.pre_norms:
        norm(f"{layer}/input_layernorm", width)
    if kind.linear:
        _linear(rows, config, f"{layer}/linear_attn")
    elif config.kv_lora_rank:
        _latent(rows, config, f"{layer}/self_attn")
    else:
        _attention(rows, config, f"{layer}/self_attn", kind)
    norm(f"{layer}/post_attention_layernorm", width)
    if config.pre_norms and config.post_norms:
        norm(f"{layer}/pre_feedforward_layernorm", width)
    if kind.sparse:
        _mixture(rows, config, mlp)
    else:
        wide = kind.reuses and config.use_double_wide_mlp
        _mlp(rows, config, mlp, config.intermediate_size * (1 + wide))
    if config.post_norms:
        norm(f"{layer}/post_feedforward_layernorm", width)
    if size := config.hidden_size_per_layer_input:
        rows.linear("mlp", f"{layer}/per_layer_input_gate", (width, size), COLUMNS, bias=False)
        rows.linear("mlp", f"{layer}/per_layer_projection", (size, width), ROWS, bias=False)
        norm(f"{layer}/post_per_layer_input_norm", width)
    if config.layer_scalars:
        rows.named("norm", f"{layer}/layer_scalar", "{}.layer_scalar", (1,), REPLICATED)


def _mixture(rows: KeyTable, config: DecoderConfig, mlp: str) -> None:
    family, n, width = config.family, config.num_experts, config.hidden_size
    rows.linear("router", f"{mlp}/{family.router_name}", (width, n), ROUTER, config.expert_biases)
    if config.sigmoid_router:
        hf = f"{{}}.{family.mlp_name}.{family.router_name}.{CORRECTION}"
        rows.named("router", f"{mlp}/{CORRECTION}", hf, (n,), REPLICATED, wide=True)
    *_, last = config.expert_shapes
    for name, shape in config.expert_shapes.items():
        path, spec = f"{mlp}/experts/{name}", EXPERT_ROWS if name == last else EXPERT_COLUMNS
        if not has_fused_experts(config):
            rows.add("experts", path, "kernel", shape, spec, experts=n)
            continue
        hf, split = f"{{}}.mlp.experts.{name}", P("expert", None if name == last else "tensor")
        rows.named("experts", f"{path}/kernel", hf, (n, *shape), spec)
        rows.named("experts", f"{path}/bias", f"{hf}_bias", (n, shape[1]), split)
    if inner := config.shared_expert_intermediate_size:
        _mlp(rows, config, f"{mlp}/{family.shared_name}", inner)
        if family.shared_is_gated:
            rows.linear("mlp", f"{mlp}/{family.shared_name}_gate", (width, 1), ROUTER, bias=False)


def _mlp(rows: KeyTable, config: DecoderConfig, path: str, inner: int) -> None:
    width = config.hidden_size
    sizes = {"gate_up": 2 * inner} if config.fused_projections else {"gate": inner, "up": inner}
    for name, size in sizes.items():
        rows.linear("mlp", f"{path}/{name}_proj", (width, size), COLUMNS, config.mlp_bias)
    rows.linear("mlp", f"{path}/down_proj", (inner, width), ROWS, config.mlp_bias)


def _linear(rows: KeyTable, config: DecoderConfig, path: str) -> None:
    (_, channels), (heads, _, size) = config.recurrent_shapes
    values = heads * size
    for name in config.linear_projections:
        shape = (config.hidden_size, sum(config.linear_sizes[part] for part in name))
        rows.linear("attention", f"{path}/in_proj_{name}", shape, COLUMNS, bias=False)
    taps = (channels, 1, config.linear_conv_kernel_dim)
    rows.named("attention", f"{path}/conv1d", "{}.linear_attn.conv1d.weight", taps, REPLICATED)
    for name in ("A_log", "dt_bias"):
        hf = f"{{}}.linear_attn.{name}"
        rows.named("attention", f"{path}/{name}", hf, (heads,), REPLICATED)
    rows.add("norm", f"{path}/norm", "scale", (size,))
    out_shape = (values, config.hidden_size)
    rows.linear("attention", f"{path}/out_proj", out_shape, ROWS, bias=False)


def _latent(rows: KeyTable, config: DecoderConfig, path: str) -> None:
    width, heads = config.hidden_size, config.num_attention_heads

    def linear(name: str, fan_in: int, fan_out: int, *, bias: bool = False) -> None:
        spec = ROUTER if "_a_" in name else COLUMNS  # all heads have what they share
        rows.linear("attention", f"{path}/{name}", (fan_in, fan_out), spec, bias)

    if config.q_lora_rank is None:
        linear("q_proj", width, heads * config.head_dim)
    else:
        linear("q_a_proj", width, config.q_lora_rank, bias=config.qkv_bias)
        rows.add("norm", f"{path}/q_a_layernorm", "scale", (config.q_lora_rank,))
        linear("q_b_proj", config.q_lora_rank, heads * config.head_dim)
    rank = config.kv_lora_rank
    linear("kv_a_proj_with_mqa", width, rank + config.qk_rope_head_dim, bias=config.qkv_bias)
    rows.add("norm", f"{path}/kv_a_layernorm", "scale", (rank,))
    linear("kv_b_proj", rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
    out = (heads * config.v_head_dim, width)
    rows.linear("attention", f"{path}/o_proj", out, ROWS, config.o_bias)


def _attention(rows: KeyTable, config: DecoderConfig, attention: str, kind: LayerKind) -> None:
    width, (kv_heads, head_dim) = config.hidden_size, config.heads_of(kind)
    q_out, kv_out = config.num_attention_heads * head_dim, kv_heads * head_dim
    sizes = {"q": q_out * (1 + config.attn_output_gate), "k": kv_out, "v": kv_out}
    if config.attention_k_eq_v and kind.whole:
        del sizes["v"]
    if kind.reuses:
        sizes = {"q": q_out}
    if config.fused_projections:
        sizes = {"qkv": q_out + 2 * kv_out}
    for name, size in sizes.items():
        path = f"{attention}/{name}_proj"
        rows.linear("attention", path, (width, size), COLUMNS, config.qkv_bias)
    if config.qk_norm:
        joined = config.qk_norm_joins_heads
        for name, size in (("q", q_out), ("k", kv_out)):
            if name not in sizes and not config.fused_projections:
                continue
            rows.add("norm", f"{attention}/{name}_norm", "scale", (size if joined else head_dim,))
    rows.linear("attention", f"{attention}/o_proj", (q_out, width), ROWS, config.o_bias)
    if config.sinks:
        heads = (config.num_attention_heads,)
        rows.named("attention", f"{attention}/sinks", "{}.self_attn.sinks", heads, P("tensor"))


# Tensors of a bare decoder (transformers' AutoModel) come without the prefix.
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_OF_KEYS = re.compile(r"\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
_OF_TEXT = re.compile(r"^(?:model\.)?language_model\.(?:(lm_head\.)|model\.)?")
_BARE = re.compile(r"(embed_tokens|layers\.\d+|norm)\..+")


def decoder_name(name: str, config: DecoderConfig) -> str:
    """Returns the table's name of a file's tensor: with the prefix ``model.``.

    Files of a model with images put the decoder's tensors below ``language_model.``. Layers behind
    the last one, which predict tokens further on (MTP), are named "further" where the family leaves
    them out, and keys and values of layers that take those of others "unused".
    """
    if config.family.with_images is not None:
        name = _OF_TEXT.sub(lambda match: match[1] or "model.", name)
    if match := _LAYER.match(name):
        layer = int(match[1])
        further, left_out = f"further.{name}", config.family.left_out
        if layer >= config.num_hidden_layers and left_out and left_out.fullmatch(further):
            return further
        if config.kind_of(layer).reuses and _OF_KEYS.search(name):
            return f"unused.{name}"
    return f"model.{name}" if _BARE.fullmatch(name) else name


def has_fused_experts(config: DecoderConfig) -> bool:
    """Returns True if files hold all experts of a layer in one tensor, as we do: gpt-oss's."""
    return len(config.family.expert_names) == 2


_FUSED = re.compile(
    r"((?:model\.)?(?:language_model\.)?layers\.\d+)\.mlp\.(experts\.gate_up_proj|experts\.down_proj|gate\.weight)"
)


def decoder_parts(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, SubTensor]:
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
    parts: dict[str, SubTensor] = {}
    if has_fused_experts(config) or not any(
        name.endswith(".mlp.experts.gate_up_proj") for name in shapes
    ):
        return parts
    gate, up, down = config.family.expert_names
    inner = config.moe_intermediate_size
    halves = {gate: slice(0, inner), up: slice(inner, None)}
    for name, shape in shapes.items():
        if (match := _FUSED.fullmatch(name)) is None:
            continue
        mlp = f"{match[1]}.{config.family.mlp_name}"
        if match[2] == "gate.weight":
            parts[f"{mlp}.gate.weight"] = SubTensor(name, ())
            continue
        for expert in range(shape[0]):
            hf = f"{mlp}.experts.{expert}"
            if match[2] == "experts.down_proj":
                parts[f"{hf}.{down}.weight"] = SubTensor(name, (expert,))
            else:
                for kernel, half in halves.items():
                    parts[f"{hf}.{kernel}.weight"] = SubTensor(name, (expert, half))
    return parts
