"""The task of fine-tuning on a user's chats, or pairs of prompt and completion."""

import functools
from typing import Any

from lora_jax.hf.bundled import SMOLLM2
from lora_jax.training.batches import Packs, pack
from lora_jax.training.data.chats import Row, check_lengths, conversation
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss, summed_loss
from train.data.chats import tokenize
from train.data.files import read_rows
from train.run.errors import UserError
from train.run.options import Defaults
from train.run.pretrained import Outline, read_outline
from train.run.sft_options import Config
from train.tasks.task import Data, Rows, Task


def check(config: Config) -> None:
    """Raises a UserError for options of another task."""
    if config.data.shuffle_schemas:
        raise UserError("--shuffle-schemas is a control for --dataset sql only")


def read(config: Config) -> Rows:
    """Reads the rows of the dataset; with --eval-every, some of them are held out."""
    data = config.data
    rows = read_rows(data.dataset, split=data.split, subset=data.subset)[: data.rows]
    for number, row in enumerate(rows, start=1):
        conversation(row, f"{data.dataset}, row {number}")
    return hold_out(config, rows)


def hold_out(config: Config, rows: list[Row]) -> Rows:
    """Holds out the last rows, at most a tenth, if --eval-every is given."""
    if not config.run.eval_every:
        return Rows(rows, [])
    n = min(config.run.eval_questions, len(rows) // 10)
    if n == 0:
        raise UserError(
            f"--eval-every {config.run.eval_every} needs rows to hold out: --eval-questions is "
            f"{config.run.eval_questions}, and at most a tenth of the {len(rows)} rows is held out"
        )
    return Rows(rows[:-n], rows[-n:])


def outline(config: Config, rows: Rows) -> Outline:
    """Reads the model's outline; checks that the model allows sequences of --seq-len."""
    assert config.data.model is not None, "the options have no defaults yet"
    outline = read_outline(config.data.model)
    outline.check_length(config.data.seq_len, f"--seq-len {config.data.seq_len}")
    return outline


def examples(config: Config, rows: Rows, outline: Outline) -> Data:
    """Returns the rows as sequences of one length."""
    packs = packed(config, rows.train, outline.tokenizer, config.data.dataset)
    held_out = None
    if rows.held_out:
        held_out = packed(config, rows.held_out, outline.tokenizer, "the held-out rows")
    return Data(
        train=packs,
        held_out=held_out,
        name=packs.name,
        facts={"sequence_length": packs.ids.shape[1]},
    )


def packed(config: Config, rows: list[Row], tokenizer: Any, source: str) -> Packs:
    """Tokenises rows, and pads or packs them into sequences of one length.

    Args:
      config: the options.
      rows: chats, or pairs of prompt and completion.
      tokenizer: the model's tokenizer.
      source: the name of the rows in messages.
    """
    data = config.data
    sequences = tokenize(rows, tokenizer, source)
    kept = check_lengths(sequences, data.seq_len, truncate=data.truncate)
    if left_out := len(sequences) - len(kept):
        print(f"{source}: left out {left_out} rows, truncated before their completion began")
    return pack(kept, data.seq_len, packing=data.packing)


def loss(config: Config, layout: Layout) -> Loss:
    """Returns the cross entropy of the assistant's tokens."""
    chunk = config.optim.loss_chunk * layout.token_parts
    return Loss(functools.partial(summed_loss, chunk=chunk, parts=layout.sequence_parts))


TASK = Task(
    defaults=Defaults(model=SMOLLM2.name, alpha=2.0, lr=2e-4, full_lr=2e-5),
    check=check,
    rows=read,
    outline=outline,
    examples=examples,
    loss=loss,
)
