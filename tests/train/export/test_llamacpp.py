"""Exports run by llama.cpp itself: base and adapter, merged models, types, tokens."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.hf.generation import Generation
from tests.hf.vocabularies import TEXTS
from tests.models.tiny_gguf import FAMILIES, make, phi3_words, words
from tests.support import with_random_factors
from tests.train.export.llamacpp import LlamaCpp, distance

pytestmark = pytest.mark.serving
N_PROMPTS, LENGTH = 10, 32
RULES = [lj.LoraRule(targets="all-linear", rank=3, alpha=7)]


def prompts(n=N_PROMPTS):
    rng = np.random.default_rng(5)
    return [rng.integers(3, 370, rng.integers(2, 20)).tolist() for _ in range(n)]


@functools.partial(jax.jit, static_argnames="model")
def log_probabilities(model, tree, ids):
    return jax.nn.log_softmax(lj.adapt(model.apply)({"params": tree}, ids)[0])


def rounded(kind, model, tree, ids):
    """Our log-probabilities where products round activations as llama.cpp's do: to fp16, or codes.

    ggml multiplies an F16 matrix by fp16 rows, and a Q8_0 matrix by rows in Q8_0.
    """

    def product(function, args, kwargs, context):
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            args = (ROUND[kind](args[0]), *args[1:])
        return function(*args, **kwargs)

    @jax.jit
    def run(tree, ids):
        with nn.intercept_methods(product):
            return jax.nn.log_softmax(model.apply({"params": tree}, ids)[0])

    return run(tree, ids)


def to_codes(x):
    """The values of rows in Q8_0: blocks of 32 codes, of which the largest is 127, and a scale."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = jnp.abs(blocks).max(-1, keepdims=True) / 127
    codes = jnp.round(blocks / jnp.where(scale == 0, 1, scale))
    return (codes * ROUND["f16"](scale)).reshape(x.shape)


ROUND = {"f16": lambda x: x.astype(jnp.float16).astype(jnp.float32), "q8_0": to_codes}


def answers(server, model, tree, n=N_PROMPTS, ours_of=log_probabilities, absolute=False):
    """Returns the distances of log-probabilities, in proportion to ours, and the texts as ours."""
    gaps, equal, n_tokens = [], 0, 0
    for prompt in prompts(n):
        ids, tops = server.continue_ids(prompt, LENGTH)
        padded = np.zeros((1, 64), np.int32)  # one shape for all: causal, so that the rest is moot
        padded[0, : len(prompt) + len(ids)] = [*prompt, *ids]
        ours = np.asarray(ours_of(model, tree, padded))
        gap, same = distance(ours, prompt, ids, tops)
        gaps.append(gap if absolute else gap / max(1, np.abs(ours).max()))
        equal += same
        n_tokens += len(ids)
    assert n_tokens > n * LENGTH / 4
    return np.concatenate(gaps), equal


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_answers_as_the_model_does(family, tmp_path):
    model, params = make(family)
    tree = with_random_factors(lj.lorafy(params, RULES))
    merged = lj.merge(tree)
    lp.save_gguf(tmp_path / "a.gguf", model, tree)
    for name, kind, each in (
        ("base", "f32", params),
        ("f32", "f32", merged),
        ("f16", "f16", merged),
    ):
        models.save_gguf(tmp_path / f"{name}.gguf", model, each, gguf_type=kind, tokenizer=words())
    gaps, equal = answers(LlamaCpp(tmp_path / "base.gguf", tmp_path / "a.gguf"), model, tree)
    assert gaps.max() < 1e-3 and equal == N_PROMPTS
    n = N_PROMPTS if family == "llama" else 3
    gaps, equal = answers(LlamaCpp(tmp_path / "f32.gguf"), model, tree, n)
    assert gaps.max() < 1e-3 and equal == n
    gaps, _ = answers(LlamaCpp(tmp_path / "f16.gguf"), model, tree, 3)
    assert gaps.max() < 2e-2
    gaps, _ = answers(LlamaCpp(tmp_path / "base.gguf"), model, tree, 3)
    assert gaps.max() > 0.05, "the adapter changes the answers"


def test_adapters_of_an_embedding_and_a_head(tmp_path):
    model, params = make("llama")
    rules = [lj.LoraRule(targets=["embed_tokens", "lm_head"], rank=3, alpha=7)]
    tree = with_random_factors(lj.lorafy(params, rules))
    lp.save_gguf(tmp_path / "a.gguf", model, tree)
    models.save_gguf(tmp_path / "b.gguf", model, params, gguf_type="f32", tokenizer=words())
    gaps, equal = answers(LlamaCpp(tmp_path / "b.gguf", tmp_path / "a.gguf"), model, tree, 2)
    assert gaps.max() < 1e-3 and equal == 2


