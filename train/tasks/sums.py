"""A small decoder that adds numbers and often forgets the carry, as a start for `train.grpo`.

--model "arithmetic" pretrains it in full on sums. Most of these sums lack the carry. The decoder
therefore knows how to carry but seldom does it, and a reward of right answers teaches it to.
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

MODEL = "arithmetic"  # the value of --model that stands for the decoder
_FORGOTTEN_CARRY_SHARE = 0.75
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
# The arguments of `train.sft` that pretrain the decoder.
_ARGUMENTS = (
    *("--packing", "--seq-len", "64", "--batch-size", "32", "--epochs", "1"),
    *("--lr", "5e-3", "--warmup", "50", "--log-every", "100"),
    *("--save-every", "500", "--report-to", "none"),
)


def make_tokenizer() -> Any:
    """Returns a tokenizer of the characters 0 to 9, "+" and "=", without a chat template."""
    characters = {character: i for i, character in enumerate("0123456789+=")}
    core = Tokenizer(models.BPE(vocab=characters, merges=[]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True) for token in (_PAD, _END)])
    return make_fast_tokenizer(core, pad_token=_PAD, eos_token=_END)


def _forgetful_pairs() -> Iterator[dict[str, str]]:
    """Yields sums with their answers, most of which lack the carry."""
    rng = random.Random(0)
    for row in arithmetic.rows(0, _BASE_ROWS):
        prompt = row["prompt"]
        sum_of_ones = sum(int(number) % 10 for number in prompt[:-1].split("+"))
        has_carry = sum_of_ones > 9
        answer = int(row["answer"])
        if has_carry and rng.random() < _FORGOTTEN_CARRY_SHARE:
            answer -= 10
        yield {"prompt": prompt, "completion": str(answer)}


def write_untrained(fields: Mapping[str, Any], tokenizer: Any, folder: Path) -> None:
    """Writes a decoder with random weights and its tokenizer, unless the folder exists.

    Args:
      fields: the fields of config.json, without the tokenizer's special tokens.
      tokenizer: the tokenizer, with an EOS and a padding token.
      folder: the folder to write to.
    """
    if folder.exists():  # `save_pretrained` writes a folder as a whole or not at all
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
    """Returns the options with the folder of the pretrained decoder, if --model is "arithmetic".

    Raises:
      UserError: the run has several processes.
      Interrupted: a signal came; raised after the last step is saved.
    """
    if config.data.model != MODEL:
        return config
    check_alone(config, "a small pretrained model")
    session.stop.remedy = resume_hint("train.grpo")
    folder = cache_folder() / "arithmetic"
    folder.mkdir(parents=True, exist_ok=True)
    return replace_options(config, {"model": str(make_base(folder, session, prior))})


def make_base(folder: Path, session: Session, prior: PriorRuns) -> Path:
    """Pretrains the decoder, unless it exists already, and returns its folder.

    Args:
      folder: the folder for the decoder, its rows and its run.
      session: reports signals.
      prior: trains the decoder.

    Raises:
      TrainingError: the decoder cannot be trained or written.
      Interrupted: a signal came; raised after the last step is saved.
    """
    if not (folder / "base").exists():
        tell(
            hosts.console(),
            f"pretraining a small decoder on sums in {folder}; this takes some minutes",
        )
    rows_path = folder / "sums.jsonl"
    untrained_folder = folder / "untrained"
    write_lines(rows_path, list(_forgetful_pairs()))
    write_untrained(BASE_CONFIG, make_tokenizer(), untrained_folder)
    arguments = ("--model", str(untrained_folder), "--dataset", str(rows_path), *_ARGUMENTS)
    inputs = [rows_path, untrained_folder]
    return prior.train_base("train.sft", arguments, inputs, folder, session)
