"""GGUF files that are written: read by the package gguf, and against bytes made by hand."""

import dataclasses
import json
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.hf.generation import Generation
from lora_jax.hf.gguf.tokenizer import build_tokenizer
from lora_jax.hf.gguf.vocabulary import tokenizer_metadata
from lora_jax.hf.gguf.write import GGUFTensor, write_gguf
from lora_jax.models.decoder.gguf_form import check_form
from tests.hf.vocabularies import TEXTS, byte_level, metadata_of, sentencepiece
from tests.models.tiny_gguf import FAMILIES, fields_of, make, phi3_words, words
from tests.support import assert_identical, lorafied, over, with_random_factors

RULE = lj.LoraRule(targets="all-linear", rank=3, alpha=7)


def read(path):
    """Returns a file's metadata, and its tensors by name."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor):
    array = gguf.dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(array, np.float32).reshape(tuple(reversed(tensor.shape.tolist())))


def paired(rows, heads):
    """Row i of a head's first half, and row i of its second, side by side."""
    split = np.split(rows, heads)
    halves = [np.split(head, 2) for head in split]
    return np.concatenate(
        [np.stack(half, 1).reshape(head.shape) for half, head in zip(halves, split, strict=True)]
    )


def test_a_model_reads_back_bit_for_bit(tmp_path):
    model, params = make("llama with biases")
    file = tmp_path / "m.gguf"
    assert models.save_gguf(file, model, params, gguf_type="f32", tokenizer=words()) == []
    again, loaded = models.from_pretrained(file)
    assert again.config == model.config
    assert_identical(loaded, params)
    fields, tensors = read(tmp_path / "m.gguf")
    q = np.asarray(params["model"]["layers"]["self_attn"]["q_proj"]["kernel"][1]).T
    np.testing.assert_array_equal(values(tensors["blk.1.attn_q.weight"]), paired(q, 4))
    assert not np.array_equal(values(tensors["blk.1.attn_q.weight"]), q)
    assert fields["tokenizer.chat_template"] == words().chat_template
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    tokenizer = models.load_tokenizer(tmp_path / "m.gguf")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == words()(text)["input_ids"]


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_types(kind, tmp_path):
    model, params = make("llama", intermediate_size=80)  # down's rows are no whole number of blocks
    notes = models.save_gguf(tmp_path / "m.gguf", model, params, gguf_type=kind, tokenizer=words())
    fields, tensors = read(tmp_path / "m.gguf")
    coded = kind in ("q8_0", "q4_0")
    assert any("blk.0.ffn_down.weight" in note for note in notes) == coded
    for name, tensor in tensors.items():
        want = kind.upper()
        if coded and "ffn_down" in name:
            want = "F16"
        if kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
            want = "Q8_0"
        if len(tensor.shape) == 1:
            want = "F32"
        assert tensor.tensor_type.name == want, name
    up = np.asarray(params["model"]["layers"]["mlp"]["up_proj"]["kernel"][2], np.float32).T
    codes = gguf.quantize(up, gguf.GGMLQuantizationType[kind.upper()])
    assert tensors["blk.2.ffn_up.weight"].data.tobytes() == codes.tobytes()
    assert fields["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


@over("family", FAMILIES, often=("qwen3_moe",))
def test_an_adapter_changes_what_the_file_of_the_merged_model_changes(family, tmp_path):
    model, params = make(family)
    tree = with_random_factors(lorafied(params, [RULE]))
    assert lp.save_gguf(tmp_path / "a.gguf", model, tree) == []
    for name, each in (("b", params), ("m", lj.merge(tree))):
        models.save_gguf(tmp_path / f"{name}.gguf", model, each, gguf_type="f32", tokenizer=words())
    (fields, factors), (_, base), (_, merged) = (read(tmp_path / f"{n}.gguf") for n in "abm")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 7
    changed = {
        name for name in base if not np.array_equal(values(base[name]), values(merged[name]))
    }
    assert changed == {name.rsplit(".", 1)[0] for name in factors}
    assert any("q" in name for name in changed)
    for name in changed:
        a, b = (values(factors[f"{name}.lora_{x}"]) for x in "ab")
        update = np.float32(fields["adapter.lora.alpha"] / b.shape[-1]) * (b @ a)
        want = values(merged[name]) - values(base[name])
        np.testing.assert_allclose(
            update, want, atol=1e-5 * max(1, np.abs(want).max()), err_msg=name
        )


def test_end_tokens_are_also_those_of_generation_config(tmp_path):
    model, params = make("qwen2")
    last = words().eos_token_id
    for ends, said in (([7, last, 8], None), ([7, 8, 9, 11], "lacks the tokens 9, 11. ")):
        file = Generation(json.dumps({"eos_token_id": ends, "pad_token_id": 13}))
        ending = model.clone(config=dataclasses.replace(model.config, generation=file))
        notes = models.save_gguf(
            tmp_path / "m.gguf", ending, params, tokenizer=words(), overwrite=True
        )
        assert (said in notes[0]) if said else notes == []
        read_back = models.from_pretrained(tmp_path / "m.gguf")[0].config
        assert (read_back.eos_token_ids, read_back.pad_token_id) == ((last, 7, 8), None)


def test_the_name_is_the_models_and_no_other_is_one_of_phi_3s(tmp_path):
    """llama.cpp drops the spaces behind special tokens by `general.name`."""
    sizes = {"vocab_size": len(phi3_words()) + 2, "bos_token_id": 1, "eos_token_id": 2}
    phi3, llama = make("phi3", **sizes), make("llama")
    same_chats = phi3_words().chat_template.replace("\\n", "").replace("\n", "")
    for file, (model, params), tokenizer, template, name in (
        ("sql", phi3, phi3_words(), None, "Phi-3"),
        ("phi-3-sql", phi3, phi3_words(), None, "Phi-3"),
        ("phi3-sql", llama, words(), None, "llama"),
        ("phi3", make("phi3"), words(), None, "phi"),
        ("kept", phi3, phi3_words("<|tool|>"), same_chats, "phi"),
    ):
        path = tmp_path / f"{file}.gguf"
        options = {"tokenizer": tokenizer, "chat_template": template}
        notes = models.save_gguf(path, model, params, **options)
        assert read(path)[0]["general.name"] == name
        assert [note.split(",")[0] for note in notes] == (
            ["the tokenizer drops the spaces beside </s>"] if template else []
        )
    with pytest.raises(models.ConfigError, match="other tokens of chats. Write safetensors"):
        models.save_gguf(tmp_path / "a.gguf", *phi3, tokenizer=phi3_words("<|tool|>"))


def test_a_base_keeps_its_name_unless_it_is_like_phi_3s(tmp_path):
    model, params = make("llama")
    base, again = tmp_path / "base.gguf", tmp_path / "again.gguf"
    models.save_gguf(base, model, params, tokenizer=words())
    for name, kept in (("My llama", b"My llama"), ("Phi-3 llama", b"phi llama")):
        reader = gguf.GGUFReader(base)
        fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF")}
        renamed = tmp_path / "renamed.gguf"
        entries = [
            GGUFTensor(t.name, values(t).shape, t.tensor_type.name, lambda t=t: t.data, True)
            for t in reader.tensors
        ]
        write_gguf(renamed, {**fields, "general.name": name}, entries)
        models.save_gguf(again, model, params, codes_from=renamed, overwrite=True)
        assert read(again)[0]["general.name"].encode() == kept


def test_scales_that_one_alpha_cannot_say(tmp_path):
    model, params = make("qwen2")
    rules = [
        lj.LoraRule(targets=["q_proj"], rank=3, alpha=7),
        lj.LoraRule(targets=["v_proj"], rank=5, alpha=2, scaling="alpha/sqrt(rank)"),
    ]
    tree = with_random_factors(lorafied(params, rules))
    (note,) = lp.save_gguf(tmp_path / "a.gguf", model, tree)
    assert "one alpha" in note and "3 of 6 tensors" in note
    fields, factors = read(tmp_path / "a.gguf")
    for name in "qv":
        node = tree["model"]["layers"]["self_attn"][f"{name}_proj"]["kernel"]
        a, b = (values(factors[f"blk.1.attn_{name}.weight.lora_{x}"]) for x in "ab")
        update = fields["adapter.lora.alpha"] / b.shape[-1] * (b @ a)
        dense = lj.merge({"w": node})["w"][1] - node.base[1]
        np.testing.assert_allclose(
            update, np.asarray(dense).T, atol=1e-5 * max(1, np.abs(dense).max())
        )


def test_a_scale_of_0_is_no_alpha(tmp_path):
    """llama.cpp takes an alpha of 0 for a scale of 1."""
    model, params = make("qwen2")
    tree = with_random_factors(lorafied(params, [RULE]))
    attention = tree["model"]["layers"]["self_attn"]
    for name in ("k_proj", "v_proj", "o_proj"):
        node = attention[name]["kernel"]
        attention[name]["kernel"] = node.replace(scale=0 * node.scale)
    tree["model"]["layers"]["mlp"] = params["model"]["layers"]["mlp"]
    lp.save_gguf(tmp_path / "a.gguf", model, tree)
    fields, factors = read(tmp_path / "a.gguf")
    assert fields["adapter.lora.alpha"] == 7
    assert {name.split(".")[2] for name in factors} == {"attn_q"}


def test_codes_that_the_adapter_left_alone_stay(tmp_path):
    model, params = make("llama")
    base = tmp_path / "base.gguf"
    models.save_gguf(base, model, params, gguf_type="q4_0", tokenizer=words())
    model, params = models.from_pretrained(base)
    rule = lj.LoraRule(targets=["q_proj"], layers=[1], rank=2, alpha=3)
    merged = lj.merge(with_random_factors(lorafied(params, [rule])))
    for codes_from, kept in ((base, "copied from the base"), (None, "")):
        notes = models.save_gguf(
            tmp_path / "m.gguf",
            model,
            merged,
            gguf_type="f16",
            tokenizer=None if codes_from else words(),
            codes_from=codes_from,
            overwrite=True,
        )
        assert kept in " ".join(notes)
        (_, before), (fields, after) = read(base), read(tmp_path / "m.gguf")
        same = {n for n in before if before[n].data.tobytes() == after[n].data.tobytes()}
        if codes_from:
            assert set(before) - same == {"blk.1.attn_q.weight"}
        else:
            assert "blk.0.attn_q.weight" not in same
    assert fields["tokenizer.ggml.pre"] == "llama-bpe"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
    ("qwen2", {"head_dim": 10}, "head_dim 10"),
    ("qwen3", {"attention_bias": True}, "a bias on o_proj"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, "a sliding window"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob false"),
    ("gemma3", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar 7"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0"),
    ("gpt_oss", {"attention_bias": False}, "no biases in attention"),
    ("llama", {"rope_parameters": {**YARN, "beta_slow": 0.25}}, "beta_slow 0.25"),
    ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "truncate False"),
    ("qwen3", {"rope_scaling": {**YARN, "beta_slow": 0.25}}, "beta_slow 0.25"),
    ("gpt_oss", {"rope_scaling": {**YARN, "beta_slow": 0.25, "truncate": False}}, "beta_slow"),
    ("qwen3", {"rope_parameters": FAMILIES["llama"]["rope_parameters"]}, "RoPE scaling 'llama3'"),
]


