"""The task of fine-tuning on a user's chats, or pairs of prompt and completion."""

import functools
from typing import Any

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
from train.run.options import Defaults
from train.run.pretrained import Outline, read_outline
from train.run.sft_options import Config
from train.tasks.task import Data, Rows, Task


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
    """Reads the rows of the dataset; with --eval-every, some of them are held out."""
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
    """Returns the rows as sequences, padded or packed."""
    packs = packed(config, rows.train, outline.tokenizer, config.data.dataset)
    held_out = None
    if rows.held_out:
        source = config.data.eval_dataset or "the held-out rows"
        held_out = packed(config, rows.held_out, outline.tokenizer, source)
    return Data(
        train=packs,
        held_out=held_out,
        name=packs.name,
        facts={"sequence_length": packs.lengths[-1], "lengths": packs.lengths},
        lines=(described(packs, packing=config.data.packing),),
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


def packed(config: Config, rows: list[Row], tokenizer: Any, source: str) -> Packs:
    """Tokenises rows, and packs them or has them batched by length.

    Args:
      config: the options.
      rows: chats, or pairs of prompt and completion.
      tokenizer: the model's tokenizer.
      source: the name of the rows in messages.
    """
    data = config.data
    sequences = tokenize(rows, tokenizer, source, train_on=data.train_on, kept_in=data.token_cache)
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
