"""The real SmolLM2-135M-Instruct, from its GGUF file, against transformers' reading of the same."""

from typing import Any

import numpy as np
import pytest

from lora_jax.hf.packaged import SMOLLM2
from lora_jax.models import from_pretrained, generate, load_tokenizer
from tests.models import tiny
from tests.support import thorough

pytestmark = [pytest.mark.slow, pytest.mark.parity]

PROMPTS = [
    "What is the capital of France?",
    "Name three colours.",
    "How many days has a week?",
    "Write a short poem about the sea.",
    "Explain gravity to a child.",
    "What is 2 + 2?",
    "Translate 'good morning' into French.",
    "Who wrote Hamlet?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def path() -> Any:
    return SMOLLM2.package.local() / SMOLLM2.entry


@pytest.fixture(scope="module")
def ours(path: Any) -> Any:
    return from_pretrained(path)


@pytest.fixture(scope="module")
def theirs(path: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def batch(path: Any) -> Any:
    """(tokenizer, ids, mask): all prompts as chats, padded on the left."""
    tokenizer = load_tokenizer(path)
    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in PROMPTS
    ]
    encoded = tokenizer(texts, padding=True, return_tensors="np")
    return tokenizer, encoded["input_ids"], encoded["attention_mask"]


def test_tokenizer(path: Any, batch: Any) -> None:
    import transformers

    tokenizer = batch[0]
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(text)[:3] == [1, 9690, 198]
    texts = [
        "It's 12:45, isn't it?",
        " two  spaces\n\n\ttab",
        "naïve 世界 🙂",
        "def f(x):\n    pass",
    ]
    for sample in [text, *texts]:
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    for sample in texts[1:]:
        if not any(c.isdigit() for c in sample):
            assert tokenizer.encode(sample) == reference.encode(sample)


def test_logits(ours: Any, theirs: Any, batch: Any) -> None:
    import torch

    model, params = ours
    _, ids, mask = batch
    ids, mask = ids[:3], mask[:3]
    with torch.no_grad():
        want = theirs(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0)),
        ).logits.numpy()
    got = np.asarray(tiny.run(model, params, ids, mask))
    print("max |logits|", np.abs(want).max(), "max difference", np.abs(got - want)[mask == 1].max())
    tiny.assert_close(got[mask == 1], want[mask == 1])


@thorough
def test_greedy_text(ours: Any, theirs: Any, batch: Any) -> None:
    import torch

    tokenizer, ids, mask = batch
    got = np.asarray(generate(*ours, ids, mask, max_new_tokens=NEW_TOKENS))
    want = theirs.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=2,
    ).numpy()[:, ids.shape[1] :]
    assert tokenizer.decode(got[0], skip_special_tokens=True) == "The capital of France is Paris."
    texts = [tokenizer.batch_decode(x, skip_special_tokens=True) for x in (got, want)]
    assert texts[0] == texts[1]
