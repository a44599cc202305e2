"""The task of fine-tuning on a user's chats, or pairs of prompt and completion."""

import functools
from typing import Any

import numpy as np

from lora_jax.hf.bundled import SMOLLM2
from lora_jax.training.batches import Packs, pack
from lora_jax.training.data.chats import check_lengths
from lora_jax.training.data.rows import Row, check_rows
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss, summed_loss
from train.data.chats import tokenize
from train.data.fields import renamed
from train.data.files import read_rows
from train.run.errors import UserError
from train.run.options.common import Defaults
from train.run.options.rope import parse_rope_scaling
from train.run.options.sft import Config
from train.run.output import saved_options
from train.run.pretrained import Outline, read_outline
from train.tasks.task import Data, Rows, Task

_HELD_OUT_STREAM = 2**32 + 1  # no epoch's number: the draw is none of the data's orders


def check(config: Config) -> None:
    """Raises a UserError for options of another task."""
    if config.data.shuffle_schemas:
        raise UserError("--shuffle-schemas is a control for --dataset sql only")
    data = config.data
    if data.eval_dataset and not config.run.eval_every:
        raise UserError(
            f"--eval-dataset {data.eval_dataset} is measured every --eval-every steps: give them"
        )
    if (data.eval_dataset, data.eval_split) == (data.dataset, data.split):
        raise UserError(
            f"--eval-dataset {data.eval_dataset} is what is trained on: name other data, or "
            "another split by --eval-split"
        )


def read(config: Config) -> Rows:
    """Reads the rows of the dataset; with --eval-every, some are held out."""
    data = config.data
    rows = _checked(config, data.dataset, data.split)[: data.rows]
    if data.eval_dataset is None:
        return hold_out(config, rows)
    return Rows(rows, _checked(config, data.eval_dataset, data.eval_split))


def _checked(config: Config, dataset: str, split: str) -> list[Row]:
    rows = read_rows(dataset, split=split, subset=config.data.subset)
    rows = renamed(rows, config.data.fields, dataset)
    check_rows(rows, dataset)
    return rows


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
    data = config.data
    assert data.model is not None, "the options have no defaults yet"
    outline = read_outline(data.model).scaled(parse_rope_scaling(data.rope_scaling))
    remedy = "" if data.rope_scaling else "; --rope-scaling makes it more, yarn:2 twice as many"
    outline.check_length(data.seq_len, f"--seq-len {data.seq_len}", remedy)
    return outline


def examples(config: Config, rows: Rows, outline: Outline) -> Data:
    """Returns the rows as sequences, padded or packed."""
    numbers, source = rows.numbers or (None, None), config.data.dataset
    packs = packed(config, rows.train, outline.tokenizer, source, numbers[0])
    held_out = None
    if rows.held_out:
        held_out_source = config.data.eval_dataset or "the held-out rows"
        held_out_source = source if rows.numbers else held_out_source
        held_out = packed(config, rows.held_out, outline.tokenizer, held_out_source, numbers[1])
    return Data(
        train=packs,
        held_out=held_out,
        name=packs.name,
        facts={"sequence_length": packs.lengths[-1], "lengths": packs.lengths},
        lines=(
            described(packs, packing=config.data.packing),
            *((_drawn(config, rows),) if rows.numbers else ()),
        ),
    )


def described(packs: Packs, *, packing: bool) -> str:
    """Returns how full the padded or packed sequences are, in words."""
    filled, n = f"{100 * packs.filled:.1f}% filled", len(packs.lengths)
    if packing:
        return (
            f"{len(packs.numbers):,} rows are packed into {len(packs):,} sequences of "
            f"{packs.lengths[-1]} tokens, {filled}"
        )
    if n == 1:
        return f"{len(packs):,} rows are padded to {packs.lengths[0]} tokens, {filled}"
    lengths = ", ".join(map(str, packs.lengths))
    return (
        f"{len(packs):,} rows are batched by length: {n} lengths, {lengths}, {filled}; the step is "
        "compiled for each when it comes"
    )


def _drawn(config: Config, rows: Rows) -> str:
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
    """Tokenises rows, and packs them or has them batched by length.

    Args:
      config: the options.
      rows: chats, or pairs of prompt and completion.
      tokenizer: the model's tokenizer.
      source: the name of the rows in messages.
      numbers: the rows' numbers in the data; by default from 1 on.
    """
    data = config.data
    sequences = tokenize(
        rows, tokenizer, source, numbers, train_on=data.train_on, kept_in=data.token_cache
    )
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
