"""Predictions are those of transformers' pipeline, and of PEFT on torch."""

import json

import numpy as np
import pytest

from tests.parity import PARITY
from tests.train.tiny import tokenizer, write_jsonl
from train.predict.__main__ import main

pytestmark = PARITY
TEXTS = ["ab", "a rather longer text", "3 + 4 = 7", "z" * 25, "ü"]
NAMES = ("no", "perhaps", "yes")
SIZES = {
    "vocab_size": 259,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.5,
    "pad_token_id": 256,
}


@pytest.fixture(params=["Bert", "Roberta"])
def base(request, tmp_path):
    """A random classifier of transformers, with names for its classes, in its folder."""
    import torch
    import transformers

    torch.manual_seed(5)
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    config = getattr(transformers, f"{request.param}Config")(**SIZES, **names)
    model = getattr(transformers, f"{request.param}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path / "base")
    tokenizer(None).save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


def ours(capsys, *args):
    main([str(arg) for arg in args])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [row["label"] for row in rows], np.array(
        [list(row["probabilities"].values()) for row in rows]
    )


def test_of_a_folder_of_transformers(base, tmp_path, capsys):
    import torch
    import transformers

    model, folder = base
    classify = transformers.pipeline("text-classification", model=str(folder), top_k=None)
    theirs = [{one["label"]: one["score"] for one in row} for row in classify(TEXTS)]
    labels, found = ours(capsys, *TEXTS, "--model", folder)
    want = np.array([[row[name] for name in NAMES] for row in theirs])
    assert np.abs(found - want).max() < 1e-5 and np.ptp(want, axis=0).max() > 0.1
    assert labels == [max(row, key=row.get) for row in theirs]
    if model.config.model_type == "roberta":
        return
    pairs = [{"text": a, "text_pair": b} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)]
    read = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"return_tensors": "pt", "padding": True, "return_token_type_ids": True}
    made = read(TEXTS, TEXTS[::-1], **options)
    assert made["token_type_ids"].max() == 1
    with torch.no_grad():
        want = model(**made).logits.softmax(-1).numpy()
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    _, found = ours(capsys, "--input", path, "--field-pair", "text_pair", "--model", folder)
    assert np.abs(found - want).max() < 1e-5


@pytest.mark.parametrize("has_head", [True, False])
def test_of_pefts_adapter(has_head, base, tmp_path, capsys):
    import torch
    from peft import LoraConfig, get_peft_model

    model, folder = base
    options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "lora_alpha": 11}
    if not has_head:
        trunk = tmp_path / "trunk"
        model.base_model.save_pretrained(trunk)
        if model.config.model_type == "bert":
            options["modules_to_save"] = ["classifier", "pooler"]
        tokenizer(None).save_pretrained(trunk)
        folder = trunk
    adapted = get_peft_model(model, LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "peft")
    want = []
    for text in TEXTS:
        inputs = {"input_ids": torch.tensor([tokenizer(None)(text)["input_ids"]])}
        with torch.no_grad():
            want.append(adapted(**inputs).logits.softmax(-1)[0].numpy())
    args = ["--adapter", tmp_path / "peft", "--model", folder]
    labels, found = ours(capsys, *TEXTS, *args)
    assert np.abs(found - np.array(want)).max() < 1e-5
    assert labels == [NAMES[one.argmax()] for one in want]
