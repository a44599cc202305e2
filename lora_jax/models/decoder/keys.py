"""The decoder's key table, and the alternative file layout of experts.

Names of Hugging Face contain ``{}`` where the number of the layer stands. Experts are fused if a
file holds all those of a layer in one tensor.
"""

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
    d_model = config.hidden_size
    rows = KeyTable("model/layers", config.num_hidden_layers)
    head_names: tuple[str, ...] = ()
    if config.tie_word_embeddings:
        head_names = ("lm_head.weight",)
    words_shape = (config.vocab_size, d_model)
    rows.add("embedding", "model/embed_tokens", "embedding", words_shape, ROWS, aliases=head_names)
    if config.hidden_size_per_layer_input:
        _add_per_layer_inputs(rows, config)
    for stack_name, layer_indices in config.stacks.items():
        stack_path = "model/layers"
        if stack_name:
            rows.begin(stack_name, layer_indices)
            stack_path = f"model/layers/{stack_name}"
        _add_layer(rows, config, stack_path, config.kind_of(layer_indices[0]))
    rows.add("norm", "model/norm", "scale", (d_model,))
    if not config.tie_word_embeddings:
        rows.linear("head", "lm_head", (d_model, config.vocab_size), COLUMNS, bias=False)
    return rows


def _add_per_layer_inputs(rows: KeyTable, config: DecoderConfig) -> None:
    """Adds the token vectors for all layers, with their projection and norm."""
    size = config.hidden_size_per_layer_input
    all_sizes = config.num_hidden_layers * size
    table_shape = (config.vocab_size_per_layer_input, all_sizes)
    rows.add("positions", "model/embed_tokens_per_layer", "embedding", table_shape, ROWS)
    projection_shape = (config.hidden_size, all_sizes)
    rows.linear("mlp", "model/per_layer_model_projection", projection_shape, COLUMNS, bias=False)
    rows.add("norm", "model/per_layer_projection_norm", "scale", (size,))


def text_table(config: DecoderConfig, name: str) -> list[Row]:
    """Returns the decoder's rows for a model that contains it as ``model.{name}``."""
    rows = []
    for row in decoder_table(config):
        if row.path.startswith("model/"):
            path = row.path.removeprefix("model/")
            hf_name = row.hf.removeprefix("model.")
            row = dataclasses.replace(
                row, path=f"model/{name}/{path}", hf=f"model.{name}.{hf_name}"
            )
        rows.append(row)
    return rows


def _add_layer(rows: KeyTable, config: DecoderConfig, layer: str, kind: LayerKind) -> None:
    """Adds the parameters of the stack of layers at a path."""
    mlp = f"{layer}/{config.family.mlp_name}"
    d_model = config.hidden_size

    def add_norm(name: str) -> None:
        rows.add("norm", f"{layer}/{name}", "scale", (d_model,))

    if config.pre_norms:
        add_norm("input_layernorm")
    if kind.linear:
        _add_linear_attention(rows, config, f"{layer}/linear_attn")
    elif config.kv_lora_rank:
        _add_latent_attention(rows, config, f"{layer}/self_attn")
    else:
        _add_attention(rows, config, f"{layer}/self_attn", kind)
    add_norm("post_attention_layernorm")
    if config.pre_norms and config.post_norms:
        add_norm("pre_feedforward_layernorm")
    if kind.sparse:
        _add_mixture(rows, config, mlp)
    else:
        is_double_wide = kind.reuses_keys and config.use_double_wide_mlp
        d_mlp = config.intermediate_size
        _add_mlp(rows, config, mlp, 2 * d_mlp if is_double_wide else d_mlp)
    if config.post_norms:
        add_norm("post_feedforward_layernorm")
    size = config.hidden_size_per_layer_input
    if size:
        rows.linear("mlp", f"{layer}/per_layer_input_gate", (d_model, size), COLUMNS, bias=False)
        rows.linear("mlp", f"{layer}/per_layer_projection", (size, d_model), ROWS, bias=False)
        add_norm("post_per_layer_input_norm")
    if config.layer_scalars:
        rows.named("norm", f"{layer}/layer_scalar", "{}.layer_scalar", (1,), REPLICATED)


def _add_mixture(rows: KeyTable, config: DecoderConfig, mlp: str) -> None:
    """Adds a mixture of experts: its router, experts, and shared MLP."""
    family = config.family
    d_model = config.hidden_size
    n_experts = config.num_experts
    router = f"{mlp}/{family.router_name}"
    rows.linear("router", router, (d_model, n_experts), ROUTER, config.expert_biases)
    if config.sigmoid_router:
        hf_name = f"{{}}.{family.mlp_name}.{family.router_name}.{CORRECTION}"
        rows.named("router", f"{mlp}/{CORRECTION}", hf_name, (n_experts,), REPLICATED, wide=True)
    _add_experts(rows, config, f"{mlp}/experts")
    shared_size = config.shared_expert_intermediate_size
    if shared_size:
        shared_mlp = f"{mlp}/{family.shared_name}"
        _add_mlp(rows, config, shared_mlp, shared_size)
        if family.shared_is_gated:
            rows.linear("mlp", f"{shared_mlp}_gate", (d_model, 1), ROUTER, bias=False)


