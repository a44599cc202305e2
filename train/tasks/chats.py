"""The task of fine-tuning on a user's chats, or pairs of prompt and completion."""

import functools
from typing import Any

import numpy as np

from lora_jax.hf.bundled import SMOLLM2
from lora_jax.training.batches import Packs, pack
from lora_jax.training.data.chats import Row, check_lengths, conversation
from lora_jax.training.losses import Loss, summed_loss
from train.data.chats import tokenize
from train.data.files import read_rows
from train.run.errors import UserError
from train.run.options import Defaults
from train.run.output import saved_options
from train.run.pretrained import Outline, read_outline
from train.run.sft_options import Config
from train.tasks.task import Data, Rows, Task

_HELD_OUT_STREAM = 2**32 + 1  # no epoch's number: the draw is none of the data's orders


def check(config: Config) -> None:
    """Raises a UserError for options of another task."""
    if config.data.shuffle_schemas:
        raise UserError("--shuffle-schemas is a control for --dataset sql only")


def read(config: Config) -> Rows:
    """Reads the rows of the dataset; with --eval-every, some are held out."""
    data = config.data
    rows = read_rows(data.dataset, split=data.split, subset=data.subset)[: data.rows]
    for number, row in enumerate(rows, start=1):
        conversation(row, f"{data.dataset}, row {number}")
    return hold_out(config, rows)


def hold_out(config: Config, rows: list[Row]) -> Rows:
    """Holds out rows that --seed draws, at most a tenth, if --eval-every is given.

    A resumed run holds out those that it began without.

    Raises:
      UserError: there are too few rows, or the run began with all of them.
    """
    run, saved = config.run, saved_options(config)
    if run.eval_every and not saved.get("eval_every", True):
        raise UserError(
            f"--eval-every {run.eval_every}: the run has trained on all rows, and none can be held "
            "out any more. Leave it out, or start another run in another --output"
        )
    if not saved.get("eval_every", run.eval_every):
        return Rows(rows, [])
    questions = saved.get("eval_questions", run.eval_questions)
    if run.eval_every and questions != run.eval_questions:
        raise UserError(
            f"--eval-questions was {questions} and is now {run.eval_questions}: the held-out rows "
            "of a run stay the same. Give the same number, or start another run in another --output"
        )
    n = min(questions, len(rows) // 10)
    if n == 0:
        raise UserError(
            f"--eval-every {run.eval_every} needs rows to hold out: --eval-questions is "
            f"{questions}, and at most a tenth of the {len(rows)} rows is held out"
        )
    seed = [config.optim.seed, _HELD_OUT_STREAM]
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows))
    train, held_out = (sorted(part.tolist()) for part in (drawn[n:], drawn[:n]))
    return Rows(
        [rows[i] for i in train],
        [rows[i] for i in held_out],
        ([i + 1 for i in train], [i + 1 for i in held_out]),
    )


def outline(config: Config, rows: Rows) -> Outline:
    """Reads the model's outline; checks that the model allows sequences of --seq-len."""
    assert config.data.model is not None, "the options have no defaults yet"
    outline = read_outline(config.data.model)
    outline.check_length(config.data.seq_len, f"--seq-len {config.data.seq_len}")
    return outline


def examples(config: Config, rows: Rows, outline: Outline) -> Data:
    """Returns the rows as sequences of one length."""
    numbers, source = rows.numbers or (None, None), config.data.dataset
    packs = packed(config, rows.train, outline.tokenizer, source, numbers[0])
    held_out = None
    if rows.held_out:
        held_out_source = source if rows.numbers else "the held-out rows"
        held_out = packed(config, rows.held_out, outline.tokenizer, held_out_source, numbers[1])
    return Data(
        train=packs,
        held_out=held_out,
        name=packs.name,
        facts={"sequence_length": packs.ids.shape[1]},
        lines=(_described(config, rows),) if rows.numbers else (),
    )


def _described(config: Config, rows: Rows) -> str:
    assert rows.numbers is not None
    held_out, n = rows.numbers[1], len(rows.train) + len(rows.held_out)
    some = ", ".join(map(str, held_out[:5])) + ", …" * (len(held_out) > 5)
    return (
        f"{len(held_out)} of the {n} rows are held out, drawn by --seed {config.optim.seed}: "
        f"row {some}"
    )


def packed(
    config: Config,
    rows: list[Row],
    tokenizer: Any,
    source: str,
    numbers: list[int] | None = None,
) -> Packs:
    """Tokenises rows, and pads or packs them into sequences of one length.

    Args:
      config: the options.
      rows: chats, or pairs of prompt and completion.
      tokenizer: the model's tokenizer.
      source: the name of the rows in messages.
      numbers: the rows' numbers in the data; by default from 1 on.
    """
    data = config.data
    sequences = tokenize(rows, tokenizer, source, numbers)
    kept = check_lengths(sequences, data.seq_len, truncate=data.truncate)
    if left_out := len(sequences) - len(kept):
        print(f"{source}: left out {left_out} rows, truncated before their completion began")
    return pack(kept, data.seq_len, packing=data.packing)


def loss(config: Config, batch_parts: int) -> Loss:
    """Returns the cross entropy of the assistant's tokens."""
    return Loss(functools.partial(summed_loss, chunk=config.optim.loss_chunk * batch_parts))


TASK = Task(
    defaults=Defaults(model=SMOLLM2.name, alpha=2.0, lr=2e-4, full_lr=2e-5),
    check=check,
    rows=read,
    outline=outline,
    examples=examples,
    loss=loss,
)