@pytest.mark.parametrize("kind, mean, most", [("f16", 5e-3, 2e-2), ("q8_0", 0.05, 0.5)])
def test_files_by_their_log_probabilities(kind, mean, most, tmp_path):
    """Log-probabilities are ours over the file's values; rounded activations bring them closer."""
    model, params = make("llama")
    models.save_gguf(tmp_path / "m.gguf", model, params, gguf_type=kind, tokenizer=words())
    _, decoded = models.from_pretrained(tmp_path / "m.gguf", dtype="float32")
    server = LlamaCpp(tmp_path / "m.gguf")
    gaps, _ = answers(server, model, lj.lorafy(decoded, RULES), 4, absolute=True)
    assert gaps.mean() < mean and gaps.max() < most
    round_alike = functools.partial(rounded, kind)
    alike, _ = answers(server, model, decoded, 4, round_alike, absolute=True)
    assert 2 * alike.mean() < gaps.mean(), "it is activations that differ"


def test_it_stops_where_generation_config_ends_texts(tmp_path):
    model, params = make("llama")
    (prompt,) = prompts(1)
    file = tmp_path / "m.gguf"
    models.save_gguf(file, model, params, gguf_type="f32", tokenizer=words())
    ids, _ = LlamaCpp(file).continue_ids(prompt, LENGTH)
    ends = [ids[5], ids[3]]
    assert len(ids) == LENGTH and len(set(ids[:4])) == 4
    generation = Generation(json.dumps({"eos_token_id": ends}))
    model = model.clone(config=dataclasses.replace(model.config, generation=generation))
    models.save_gguf(file, model, params, gguf_type="f32", tokenizer=words(), overwrite=True)
    assert LlamaCpp(file).continue_ids(prompt, LENGTH)[0] == ids[:4]
    found = models.generate(model, params, np.array([prompt]), max_new_tokens=8, pad_token_id=0)
    assert found[0].tolist() == [*ids[:4], 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["sql", "phi-3-sql"])
def test_chats_of_phi_3_tokenise_alike_whatever_the_files_name(name, tmp_path):
    tokenizer, file = phi3_words(), tmp_path / f"{name}.gguf"
    sizes = {"vocab_size": len(tokenizer) + 2, "bos_token_id": 1, "eos_token_id": 2}
    models.save_gguf(file, *make("phi3", **sizes), tokenizer=tokenizer)
    server = LlamaCpp(file)
    chat = [{"role": role, "content": " a b\n"} for role in ("system", "user", "assistant")]
    chat = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for text in (chat, "<s> hi <unk> a <|endoftext|> b </s> c <|user|> d<|end|>  e", "plain text"):
        assert server.tokenize(text) == tokenizer(text)["input_ids"]


def test_a_file_with_phi_3s_name_and_another_vocabulary_loads(tmp_path):
    for family, text in (("phi3", "<think> a"), ("llama", "<|im_start|> a")):
        file = tmp_path / f"phi3-{family}.gguf"
        models.save_gguf(file, *make(family), tokenizer=words())
        assert LlamaCpp(file).tokenize(text) == words()(text)["input_ids"]


@pytest.mark.parametrize("truncate", [False, True])
def test_the_bounds_of_yarn_in_gpt_oss_differ_as_the_note_says(truncate, tmp_path):
    """Its rotations are those of the published models, and its weights are random."""
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    model, params = make(
        "gpt_oss",
        rope_theta=150000.0,
        head_dim=64,
        max_position_embeddings=131072,
        rope_scaling={**rope, "truncate": truncate},
    )
    file = tmp_path / "m.gguf"
    notes = models.save_gguf(file, model, params, gguf_type="f32", tokenizer=words())
    assert any("by 0.02 on average in texts of 128 tokens" in note for note in notes) != truncate
    server, rng, tree = LlamaCpp(file), np.random.default_rng(5), lj.lorafy(params, RULES)
    gaps = []
    for _ in range(4):
        prompt = rng.integers(3, 370, 120).tolist()
        ids, tops = server.continue_ids(prompt, 8, every=1)
        padded = np.zeros((1, 128), np.int32)
        padded[0, : 120 + len(ids)] = [*prompt, *ids]
        ours = np.asarray(log_probabilities(model, tree, padded))
        gaps.append(distance(ours, prompt, ids, tops)[0])
    mean = np.concatenate(gaps).mean()
    assert mean < 1e-4 if truncate else 0.005 < mean < 0.08, mean


def test_texts_tokenise_alike(tmp_path):
    model, params = make("qwen2")
    models.save_gguf(tmp_path / "m.gguf", model, params, gguf_type="f32", tokenizer=words())
    server = LlamaCpp(tmp_path / "m.gguf")
    rng = np.random.default_rng(7)
    drawn = ["".join(rng.choice(list("".join(TEXTS)), rng.integers(1, 40))) for _ in range(230)]
    texts = [text for text in [*TEXTS, *drawn] if "\x00" not in text]
    wrong = [text for text in texts if server.tokenize(text) != words()(text)["input_ids"]]
    assert len(texts) >= 200 and wrong == []
