"""The real all-MiniLM-L6-v2, a pretrained BERT of 22M parameters, against transformers."""

from typing import Any

import numpy as np
import pytest

from lora_jax.hf.packaged import MINILM
from lora_jax.models import from_pretrained, load_tokenizer
from tests.models import tiny

pytestmark = [pytest.mark.slow, pytest.mark.parity]

TEXTS = [
    "A man is eating food.",
    "A man is eating a piece of bread, slowly.",
    "The girl is carrying a baby.",
    "Low-rank adaptation freezes the pretrained weights.",
]


@pytest.fixture(scope="module")
def folder() -> Any:
    """The model's folder, out of the package that carries it."""
    return MINILM.package.local()


@pytest.fixture(scope="module")
def batch(folder: Any) -> Any:
    """(ids, mask, token types), padded on the right."""
    encoded = load_tokenizer(folder)(TEXTS, padding=True, return_tensors="np")
    names = ("input_ids", "attention_mask", "token_type_ids")
    return [encoded[name].astype(np.int32) for name in names]


@pytest.fixture(scope="module")
def reference(folder: Any, batch: Any) -> Any:
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids, mask, types = (torch.from_numpy(x).long() for x in batch)
    with torch.no_grad():
        return model(ids, attention_mask=mask, token_type_ids=types)


def test_hidden_states_and_pooler(folder: Any, batch: Any, reference: Any) -> None:
    model, params = from_pretrained(folder)
    got = tiny.run(model, params, *batch)
    real = batch[1] == 1
    assert not real.all()
    tiny.assert_close(got.hidden[real], reference.last_hidden_state.numpy()[real], 1e-5)
    tiny.assert_close(got.pooled, reference.pooler_output.numpy(), 1e-5)


def test_sentence_embeddings(folder: Any, batch: Any, reference: Any) -> None:
    """As sentence-transformers has them: mean over real tokens, divided by the norm."""
    model, params = from_pretrained(folder, head="embedding", normalize=True)
    got = np.asarray(tiny.run(model, params, *batch))
    weights = batch[1][..., None]
    mean = (reference.last_hidden_state.numpy() * weights).sum(1) / weights.sum(1)
    tiny.assert_close(got, mean / np.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    similar = got @ got.T
    assert similar[0, 1] > 0.6 > 0.3 > np.abs(similar[0, 2:]).max()
