"""A decoder of sums that often forgets the carry, which `train.grpo` can begin with.

It is made where --model is "arithmetic": pretrained in full on sums, most of which lack the carry
where there is one. So it knows how to carry, and seldom does; a reward of right answers teaches it
to.
"""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import AddedToken, Tokenizer, decoders, models

from lora_jax.folders import cache_folder
from lora_jax.hf.tokenizer import make_fast_tokenizer
from lora_jax.models import Decoder, DecoderConfig, save_pretrained
from train.console.output import tell
from train.console.program import resume_hint
from train.environments import arithmetic
from train.options.file import replace_options
from train.options.scripts.grpo import Config
from train.processes import hosts
from train.processes.session import Session
from train.reporters.files import write_lines
from train.run.task import PriorRuns, check_alone

MODEL = "arithmetic"  # stands for the decoder that is made
_FORGETS = 0.75  # the share of carries that the rows lack
_BASE_ROWS = 100_000
_PAD, _END = "<pad>", "<end>"
BASE_CONFIG: dict[str, Any] = {
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
_ARGUMENTS = (  # of `train.sft`, for the base
    *("--packing", "--seq-len", "64", "--batch-size", "32", "--epochs", "1"),
    *("--lr", "5e-3", "--warmup", "50", "--log-every", "100"),
    *("--save-every", "500", "--report-to", "none"),
)


def make_tokenizer() -> Any:
    """Returns a tokenizer of characters: digits, "+" and "="; without a chat template."""
    characters = {character: i for i, character in enumerate("0123456789+=")}
    core = Tokenizer(models.BPE(vocab=characters, merges=[]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True) for token in (_PAD, _END)])
    return make_fast_tokenizer(core, pad_token=_PAD, eos_token=_END)


def _forgetful_pairs() -> Iterator[dict[str, str]]:
    """Yields sums, most of which lack the carry where there is one."""
    rng = random.Random(0)
    for row in arithmetic.rows(0, _BASE_ROWS):
        prompt = row["prompt"]
        sum_of_ones = sum(int(number) % 10 for number in prompt[:-1].split("+"))
        has_carry = sum_of_ones > 9
        answer = int(row["answer"])
        if has_carry and rng.random() < _FORGETS:
            answer -= 10
        yield {"prompt": prompt, "completion": str(answer)}


def write_untrained(fields: Mapping[str, Any], tokenizer: Any, folder: Path) -> None:
    """Writes a decoder with random weights, and its tokenizer; does so once.

    Args:
      fields: its config.json, but for the tokenizer's special tokens.
      tokenizer: its tokenizer, with an EOS and a padding token.
      folder: where it goes.
    """
    if folder.exists():  # it appears as a whole
        return
    config_fields = {
        **fields,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Decoder(DecoderConfig.from_hf(config_fields))
    ids = jnp.zeros((1, 1), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    save_pretrained(folder, model, variables["params"], tokenizer=tokenizer)


def begin(config: Config, session: Session, prior: PriorRuns) -> Config:
    """Returns the options with the pretrained decoder, where --model stands for it.

    Raises:
      UserError: it cannot be made here.
      Interrupted: after a signal, once the last step is saved.
    """
    if config.data.model != MODEL:
        return config
    check_alone(config, "a small model; run this command in one process first")
    session.stop.remedy = resume_hint("train.grpo")
    folder = cache_folder() / "arithmetic"
    folder.mkdir(parents=True, exist_ok=True)
    return replace_options(config, {"model": str(make_base(folder, session, prior))})


def make_base(folder: Path, session: Session, prior: PriorRuns) -> Path:
    """Pretrains the decoder, unless it is there already; returns its folder.

    Args:
      folder: where it goes, with the rows and the run that make it.
      session: tells of signals.
      prior: trains it.

    Raises:
      TrainingError: it cannot be trained or written.
      Interrupted: after a signal, once the last step is saved.
    """
    if not (folder / "base").exists():
        tell(hosts.console(), f"pretraining a small decoder on sums in {folder}: some minutes")
    rows_path = folder / "sums.jsonl"
    untrained_folder = folder / "untrained"
    write_lines(rows_path, list(_forgetful_pairs()))
    write_untrained(BASE_CONFIG, make_tokenizer(), untrained_folder)
    arguments = ("--model", str(untrained_folder), "--dataset", str(rows_path), *_ARGUMENTS)
    inputs = [rows_path, untrained_folder]
    return prior.train_base("train.sft", arguments, inputs, folder, session)
