"""GGUF files, written here as llama.cpp writes them."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest

from lora_jax.models import (
    ConfigError,
    Decoder,
    DecoderConfig,
    WeightsError,
    from_pretrained,
    generate,
    hf_tensors,
    key_table,
    load_tokenizer,
    save_pretrained,
)
from tests.hf.trees import decoder
from tests.hf.vocabularies import sentencepiece
from tests.models import tiny
from tests.train.tiny import CONFIG
from tests.train.tiny import decoder as tiny_decoder

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
    path: Path,
    case: str | DecoderConfig,
    params: Any,
    kind: str | Callable[[str], str] = "F32",
    *,
    tokenizer: Mapping[str, Any] | None = None,
    factors: np.ndarray | None = None,
    split: int = 0,
    **extra: Any,
) -> None:
    """A GGUF file of the case.

    Args:
      path, case, params: the file, and its model.
      kind: the type of kernels, or of each by its name.
      tokenizer: metadata of a tokenizer.
      factors: rope_freqs.weight.
      split: tensors of a part of the file; 0 for one file.
      **extra: metadata under the architecture's name.
    """
    config = tiny.config(case) if isinstance(case, str) else case
    arch = "qwen3" if config.qk_norm else config.model_type
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    add(writer, tokenizer or {"tokenizer.ggml.eos_token_id": 7})
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
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
        quantised = kind if isinstance(kind, str) else kind(target)
        quantised = quantised if tensor.ndim == 2 else "F32"
        data = gguf.quantize(tensor, gguf.GGMLQuantizationType[quantised])
        writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType[quantised])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Adds metadata of a tokenizer."""
    for name, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        else:
            writer.add_uint32(name, value)


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


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({"eos": 3, "eot": 5, "eom": 4}, (3, 5, 4)),
        ({"eos": 3, "eot": 3}, (3,)),
        ({"eot": 5}, (5,)),
        ({"bos": 1}, ()),
    ],
)
def test_the_end_of_a_turn_is_an_end_as_that_of_a_text(
    ends: dict[str, int], expected: tuple[int, ...], tmp_path: Path
) -> None:
    _, params = decoder("llama2")
    metadata = {f"tokenizer.ggml.{name}_token_id": token for name, token in ends.items()}
    write(tmp_path / "model.gguf", "llama2", params, tokenizer=metadata)
    assert from_pretrained(tmp_path / "model.gguf")[0].config.eos_token_ids == expected


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


LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def factors_of(fields: dict[str, Any], head_dim: int) -> np.ndarray:
    """The rope_freqs.weight that llama.cpp's converter writes of a model's rope_parameters."""
    low, high, context = (
        fields[name]
        for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * fields["rope_theta"] ** (i / head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(fields["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / fields["factor"] + smooth))
    return np.array(factors, np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("rope", [LLAMA31, tiny.LLAMA3_ROPE], ids=["as Llama 3.1", "others"])
def test_factors_of_rope_scale_as_config_json_does(rope: dict[str, Any], tmp_path: Path) -> None:
    fields: dict[str, Any] = {"head_dim": 16}
    _, params = tiny_decoder(**fields)
    model = Decoder(DecoderConfig.from_hf({**CONFIG, **fields, "rope_parameters": rope}))
    factors = factors_of(rope, 16)
    assert factors[0] < factors[-2] <= factors[-1] == rope["factor"]
    write(tmp_path / "model.gguf", model.config, params, factors=factors)
    again, loaded = from_pretrained(tmp_path / "model.gguf")
    scaling = again.config.rope_scaling
    assert scaling.kind == ("llama3" if rope is LLAMA31 else "longrope")
    if rope is LLAMA31:
        assert scaling == model.config.rope_scaling
    ids = np.arange(48, dtype=np.int32)[None]
    want = np.asarray(tiny.run(model, params, ids))
    np.testing.assert_allclose(tiny.run(again, loaded, ids), want, atol=3e-4)  # of up to 7
    plain = Decoder(dataclasses.replace(again.config, rope_scaling=None))
    assert np.abs(np.asarray(tiny.run(plain, loaded, ids)) - want).max() > 1e-2
    # What config.json says of the scaling reads back as the same frequencies.
    kept = DecoderConfig.from_hf(again.config.to_hf())
    assert kept.rope_scaling == scaling


@pytest.mark.parity
@pytest.mark.parametrize("rope", [LLAMA31, tiny.LLAMA3_ROPE], ids=["as Llama 3.1", "others"])
def test_what_is_saved_scales_in_transformers(rope: dict[str, Any], tmp_path: Path) -> None:
    """A model of a GGUF file, written as safetensors, beside the original with its config.json."""
    import torch
    from transformers import AutoModelForCausalLM

    fields: dict[str, Any] = {"head_dim": 16}
    _, params = tiny_decoder(**fields)
    model = Decoder(DecoderConfig.from_hf({**CONFIG, **fields, "rope_parameters": rope}))
    save_pretrained(tmp_path / "original", model, params)
    write(tmp_path / "model.gguf", model.config, params, factors=factors_of(rope, 16))
    again, loaded = from_pretrained(tmp_path / "model.gguf")
    save_pretrained(tmp_path / "saved", again, loaded)
    ids = np.arange(200, dtype=np.int32)[None]

    def theirs(name: str) -> np.ndarray:
        torch_model = AutoModelForCausalLM.from_pretrained(
            tmp_path / name, attn_implementation="eager"
        )
        with torch.no_grad():
            logits: np.ndarray = torch_model.eval()(torch.tensor(ids)).logits.numpy()
        return logits

    want = theirs("original")
    tolerance = 1e-4 * np.abs(want).max()
    np.testing.assert_allclose(theirs("saved"), want, atol=tolerance, rtol=0)
    np.testing.assert_allclose(tiny.run(again, loaded, ids), want, atol=tolerance, rtol=0)


def test_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    _, params = decoder("llama2")
    path = tmp_path / "model.gguf"
    write(path, "llama2", params, factors=np.full(7, 2.0, np.float32))
    with pytest.raises(ConfigError, match="rope_freqs.weight has 7 factors, but RoPE has 2 freq"):
        from_pretrained(path)
    write(path, "llama2", params, factors=np.ones(2, np.float32))
    assert from_pretrained(path)[0].config.rope_scaling is None


def test_any_part_names_a_split_file(tmp_path: Path) -> None:
    _, params = decoder("llama2")
    write(tmp_path / "model.gguf", "llama2", params, split=5, tokenizer=sentencepiece())
    parts = sorted(tmp_path.iterdir())
    assert parts[0].name == f"model-00001-of-{len(parts):05}.gguf" and len(parts) > 3
    for part in (parts[0], parts[2]):
        model, loaded = from_pretrained(part)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        assert load_tokenizer(part).encode("x")
    parts[1].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(
        WeightsError, match=f"is part 3 of {len(parts)} .*are missing .*{parts[1].name}"
    ):
        from_pretrained(parts[2])
    with pytest.raises(WeightsError, match="elsewhere.gguf is part 2 of .*published names"):
        from_pretrained(tmp_path / "elsewhere.gguf")
    (tmp_path / "elsewhere.gguf").rename(parts[1])
    parts[1].write_bytes(parts[1].read_bytes()[:100])
    with pytest.raises(WeightsError, match=f"{parts[1].name} is damaged or cut short"):
        from_pretrained(parts[0])