def _add_experts(rows: KeyTable, config: DecoderConfig, experts: str) -> None:
    """Adds the kernels of experts, and their biases if any."""
    down_name = [*config.expert_shapes][-1]
    for name, shape in config.expert_shapes.items():
        path = f"{experts}/{name}"
        kernel_spec = EXPERT_ROWS if name == down_name else EXPERT_COLUMNS
        if not has_fused_experts(config):
            n_experts = config.num_experts
            rows.add("experts", path, "kernel", shape, kernel_spec, experts=n_experts)
            continue
        hf_name = f"{{}}.mlp.experts.{name}"
        kernel_shape = (config.num_experts, *shape)
        rows.named("experts", f"{path}/kernel", hf_name, kernel_shape, kernel_spec)
        bias_spec = P("expert", None) if name == down_name else P("expert", "tensor")
        bias_shape = (config.num_experts, shape[1])
        rows.named("experts", f"{path}/bias", f"{hf_name}_bias", bias_shape, bias_spec)


def _add_mlp(rows: KeyTable, config: DecoderConfig, path: str, d_mlp: int) -> None:
    """Adds a gated MLP; some files fuse gate and up into one tensor."""
    d_model = config.hidden_size
    out_sizes = {"gate": d_mlp, "up": d_mlp}
    if config.fused_projections:
        out_sizes = {"gate_up": 2 * d_mlp}
    for name, out_size in out_sizes.items():
        rows.linear("mlp", f"{path}/{name}_proj", (d_model, out_size), COLUMNS, config.mlp_bias)
    rows.linear("mlp", f"{path}/down_proj", (d_mlp, d_model), ROWS, config.mlp_bias)


def _add_linear_attention(rows: KeyTable, config: DecoderConfig, path: str) -> None:
    """Adds a ``GatedDeltaNet``."""
    (_, n_channels), (n_heads, _, value_dim) = config.recurrent_shapes
    d_model = config.hidden_size
    for letters in config.linear_projections:
        out_size = sum(config.linear_sizes[letter] for letter in letters)
        rows.linear(
            "attention", f"{path}/in_proj_{letters}", (d_model, out_size), COLUMNS, bias=False
        )
    taps_name = "{}.linear_attn.conv1d.weight"
    taps_shape = (n_channels, 1, config.linear_conv_kernel_dim)
    rows.named("attention", f"{path}/conv1d", taps_name, taps_shape, REPLICATED)
    for name in ("A_log", "dt_bias"):
        hf_name = f"{{}}.linear_attn.{name}"
        rows.named("attention", f"{path}/{name}", hf_name, (n_heads,), REPLICATED)
    rows.add("norm", f"{path}/norm", "scale", (value_dim,))
    out_shape = (n_heads * value_dim, d_model)
    rows.linear("attention", f"{path}/out_proj", out_shape, ROWS, bias=False)


def _add_latent_attention(rows: KeyTable, config: DecoderConfig, path: str) -> None:
    """Adds attention with keys and values from a low-rank latent vector (MLA)."""
    d_model = config.hidden_size
    n_heads = config.num_attention_heads
    q_rank = config.q_lora_rank
    kv_rank = config.kv_lora_rank
    q_size = n_heads * config.head_dim

    def add_linear(name: str, in_size: int, out_size: int, *, bias: bool = False) -> None:
        is_shared_by_heads = "_a_" in name
        spec = ROUTER if is_shared_by_heads else COLUMNS
        rows.linear("attention", f"{path}/{name}", (in_size, out_size), spec, bias)

    if q_rank is None:
        add_linear("q_proj", d_model, q_size)
    else:
        add_linear("q_a_proj", d_model, q_rank, bias=config.qkv_bias)
        rows.add("norm", f"{path}/q_a_layernorm", "scale", (q_rank,))
        add_linear("q_b_proj", q_rank, q_size)
    latent_size = kv_rank + config.qk_rope_head_dim
    add_linear("kv_a_proj_with_mqa", d_model, latent_size, bias=config.qkv_bias)
    rows.add("norm", f"{path}/kv_a_layernorm", "scale", (kv_rank,))
    kv_head_size = config.qk_nope_head_dim + config.v_head_dim
    add_linear("kv_b_proj", kv_rank, n_heads * kv_head_size)
    out_shape = (n_heads * config.v_head_dim, d_model)
    rows.linear("attention", f"{path}/o_proj", out_shape, ROWS, config.o_bias)


