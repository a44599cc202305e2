"""Converts a decoder for llama.cpp: unsupported properties, metadata, and tensors."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.types import Leaf
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.gguf.write import import_gguf
from lora_jax.hf.keys import Row, hf_tensor_of_member
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.families.registry import FAMILIES
from lora_jax.models.decoder.gguf import ROPE_FACTORS, order_rows_as_gguf
from lora_jax.models.decoder.keys import decoder_table, has_fused_experts
from lora_jax.models.decoder.rope import compute_frequencies

Shape = tuple[int, ...]
_SILU, _TANH = ("silu", "swish"), ("gelu_pytorch_tanh",)
# What llama.cpp computes, by architecture, where a configuration may ask for something else.
_PATTERNS = {"gemma3": 6, "gpt-oss": 2}  # each last layer of so many has no window
_WITH_O_BIAS = ("llama", "gpt-oss")
_WITH_HEADS_OF_ANY_SIZE = ("llama", "qwen3", "qwen3moe", "gemma3", "gpt-oss")
_ROPE_KINDS = {"llama": ("linear", "llama3", "yarn", "longrope"), "phi3": ("longrope",)}


class Piece(NamedTuple):
    """A tensor of a GGUF file, as part of one parameter.

    Attributes:
      name: the name of the tensor in the file, a text.
      shape: rows first.
      row: the parameter's row in the key table.
      read: the parameter's leaf -> the tensor, fp32.
    """

    name: str
    shape: Shape
    row: Row
    read: Callable[[Leaf], np.ndarray]


def check_form(config: Any) -> list[str]:
    """Checks that llama.cpp supports a model.

    Args:
      config: a configuration of any family.

    Returns:
      Where it runs the model in another way; mostly nothing.

    Raises:
      ConfigError: it does not; says why, and what to do.
    """
    if not isinstance(config, DecoderConfig) or config.family.gguf is None:
        names = ", ".join(family.model_type for family in FAMILIES.values() if family.gguf)
        raise ConfigError(
            f"A {config.model_type} model cannot be written as a GGUF file; {names} can. Write "
            "safetensors (--output), and try llama.cpp's convert_hf_to_gguf.py."
        )
    problems = list(_unsupported_properties(config))
    if problems:
        raise ConfigError(
            f"llama.cpp cannot run a {config.model_type} model with {'; '.join(problems)}. Write "
            "safetensors (--output), and serve the model by vLLM or transformers."
        )
    return list(_differences(config))


def _unsupported_properties(config: DecoderConfig) -> Iterator[str]:
    """Yields the properties of a model that llama.cpp does not support."""
    arch = config.family.gguf
    has_usual_heads = config.num_attention_heads * config.head_dim == config.hidden_size
    if config.hidden_act not in (_TANH if arch == "gemma3" else _SILU):
        yield f"the activation {config.hidden_act}"
    if config.o_bias and arch not in _WITH_O_BIAS:
        yield "a bias on o_proj"
    if arch == "gpt-oss" and not (config.qkv_bias and config.o_bias):
        yield "no biases in attention"
    if config.mlp_bias and arch != "llama":
        yield "biases in the MLP"
    if not has_usual_heads and arch not in _WITH_HEADS_OF_ANY_SIZE:
        yield f"head_dim {config.head_dim}, which is not hidden_size / num_attention_heads"
    if arch == "qwen3moe" and not config.norm_topk_prob:
        yield "norm_topk_prob false: it always makes the weights of a token's experts add up to 1"
    if config.windowed_layers and arch in ("qwen2", "qwen3", "qwen3moe"):
        yield f"a sliding window (of {config.sliding_window} tokens)"
    if arch == "gpt-oss" and (config.swiglu_limit, config.swiglu_alpha) != (7.0, 1.702):
        yield f"swiglu_limit {config.swiglu_limit} and swiglu_alpha {config.swiglu_alpha}"
    if arch == "gpt-oss" and not config.windowed_layers:
        yield "no sliding window"
    if arch == "gpt-oss" and config.tie_word_embeddings:
        yield "a head tied to the embedding"
    if arch == "gemma3" and not math.isclose(config.score_scale, _gemma_scale(config)):
        yield f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
    if config.partial_rotary_factor != 1 and arch != "phi3":
        yield f"partial_rotary_factor {config.partial_rotary_factor}"
    # The rest concerns RoPE's scaling.
    scaling = config.rope_scaling
    if scaling is None:
        return
    kinds = _ROPE_KINDS.get(str(arch), ("linear", "yarn"))
    if scaling.kind not in kinds:
        yield f"RoPE scaling {scaling.kind!r} ({', '.join(kinds)} it has)"
    if scaling.kind == "yarn":
        usual = 0.1 * math.log(scaling.factor) + 1
        if not math.isclose(scaling.attention_factor, usual, rel_tol=1e-6):
            yield f"YaRN's attention_factor {scaling.attention_factor}, where {usual:g} is usual"
        truncate = arch != "gpt-oss" or scaling.truncate
        if not _has_same_frequencies(config, beta_fast=32.0, beta_slow=1.0, truncate=truncate):
            yield (
                f"YaRN's beta_fast {scaling.beta_fast}, beta_slow {scaling.beta_slow} and truncate "
                f"{scaling.truncate}: it computes 32, 1 and true"
            )


def _has_same_frequencies(config: DecoderConfig, **changes: Any) -> bool:
    """Returns True if RoPE's frequencies stay equal with other scaling fields."""
    assert config.rope_scaling is not None
    scaling = dataclasses.replace(config.rope_scaling, **changes)
    changed = dataclasses.replace(config, rope_scaling=scaling)
    return np.allclose(
        compute_frequencies(config, 0), compute_frequencies(changed, 0), rtol=1e-6, atol=0
    )


