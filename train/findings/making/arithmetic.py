"""A small decoder that adds and often forgets the carry: a base for learning from rewards.

It is pretrained in full on sums, most of which lack the carry where there is one. So it knows how
to carry, and seldom does; a reward of right answers teaches it to.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models

from lora_jax.hf.tokenizer import fast_tokenizer
from train.console.output import tell
from train.environments import arithmetic
from train.findings.making import base
from train.processes import hosts
from train.processes.session import Session
from train.reporters.files import write_lines

_FORGETS = 0.75  # the share of carries that the rows lack
_ROWS = 100_000
_PAD, _END = "<pad>", "<end>"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 14,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "bos_token_id": None,
}
_LINE = (
    *("--packing", "--seq-len", "64", "--batch-size", "32", "--epochs", "1"),
    *("--lr", "5e-3", "--warmup", "50", "--log-every", "100"),
    *("--save-every", "500", "--report-to", "none"),
)


def tokenizer() -> Any:
    """Returns a tokenizer of characters: digits, "+" and "="; without a chat template."""
    characters = {character: i for i, character in enumerate("0123456789+=")}
    core = Tokenizer(models.BPE(vocab=characters, merges=[]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True) for token in (_PAD, _END)])
    return fast_tokenizer(core, pad_token=_PAD, eos_token=_END)


def _pairs() -> Iterator[dict[str, str]]:
    draw = random.Random(0)
    for row in arithmetic.rows(0, _ROWS):
        ones = sum(int(number) % 10 for number in row["prompt"][:-1].split("+"))
        forgets = ones > 9 and draw.random() < _FORGETS
        yield {"prompt": row["prompt"], "completion": str(int(row["answer"]) - 10 * forgets)}


def arithmetic_base(folder: Path, session: Session) -> Path:
    """Pretrains the decoder, unless it is there already; returns its folder.

    Args:
      folder: where it goes, with the rows and the run that make it.
      session: tells of signals.

    Raises:
      TrainingError: it cannot be trained or written.
      Interrupted: after a signal, once the last step is saved.
    """
    if not (folder / base.MODEL).exists():
        tell(hosts.console(), f"pretraining a small decoder on sums in {folder}: a minute or two")
    rows, start = folder / "sums.jsonl", folder / "untrained"
    write_lines(rows, list(_pairs()))
    base.write_untrained(CONFIG, tokenizer(), start)
    line = ("--model", str(start), "--dataset", str(rows), *_LINE)
    return base.train_base("train.sft", line, [rows, start], folder, session)