@pytest.mark.parametrize("family, fields, said", REFUSED)
def test_models_that_llama_cpp_does_not_run(family, fields, said):
    assert check_form(models.read_config(fields_of(family))) == []
    with pytest.raises(models.ConfigError, match="llama.cpp cannot run .*--output") as caught:
        check_form(models.read_config(fields_of(family, **fields)))
    assert said in str(caught.value)


def test_differences_that_llama_cpp_has():
    """Betas count where they change RoPE; gpt-oss's own bounds are written, with a note."""
    for family in ("llama", "gpt_oss"):
        same = fields_of(family, rope_parameters={**YARN, "beta_fast": 16.0, "rope_theta": 150.0})
        assert check_form(models.read_config(same)) == []
    own = fields_of("gpt_oss", rope_scaling={**YARN, "truncate": False})
    (note,) = check_form(models.read_config(own))
    assert "rounds the bounds of YaRN's blend" in note and "by 0.14 in texts of 4,000" in note


def test_families_that_are_not_written():
    config = models.read_config(fields_of("llama") | {"model_type": "mistral"})
    with pytest.raises(models.ConfigError, match="mistral model cannot be written .*; llama, "):
        check_form(config)


def test_adapters_that_llama_cpp_has_no_form_for(tmp_path):
    model, params = make("qwen3")
    for rules, said in (
        ([lj.LoraRule(targets=["q_proj"], rank=2, dora=True)], "DoRA's magnitudes"),
        (
            [lj.LoraRule(targets=["q_proj"], rank=2), lj.TrainRule(targets=["norm"])],
            "train in full",
        ),
        ([lj.LoraRule(targets=["embed_tokens"], rank=2)], "head is tied to its embedding"),
    ):
        with pytest.raises(lp.PeftError, match="--merged --gguf") as caught:
            lp.save_gguf(tmp_path / "a.gguf", model, with_random_factors(lorafied(params, rules)))
        assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_or_left_behind(tmp_path):
    model, params = make("llama")
    file = tmp_path / "m.gguf"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        models.save_gguf(file, model, params, tokenizer=words())
    huge = jax.tree.map(lambda leaf: leaf * np.float32(1e6), params)
    with pytest.raises(models.WeightsError, match="token_embd.weight has values beyond the range"):
        models.save_gguf(file, model, huge, tokenizer=words(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"] and file.read_text() == "mine"


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
def test_a_byte_level_tokenizer(pre):
    core = byte_level(pre)
    roles = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    made = tokenizer_metadata(
        PreTrainedTokenizerFast(tokenizer_object=core, **roles), core.get_vocab_size() + 5
    )
    known = metadata_of(core, pre)
    del known["tokenizer.chat_template"]
    assert known.items() <= made.items()
    assert made["tokenizer.ggml.add_bos_token"] is False


def test_a_tokenizer_of_sentencepiece():
    core, special = build_tokenizer(sentencepiece())
    made = tokenizer_metadata(PreTrainedTokenizerFast(tokenizer_object=core, **special), 500)
    assert made["tokenizer.ggml.add_bos_token"] is True
    again, _ = build_tokenizer(made)
    texts = [text for text in TEXTS if "<" not in text and "\x00" not in text]
    assert [again.encode(t).ids for t in texts] == [core.encode(t).ids for t in texts]
    types = made["tokenizer.ggml.token_type"]
    known = sentencepiece()["tokenizer.ggml.token_type"]
    assert types[: len(known)] == known


def test_a_tokenizer_that_llama_cpp_has_no_rule_for():
    core = json.loads(byte_level("qwen2").to_str())
    core["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[a-m]+"
    from tokenizers import Tokenizer

    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)))
    with pytest.raises(models.ConfigError, match=r"by '\[a-m\]\+'.*--tokenizer"):
        tokenizer_metadata(odd, 500)
    with pytest.raises(models.ConfigError, match="has the token id .* only 5 rows"):
        tokenizer_metadata(words(), 5)


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_two_tensors_are_in_memory_at_most(kind, tmp_path):
    model, params = make("llama", intermediate_size=4096, num_hidden_layers=6)
    merged = jax.tree.map(np.asarray, params)
    largest = 4 * 64 * 4096
    words()
    tracemalloc.start()
    models.save_gguf(tmp_path / "m.gguf", model, merged, gguf_type=kind, tokenizer=words())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "m.gguf").stat().st_size > (4 if kind == "q8_0" else 17) * largest
    assert peak < 3 * largest  # two tensors, and the vocabulary
