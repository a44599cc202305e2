"""GGUF files, written here as llama.cpp writes them."""

from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from lora_jax.models import (
    ConfigError,
    DecoderConfig,
    WeightsError,
    from_pretrained,
    generate,
    hf_tensors,
    key_table,
)
from tests.hf.trees import decoder
from tests.models import tiny

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(
    path: Path, case: str | DecoderConfig, params: Any, kind: str = "F32", **extra: Any
) -> None:
    """A GGUF file of the case; ``extra`` are metadata under the architecture's name."""
    config = tiny.config(case) if isinstance(case, str) else case
    arch = "qwen3" if config.qk_norm else config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_eos_token_id(7)
    for name, value in extra.items():
        if isinstance(value, str):
            writer.add_string(name.replace("__", "."), value)
        else:
            writer.add_uint32(name.replace("__", "."), value)
    for name, tensor in hf_tensors(params, key_table(config)):
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = interleave(tensor, heads)
        parts = name.split(".")
        prefix = ""
        if "layers" in parts:
            prefix = f"blk.{parts[2]}."
            parts = parts[3:]
        target = f"{prefix}{NAMES['.'.join(parts[:-1])]}.{parts[-1]}"
        quantised = kind if tensor.ndim == 2 else "F32"
        data = gguf.quantize(tensor, gguf.GGMLQuantizationType[quantised])
        writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType[quantised])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of each head is the old row i, row 2i + 1 the old row i + head_dim / 2."""
    out = np.empty_like(tensor)
    dim = len(tensor) // heads
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + 2 * i] = tensor[head * dim + i]
            out[head * dim + 2 * i + 1] = tensor[head * dim + i + dim // 2]
    return out


@pytest.mark.parametrize("case", ["llama2", "smollm2", "llama with biases", "qwen2", "qwen3"])
def test_a_file_is_read_bitwise(case: str, tmp_path: Path) -> None:
    model, params = decoder(case)
    path = tmp_path / "model.gguf"
    write(path, case, params)
    again, loaded = from_pretrained(path)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    ours, theirs = model.config, again.config
    for name in ("head_dim", "rms_norm_eps", "rope_theta", "qkv_bias", "o_bias", "mlp_bias"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert theirs.tie_word_embeddings == ours.tie_word_embeddings
    assert theirs.eos_token_ids == (7,)


def test_a_file_is_parsed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, params = decoder("llama2")
    path, parsed = tmp_path / "model.gguf", []
    init = gguf.GGUFReader.__init__

    def counted(self: Any, *args: Any) -> None:
        parsed.append(args)
        init(self, *args)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    write(path, "llama2", params)
    one, same = from_pretrained(path)[1], from_pretrained(path)[1]
    assert len(parsed) == 1
    write(path, "llama2", jax.tree.map(lambda x: 2 * x, params))  # of the same size
    other = from_pretrained(path)[1]
    assert len(parsed) == 2
    jax.tree.map(np.testing.assert_array_equal, one, same)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(2 * x, y), one, other)


def test_quantised_weights_are_dequantised(tmp_path: Path) -> None:
    _, params = decoder("llama2")
    path = tmp_path / "model.gguf"
    write(path, "llama2", params, "F16")
    _, loaded = from_pretrained(path)
    kernel = ("model", "layers", "mlp", "up_proj", "kernel")
    got, want = loaded, params
    for name in kernel:
        got, want = got[name], want[name]
    np.testing.assert_array_equal(got, np.asarray(want).astype(np.float16).astype(np.float32))


@pytest.mark.slow
def test_a_gguf_model_generates_to_its_eos(tmp_path: Path) -> None:
    _, params = decoder("smollm2")
    path = tmp_path / "model.gguf"
    write(path, "smollm2", params)
    model, loaded = from_pretrained(path)
    tokens = np.asarray(generate(model, loaded, tiny.tokens(0, 2, 4), max_new_tokens=3))
    assert tokens.shape == (2, 3)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama__expert_count": 4}, "llama.expert_count=4 is not supported"),
        ({"llama__rope__dimension_count": 8}, "rope.dimension_count=8.*only 4 is"),
        ({"llama__rope__scaling__type": "yarn"}, "RoPE scaling 'yarn'"),
    ],
)
def test_options_are_refused_by_name(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, params = decoder("llama2")
    path = tmp_path / "model.gguf"
    write(path, "llama2", params, **extra)
    with pytest.raises(ConfigError, match=f"{path}: .*{message}"):
        from_pretrained(path)


def test_what_is_damaged_or_unknown_is_named(tmp_path: Path) -> None:
    _, params = decoder("llama2")
    path = tmp_path / "model.gguf"
    write(path, "llama2", params)
    whole = path.read_bytes()
    for keep in (3, 300, len(whole) - 200):
        path.write_bytes(whole[:keep])
        with pytest.raises(WeightsError, match=f"{path} is damaged or cut short"):
            from_pretrained(path)
    writer = gguf.GGUFWriter(path, "gemma")
    writer.add_tensor("token_embd.weight", np.zeros((3, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="architecture 'gemma' is not supported.*llama"):
        from_pretrained(path)
