"""`train.sft --loss`: what it minimises and measures, and that a resumed run keeps it."""

import jax
import numpy as np
import pytest

from lora_jax.training.data.chats import tokenize
from tests.train.tiny import decoder, tokenizer, write_jsonl, write_model
from train.run.log import read_metrics
from train.sft import main

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CHATS = [
    [("user", "a" * n), ("assistant", "bc" * n), ("user", "d"), ("assistant", "efg" * n)]
    for n in range(1, 7)
]
ROWS = [{"messages": [dict(role=role, content=text) for role, text in chat]} for chat in CHATS]
ROWS[2]["messages"][1]["weight"] = 0  # a turn that is seen and not learned
SCALE = 0.4  # of the weights, so that probabilities are not all near 0 or 1
WAYS = {
    "accumulated": ["--batch-size", "3", "--grad-accum", "2"],
    "packed": ["--packing", "--seq-len", "512", "--batch-size", "1", "--loss-chunk", "7"],
    "the last turn": ["--batch-size", "6", "--train-on", "last"],
}


def by_hand(train_on):
    """(mean of -p log p, mean of -log p) over the tokens that count, of the base."""
    model, params = decoder()
    params = jax.tree.map(lambda leaf: leaf * SCALE, params)
    apply, logs = jax.jit(model.apply), []
    for row in tokenize(ROWS, tokenizer(), "rows", train_on=train_on):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(row.ids)] = row.ids
        logits = np.asarray(apply({"params": params}, padded)[0], np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        logs += [log_probs[at - 1, row.ids[at]] for at in np.flatnonzero(row.counts)]
    return -np.mean(np.exp(logs) * logs), -np.mean(logs)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_dft_weighs_each_token_by_its_probability(tmp_path, capsys, way):
    rows, other = (str(write_jsonl(tmp_path / name, ROWS)) for name in ("rows.jsonl", "o.jsonl"))
    model = write_model(tmp_path / "model", scale=SCALE)
    line = ["--model", str(model), "--dataset", rows, *WAYS[way]]
    line += ["--eval-dataset", other, "--eval-every", "1", "--steps", "1", "--lr", "1e-9"]
    line += ["--rank", "2", "--targets", "q_proj", "--output", str(tmp_path / "run")]
    main([*line, "--loss", "dft"])
    weighted, plain = by_hand("last" if way == "the last turn" else "assistant")
    first, measured = read_metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(weighted, rel=1e-5)
    assert measured["eval_loss"] == pytest.approx(plain, rel=1e-5)
    assert weighted < 0.9 * plain
    assert "loss: dft\n" in (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*line, "--resume"])
    assert "--loss was dft and is now cross-entropy" in capsys.readouterr().err
