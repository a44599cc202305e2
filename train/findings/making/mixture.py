"""Pretrains a small mixture of experts on Python's documentation, with questions for SQL.

No pretrained mixture is small enough for two cores: this one has four layers of eight experts, two
of which are active for a token, and a tokenizer of 2,048 tokens of its own text. It learns to
continue the documentation, in full, and comparisons go on from there with another task.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_jax.hf.tokenizer import make_fast_tokenizer
from train import prior
from train.compare import outside
from train.findings.making import questions
from train.findings.making.inputs import FindingInputs
from train.processes.session import Session
from train.reporters.files import write_lines
from train.tasks.sums import write_untrained

VOCABULARY = 2048
_PAD, _START, _END = "<|pad|>", "<|im_start|>", "<|im_end|>"
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "bos_token_id": None,
}
_CHARACTERS = 320  # of a row of text: some ninety tokens
_LINE = (
    *("--train-on", "all", "--packing", "--truncate", "--seq-len", "128", "--batch-size", "16"),
    *("--steps", "400", "--lr", "3e-3", "--warmup", "20", "--log-every", "20"),
    *("--save-every", "100", "--report-to", "none"),
)


def tokenizer(text: str) -> Any:
    """Returns a byte-level BPE tokenizer that is trained on a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (_PAD, _START, _END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(text.splitlines(keepends=True), trainer)
    made = make_fast_tokenizer(core, pad_token=_PAD, eos_token=_END)
    made.chat_template = _TEMPLATE
    return made


def make(folder: Path, session: Session) -> FindingInputs:
    """Writes text and questions, and pretrains the base; returns the options that name them.

    Args:
      folder: where files and base go.
      session: tells of signals.

    Raises:
      TrainingError: this Python comes without its documentation, or the base cannot be trained.
      Interrupted: after a signal, once the last step is saved.
    """
    text_and_name = outside.read_text(None)
    assert text_and_name is not None, "nothing turned it off"
    text, start = text_and_name[0], folder / "untrained"
    rows = folder / "text.jsonl"
    write_lines(rows, [{"text": part} for part in parts(text)])
    asked = questions.make(folder, session)
    write_untrained(CONFIG, tokenizer(text), start)
    line = ("--model", str(start), "--dataset", str(rows), *_LINE)
    model = prior.train_base("train.sft", line, [rows, start], folder, session)
    note = (
        f"The base: {CONFIG['num_hidden_layers']} layers of {CONFIG['num_local_experts']} experts, "
        f"two of them active, and {CONFIG['hidden_size']} features, pretrained on Python's "
        "documentation."
    )
    return FindingInputs({"model": model, **asked.options}, (note,))


def parts(text: str) -> list[str]:
    """Returns a text in rows of complete lines, which rarely exceed the sequence length."""
    rows = [""]
    for line in text.splitlines(keepends=True):
        if len(rows[-1]) + len(line) > _CHARACTERS and rows[-1]:
            rows.append("")
        rows[-1] += line
    return rows
