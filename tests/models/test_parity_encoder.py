"""BERT and RoBERTa against transformers on torch: the same tiny weights, the same outputs."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import from_pretrained, hf_tensors, key_table
from lora_jax.models.layers.blocks import ACTIVATION
from lora_jax.models.layers.blockwise import Blockwise
from tests.models import tiny, tiny_encoders

pytestmark = pytest.mark.parity

AUTO = {
    "none": "AutoModel",
    "masked_lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
}


def make_reference(case: str, head: str) -> Any:
    """transformers' model with random weights, by the paths of ours."""
    import torch
    import transformers

    labels = {"num_labels": 3} if head == "classification" else {}
    config = transformers.AutoConfig.for_model(**tiny_encoders.fields(case), **labels)
    auto = getattr(transformers, AUTO[head])
    reference = auto.from_config(config, attn_implementation="eager")
    _, params = tiny_encoders.model(case, head)
    tensors = dict(hf_tensors(params, key_table(tiny_encoders.config(case, head))))
    own = dict(reference.named_parameters(remove_duplicate=False))
    assert set(tensors) == {name for name in own if ".decoder." not in name}  # tied
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(torch.from_numpy(tensor.copy()))
    return reference.eval()


def inputs(config: Any, side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids, mask, token types): three rows, two of them padded with the padding's id."""
    pad = config.pad_token_id
    ids = tiny_encoders.tokens(1, 3, 11, pad)
    at, lengths = np.arange(11)[None], np.array([[11], [7], [4]])
    mask = at < lengths if side == "right" else at >= 11 - lengths
    types = np.random.default_rng(2).integers(0, config.type_vocab_size, ids.shape, np.int32)
    return np.where(mask, ids, pad), mask.astype(np.int32), types


def run_reference(reference: Any, *arrays: np.ndarray) -> Any:
    import torch

    ids, mask, types = (torch.from_numpy(x).long() for x in arrays)
    with torch.no_grad():
        return reference(ids, attention_mask=mask, token_type_ids=types)


of_each_case = pytest.mark.parametrize("case", list(tiny_encoders.ENCODERS))


@pytest.mark.parametrize(
    ("side", "attention"), [("right", "dense"), ("left", Blockwise(block=4))], ids=str
)
@of_each_case
def test_bare(case: str, side: str, attention: Any, tmp_path: Path) -> None:
    """Hidden states and the pooler's output."""
    reference = make_reference(case, "none")
    reference.save_pretrained(tmp_path)
    model, params = from_pretrained(tmp_path, attention=attention)
    assert model.config.head == "none"
    ids, mask, types = inputs(model.config, side)
    want = run_reference(reference, ids, mask, types)
    hidden, pooled = map(np.asarray, tiny.run(model, params, ids, mask, types))
    assert np.abs(want.last_hidden_state.numpy()).max() > 1
    report(case, f"hidden, {side}", hidden[mask == 1], want.last_hidden_state.numpy()[mask == 1])
    if side == "right":  # the pooler reads the first slot, which is padding otherwise
        report(case, "pooled", pooled, want.pooler_output.numpy())


@pytest.mark.parametrize("case", ["bert", "roberta with other options"])
def test_embeddings(case: str, tmp_path: Path) -> None:
    """The mean of the real tokens, of length one; and the first token's."""
    reference = make_reference(case, "none")
    reference.save_pretrained(tmp_path)
    embedder, params = from_pretrained(tmp_path, head="embedding", normalize=True)
    for side in ("left", "right"):
        ids, mask, types = inputs(embedder.config, side)
        states = run_reference(reference, ids, mask, types).last_hidden_state.numpy()
        weights = mask[..., None]
        mean = (states * weights).sum(1) / weights.sum(1)
        unit = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
        report(case, "embedding", tiny.run(embedder, params, ids, mask, types), unit)
    embedder, params = from_pretrained(tmp_path, head="embedding", pooling="cls")
    report(case, "cls", tiny.run(embedder, params, ids, mask, types), states[:, 0])


@pytest.mark.parametrize("head", ["masked_lm", "classification"])
@of_each_case
def test_heads(case: str, head: str, tmp_path: Path) -> None:
    reference = make_reference(case, head)
    reference.save_pretrained(tmp_path)
    model, params = from_pretrained(tmp_path)
    assert model.config.head == head
    ids, mask, types = inputs(model.config, "right")
    want = run_reference(reference, ids, mask, types).logits.numpy()
    got = np.asarray(tiny.run(model, params, ids, mask, types))
    assert np.abs(want).max() > 0.5
    if head == "masked_lm":
        got, want = got[mask == 1], want[mask == 1]
    report(case, head, got, want)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_what_we_write_transformers_reads(name: str, tmp_path: Path) -> None:
    """Our config.json and tensors, with every head."""
    import json

    import transformers
    from safetensors.numpy import save_file

    for head, auto in AUTO.items():
        model, params = tiny_encoders.model(name, head)
        (tmp_path / "config.json").write_text(json.dumps(model.config.to_hf()))
        tensors = dict(hf_tensors(params, key_table(model.config)))
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        loader = getattr(transformers, auto)
        reference, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        arrays = inputs(model.config, "right")
        want = run_reference(reference.eval(), *arrays)[0].numpy()
        got = np.asarray(jax.tree.leaves(tiny.run(model, params, *arrays))[0])
        real = arrays[1] == 1 if head != "classification" else slice(None)
        tiny.assert_close(got[real], want[real])


@pytest.mark.parametrize("name", list(ACTIVATION))
def test_activations(name: str) -> None:
    import torch
    from transformers.activations import ACT2FN

    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    tiny.assert_close(ACTIVATION[name](jnp.asarray(x)), ACT2FN[name](torch.from_numpy(x)), 1e-6)


def report(case: str, what: str, got: Any, want: Any) -> None:
    got, want = np.asarray(got), np.asarray(want)
    print(f"{case}, {what}: max |difference| {np.abs(got - want).max():.1e}")
    tiny.assert_close(got, want)
