"""The two-way key table: Hugging Face's tensor names and layouts, and ours.

One row per parameter, from the configuration alone. Reading and writing both follow it, and
``check`` holds a file against it: nothing may be missing, left over, or of another shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lora_jax.models.config import DecoderConfig


class WeightsError(ValueError):
    """Weights that cannot be read, or do not fit the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter, as both sides store it.

    Attributes:
      path: ours, "/"-joined: ``model/layers/mlp/up_proj/kernel``.
      hf: Hugging Face's name, with ``{}`` for the layer's number in a stacked parameter.
      shape: ours, of one layer: [in, out] for a kernel.
      layers: how many layers are stacked on axis 0; None for a parameter that is not stacked.
      transpose: whether Hugging Face stores [out, in].
    """

    path: str
    hf: str
    shape: tuple[int, ...]
    layers: int | None
    transpose: bool

    @property
    def hf_names(self) -> list[str]:
        """Hugging Face's names, in the order of the layers."""
        return [self.hf] if self.layers is None else [self.hf.format(i) for i in range(self.layers)]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of each of Hugging Face's tensors."""
        return self.shape[::-1] if self.transpose else self.shape

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """Our shape, with the stack of layers in front."""
        return self.shape if self.layers is None else (self.layers, *self.shape)


def key_table(config: DecoderConfig) -> list[Row]:
    """Every parameter of the decoder, once, in the order of the forward pass."""
    rows: list[Row] = []

    def add(path: str, leaf: str, shape: tuple[int, ...], *, stacked: bool = True) -> None:
        hf_leaf = "bias" if leaf == "bias" else "weight"
        rows.append(
            Row(
                path=f"{path}/{leaf}",
                hf=f"{path}/{hf_leaf}".replace("/", ".").replace("layers.", "layers.{}."),
                shape=shape,
                layers=config.num_hidden_layers if stacked else None,
                transpose=leaf == "kernel",
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


def is_harmless_extra(name: str, config: DecoderConfig) -> bool:
    """Whether a tensor beyond the table holds nothing that the model lacks.

    Old files carry RoPE's frequencies, which are derived; files of tied models may carry the
    embedding a second time as the head. (The loader checks that the second is the same.)
    """
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_word_embeddings and name == "lm_head.weight"
    )


def check(shapes: Mapping[str, tuple[int, ...]], config: DecoderConfig, where: str) -> None:
    """Holds a file's tensors against the table.

    Args:
      shapes: Hugging Face's name -> shape, for all tensors in the file or folder.
      config: the decoder's.
      where: the file or folder, for the message.

    Raises:
      WeightsError: one error that lists every missing, unexpected and misshaped tensor.
    """
    expected = {name: row.hf_shape for row in key_table(config) for name in row.hf_names}
    missing = [f"missing {name} {list(expected[name])}" for name in expected if name not in shapes]
    unexpected = [
        f"unexpected {name} {list(shapes[name])}"
        for name in shapes
        if name not in expected and not is_harmless_extra(name, config)
    ]
    misshaped = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if problems := missing + unexpected + misshaped:
        raise WeightsError(
            f"{where} does not fit the model's configuration: {len(missing)} missing, "
            f"{len(unexpected)} unexpected, {len(misshaped)} misshaped\n  " + "\n  ".join(problems)
        )


def to_hf(params: Mapping[str, Any], config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face's tensors of a parameter tree, one at a time.

    Args:
      params: the tree, with every parameter of the table and nothing else.
      config: the decoder's.

    Yields:
      (name, array): contiguous, in Hugging Face's layout and the parameter's dtype.

    Raises:
      WeightsError: one error that lists every missing, unexpected and misshaped parameter.
    """
    leaves = dict(_leaves(params))
    rows = key_table(config)
    expected = {row.path: row.stacked_shape for row in rows}
    problems = [f"missing {path}" for path in expected if path not in leaves]
    problems += [f"unexpected {path}" for path in leaves if path not in expected]
    problems += [
        f"{path} is {list(np.shape(leaves[path]))}, expected {list(shape)}"
        for path, shape in expected.items()
        if path in leaves and np.shape(leaves[path]) != shape
    ]
    if problems:
        raise WeightsError(
            "the parameter tree does not fit its configuration\n  " + "\n  ".join(problems)
        )
    for row in rows:
        leaf = leaves[row.path]
        for i, name in enumerate(row.hf_names):
            array = np.asarray(leaf if row.layers is None else leaf[i])
            yield name, np.ascontiguousarray(array.T if row.transpose else array)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