def _add_attention(rows: KeyTable, config: DecoderConfig, path: str, kind: LayerKind) -> None:
    """Adds attention with separate queries, keys and values."""
    d_model = config.hidden_size
    n_kv_heads, head_dim = config.heads_of(kind)
    q_size = config.num_attention_heads * head_dim
    kv_size = n_kv_heads * head_dim
    has_projection = {"q": True, "k": not kind.reuses_keys or config.fused_projections}
    if config.fused_projections:
        out_sizes = {"qkv": q_size + 2 * kv_size}
    elif kind.reuses_keys:
        out_sizes = {"q": q_size}
    else:
        gated_q_size = 2 * q_size if config.attn_output_gate else q_size
        out_sizes = {"q": gated_q_size, "k": kv_size}
        values_are_keys = config.attention_k_eq_v and kind.has_global_heads
        if not values_are_keys:
            out_sizes["v"] = kv_size
    for name, out_size in out_sizes.items():
        rows.linear(
            "attention", f"{path}/{name}_proj", (d_model, out_size), COLUMNS, config.qkv_bias
        )
    if config.qk_norm:
        for name, size in (("q", q_size), ("k", kv_size)):
            if has_projection[name]:
                norm_size = size if config.qk_norm_joins_heads else head_dim
                rows.add("norm", f"{path}/{name}_norm", "scale", (norm_size,))
    rows.linear("attention", f"{path}/o_proj", (q_size, d_model), ROWS, config.o_bias)
    if config.sinks:
        sinks_shape = (config.num_attention_heads,)
        rows.named("attention", f"{path}/sinks", "{}.self_attn.sinks", sinks_shape, P("tensor"))


# Tensors of a bare decoder (transformers' AutoModel) come without the prefix.
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_KEY_OR_VALUE = re.compile(r"\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
_TEXT_PREFIX = re.compile(r"^(?:model\.)?language_model\.(?:(lm_head\.)|model\.)?")
_WITHOUT_PREFIX = re.compile(r"(embed_tokens|layers\.\d+|norm)\..+")


def decoder_name(name: str, config: DecoderConfig) -> str:
    """Returns the table's name of a stored tensor, with the prefix ``model.``.

    Files of a model with images put the decoder's tensors below ``language_model.``. Layers behind
    the last one, which predict tokens further on (MTP), are named "further" where the family leaves
    them out, and keys and values of layers that take those of others "unused".
    """
    family = config.family
    if family.with_images is not None:
        name = _TEXT_PREFIX.sub(lambda match: match[1] or "model.", name)
    layer_match = _LAYER.match(name)
    if layer_match:
        layer = int(layer_match[1])
        further_name = f"further.{name}"
        is_further_layer = layer >= config.num_hidden_layers
        if is_further_layer and family.left_out and family.left_out.fullmatch(further_name):
            return further_name
        if config.kind_of(layer).reuses_keys and _KEY_OR_VALUE.search(name):
            return f"unused.{name}"
    return f"model.{name}" if _WITHOUT_PREFIX.fullmatch(name) else name


def has_fused_experts(config: DecoderConfig) -> bool:
    """Returns True if files store all experts of a layer in one tensor, as gpt-oss does."""
    return len(config.family.expert_names) == 2


_FUSED_TENSOR = re.compile(
    r"((?:model\.)?(?:language_model\.)?layers\.\d+)\.mlp\.(experts\.gate_up_proj|experts\.down_proj|gate\.weight)"
)


def decoder_parts(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, SubTensor]:
    """Finds the table's tensors in a file that stores a layer's experts as two tensors.

    transformers 5 runs experts as gate_up_proj, [experts, 2 * inner, d_model], and down_proj,
    [experts, d_model, inner], under the name ``mlp`` in all families. It saves them as the table
    has them, unless asked for ``save_original_format=False``.

    Args:
      config: the decoder's.
      shapes: the names and shapes in the file.

    Returns:
      The table's name of each tensor -> its place in the file; {} for a file of another layout.
    """
    is_other_layout = any(name.endswith(".mlp.experts.gate_up_proj") for name in shapes)
    if has_fused_experts(config) or not is_other_layout:
        return {}
    parts: dict[str, SubTensor] = {}
    gate, up, down = config.family.expert_names
    d_expert = config.moe_intermediate_size
    for name, shape in shapes.items():
        match = _FUSED_TENSOR.fullmatch(name)
        if match is None:
            continue
        layer, tensor = match[1], match[2]
        mlp = f"{layer}.{config.family.mlp_name}"
        if tensor == "gate.weight":
            parts[f"{mlp}.gate.weight"] = SubTensor(name, ())
            continue
        n_experts = shape[0]
        for index in range(n_experts):
            expert = f"{mlp}.experts.{index}"
            if tensor == "experts.down_proj":
                parts[f"{expert}.{down}.weight"] = SubTensor(name, (index,))
            else:
                gate_rows = slice(0, d_expert)
                up_rows = slice(d_expert, None)
                parts[f"{expert}.{gate}.weight"] = SubTensor(name, (index, gate_rows))
                parts[f"{expert}.{up}.weight"] = SubTensor(name, (index, up_rows))
    return parts