def _gemma_scale(config: DecoderConfig) -> float:
    """Returns llama.cpp's scale of attention scores, which differs for 62 layers (27B)."""
    size = config.head_dim
    if config.num_hidden_layers == 62:
        size = config.hidden_size // config.num_attention_heads
    return float(size**-0.5)


def _differences(config: DecoderConfig) -> Iterator[str]:
    """Yields a sentence for each computation in which llama.cpp differs."""
    if config.windowed_layers and config.family.gguf == "phi3":
        yield (
            f"llama.cpp ignores this model's window: beyond {config.sliding_window} tokens its "
            "answers differ"
        )
    scaling = config.rope_scaling
    is_yarn = scaling is not None and scaling.kind == "yarn"
    if is_yarn and not _has_same_frequencies(config, truncate=True):
        yield (
            "llama.cpp rounds the bounds of YaRN's blend to whole dimensions, which this model "
            "does not. With random weights, log-probabilities differ by 0.02 on average in texts "
            "of 128 tokens and by 0.14 in texts of 4,000, and single ones by up to 2"
        )


def metadata_of(config: DecoderConfig) -> dict[str, Any]:
    """Returns the GGUF metadata of a configuration.

    Args:
      config: one that passes `check_form`.
    """
    arch = config.family.gguf
    scaling = config.rope_scaling
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size or config.moe_intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.num_experts:
        fields |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.moe_intermediate_size,
        }
    if arch == "phi3" or config.windowed_layers:
        fields["attention.sliding_window"] = config.sliding_window or 0
    pattern_size = _PATTERNS.get(str(arch))
    if pattern_size and config.windowed_layers:
        layers = range(config.num_hidden_layers)
        has_window = [layer in config.windowed_layers for layer in layers]
        usual_pattern = [(layer + 1) % pattern_size != 0 for layer in layers]
        if has_window != usual_pattern:
            fields["attention.sliding_window_pattern"] = has_window
    if config.rope_local_theta is not None:
        fields["rope.freq_base_swa"] = float(config.rope_local_theta)
    if config.final_logit_softcapping is not None:
        fields["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if arch == "phi3":
        fields["rope.scaling.original_context_length"] = config.max_position_embeddings
    if scaling is not None and not _has_fixed_factors(config):
        fields |= _scaling_fields(config)
    return {f"{arch}.{name}": value for name, value in fields.items()}


def _has_fixed_factors(config: DecoderConfig) -> bool:
    """Returns True if factors divide RoPE's frequencies at every text length."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("llama3", "longrope"):
        return False
    is_plain = scaling.short_factor == scaling.long_factor and scaling.attention_factor == 1
    return scaling.kind == "llama3" or (is_plain and config.family.gguf == "llama")


def _scaling_fields(config: DecoderConfig) -> dict[str, Any]:
    """Returns the metadata of the configuration's RoPE scaling."""
    scaling = config.rope_scaling
    assert scaling is not None
    fields: dict[str, Any] = {"rope.scaling.type": scaling.kind}
    if scaling.kind == "linear":
        fields["rope.scaling.factor"] = float(scaling.factor)
        return fields
    fields["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
    if scaling.kind == "longrope":
        fields["rope.scaling.attn_factor"] = float(scaling.attention_factor)
        return fields
    fields["rope.scaling.factor"] = float(scaling.factor)
    fields["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
    fields["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    return fields


def rope_factor_tensors(config: DecoderConfig) -> dict[str, np.ndarray]:
    """Returns the tensors that are not parameters: RoPE's factors, fp32."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("llama3", "longrope"):
        return {}
    if scaling.kind == "longrope" and _has_fixed_factors(config):
        return {ROPE_FACTORS: np.asarray(scaling.short_factor, np.float32)}
    if scaling.kind == "longrope":
        return {
            "rope_factors_long.weight": np.asarray(scaling.long_factor, np.float32),
            "rope_factors_short.weight": np.asarray(scaling.short_factor, np.float32),
        }
    unscaled_config = dataclasses.replace(config, rope_scaling=None)
    unscaled_frequencies = np.asarray(compute_frequencies(unscaled_config, 0))
    factors = unscaled_frequencies / np.asarray(compute_frequencies(config, 0))
    # The formula leaves a frequency or divides it by the factor: rounding is taken back.
    for exact_factor in (1.0, scaling.factor):
        is_factor = np.isclose(factors, exact_factor, rtol=1e-6, atol=0)
        factors = np.where(is_factor, exact_factor, factors)
    return {ROPE_FACTORS: factors.astype(np.float32)}


def make_gguf_namer(config: DecoderConfig) -> Callable[[str], str]:
    """Returns a function that maps Hugging Face's tensor names to GGUF's."""
    gguf = import_gguf()
    architectures = [
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.family.gguf
    ]
    (architecture,) = architectures
    name_map = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)

    def gguf_name(hf_name: str) -> str:
        """Returns the GGUF name of a tensor."""
        name = name_map.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigError(
                f"The package gguf has no tensor for {hf_name} in its architecture "
                f"{config.family.gguf}. Run: pip install -U gguf"
            )
        return str(name)

    return gguf_name


def pieces(config: DecoderConfig) -> Iterator[Piece]:
    """Yields the GGUF tensors of a model's parameters."""
    gguf_name = make_gguf_namer(config)
    for row in decoder_table(config):
        layers: Sequence[int | None] = range(row.stack[0]) if row.stack else [None]
        for layer in layers:
            yield from _pieces_of(config, row, layer, gguf_name)


def _pieces_of(
    config: DecoderConfig, row: Row, layer: int | None, gguf_name: Callable[[str], str]
) -> Iterator[Piece]:
    """Yields the GGUF tensors of a key table row, for one layer of a stack."""
    if layer is None:
        yield Piece(
            name=gguf_name(row.hf),
            shape=row.hf_shape,
            row=row,
            read=lambda leaf: _read_plain(config, row, leaf, ()),
        )
    elif len(row.stack) == 2:  # experts, which a GGUF file has in one tensor
        n_experts = row.stack[1]
        hf_name = row.hf.format(layer, "").replace("..", ".")
        yield Piece(
            name=gguf_name(hf_name),
            shape=(n_experts, *row.hf_shape),
            row=row,
            read=lambda leaf: _read_stacked(row, leaf, layer),
        )
    elif row.kind == "experts" and has_fused_experts(config):
        yield from _fused_pieces(row, layer, gguf_name)
    else:
        hf_name = row.hf.format(layer)
        if hf_name.endswith(".sinks"):
            hf_name += ".weight"
        yield Piece(
            name=gguf_name(hf_name),
            shape=row.hf_shape,
            row=row,
            read=lambda leaf: _read_plain(config, row, leaf, (layer,)),
        )


def _read_plain(config: DecoderConfig, row: Row, leaf: Leaf, index: tuple[int, ...]) -> np.ndarray:
    """Returns one member of a leaf as llama.cpp stores it, fp32."""
    array = np.asarray(hf_tensor_of_member(row, leaf, index), np.float32)
    if row.kind == "norm" and config.norm_adds_one:
        return array + np.float32(1)
    return order_rows_as_gguf(array, row.hf, config)


def _read_stacked(row: Row, leaf: Leaf, layer: int) -> np.ndarray:
    """Returns a layer's expert kernels as one array, fp32."""
    n_experts = row.stack[1]
    kernels = np.empty((n_experts, *row.hf_shape), np.float32)
    for expert in range(n_experts):
        kernels[expert] = hf_tensor_of_member(row, leaf, (layer, expert))
    return kernels


def _fused_pieces(row: Row, layer: int, gguf_name: Callable[[str], str]) -> Iterator[Piece]:
    """Yields the tensors of gpt-oss's fused experts, [experts, out, in], or their biases."""
    hf_name = row.hf.format(layer)
    is_bias = hf_name.endswith("_bias")
    stem = hf_name.removesuffix("_bias")
    suffix = ".bias" if is_bias else ".weight"
    n_experts, *kernel_sizes = row.shape
    projections = projections_in_fused(stem)
    out_size = kernel_sizes[-1] // len(projections)
    shape = (n_experts, out_size) if is_bias else (n_experts, out_size, kernel_sizes[0])
    for name, columns in projections:

        def read(leaf: Leaf, columns: slice = columns) -> np.ndarray:
            array = np.asarray(hf_tensor_of_member(row, leaf, (layer,))[..., columns], np.float32)
            return array if is_bias else np.ascontiguousarray(array.swapaxes(-1, -2))

        yield Piece(name=gguf_name(name + suffix), shape=shape, row=row, read=read)


def projections_in_fused(stem: str) -> Sequence[tuple[str, slice]]:
    """Returns the projections in a fused gpt-oss tensor, with their output slices."""
    if not stem.endswith(".gate_up_proj"):
        return [(stem, slice(None))]
    base = stem.removesuffix("gate_up_proj")
    return [(f"{base}gate_proj", slice(0, None, 2)), (f"{base}up_proj", slice(1, None, 2))]
