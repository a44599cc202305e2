"""The task of training on preferences: a user's pairs, or rows that are labelled good or bad."""

import dataclasses
import functools

import numpy as np

from lora_jax.hf.packaged import SMOLLM2
from lora_jax.training.data.chats import check_lengths
from lora_jax.training.data.pairs import READ, check_pairs, tokenize_pairs
from lora_jax.training.data.preferences import Preferences, pack_pairs
from lora_jax.training.data.rows import Row
from lora_jax.training.data.sequences import Sequences
from lora_jax.training.data.shared_prompts import share_of_prompts
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss, pair_loss, unpaired_loss
from train.console.errors import UserError
from train.console.output import tell
from train.data.chats import tokenize
from train.data.dataset import Dataset, find_dataset
from train.data.lines import format_held_out_line, format_padding_line
from train.live.preferences import prepare
from train.live.reference import check_reference, reference_line
from train.options.defaults import Defaults
from train.options.scripts.dpo import KTO, NONE, Config
from train.processes import hosts
from train.run.pretrained import ModelInfo
from train.run.shared_prompts import OF_SHARING, SHARED, PromptRows, SharedPrompts, choose_sharing
from train.run.task import Data, Task, TaskRows
from train.tasks import chats


def read_rows(config: Config) -> TaskRows:
    """Finds the data sets, and checks their rows."""
    data = config.data
    find = functools.partial(
        find_dataset,
        subset=data.subset,
        fields=data.fields,
        kept_in=data.token_cache,
        check=functools.partial(_check_rows, labelled=KTO in config.optim.loss),
    )
    train = find(data.dataset, split=data.split, rows=data.rows)
    held_out: list[Dataset] = []
    if data.eval_dataset is not None:
        held_out = [find(data.eval_dataset, split=data.eval_split)]
    for dataset in (train, *held_out):
        dataset.check()
    return TaskRows([train], held_out)


def _check_rows(rows: list[Row], source: str, *, labelled: bool) -> None:
    """Checks rows, and prints the fields that are not read."""
    check_pairs(rows, source, labelled=labelled)
    fields = dict.fromkeys(name for row in rows for name in row)
    unread_fields = [name for name in fields if name not in READ]
    if unread_fields:
        tell(hosts.console(), f"{source}: these fields are not read: {', '.join(unread_fields)}")


def outline(config: Config, rows: TaskRows) -> ModelInfo:
    """Reads the model's outline, and checks --seq-len and --reference against it."""
    info = chats.outline(config, rows)
    if KTO not in config.optim.loss:
        reason = "The completions of a pair share one row, but "
        chats.check_keeps_apart(info, reason, "Use another model, or --loss kto.")
    check_reference(config, info)
    return info


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the rows as sequences, two per pair, of which --eval-every holds some out."""
    train = rows.train[0]
    tokens = _tokenize_rows(config, train, outline)
    # Held-out rows come from --eval-dataset, or are drawn from the training rows.
    held_out_tokens: Sequences | None = None
    lines: list[str] = []
    if rows.held_out:
        held_out_tokens = _tokenize_rows(config, rows.held_out[0], outline)
    else:
        held_out_rows = chats.hold_out(config, {train.name: int(tokens.rows[-1])})
        if held_out_rows is not None:
            (row_numbers,) = held_out_rows
            tokens, held_out_tokens = tokens.split(row_numbers)
            lines.append(f"{len(row_numbers)} rows of {train.name} are held out")
    is_kto = KTO in config.optim.loss
    if is_kto and held_out_tokens is not None and len(held_out_tokens) < 2:
        raise UserError(
            "--loss kto compares held-out rows with each other, but there is only one. Hold out "
            "more rows, or remove --eval-every."
        )
    # Form the sequences of both parts.
    tokens = _check_lengths(config, train.name, tokens)
    sharing = _choose_sharing(config, outline, tokens)
    packs = _pack(config, tokens, share_prompt=sharing.shared)
    unit = "rows" if packs.a_unit == 1 else "pairs"
    held_out_packs: Preferences | None = None
    if held_out_tokens is not None:
        held_out_tokens = _check_lengths(config, "the held-out rows", held_out_tokens)
        held_out_packs = _pack(config, held_out_tokens, share_prompt=sharing.shared)
        if rows.held_out:
            lines.append(format_held_out_line(held_out_packs.n_units, unit, rows.held_out[0].name))
    return Data(
        train=packs,
        held_out=held_out_packs,
        name=packs.name,
        source=train.name,
        facts={
            "sequence_length": packs.lengths[-1],
            "lengths": packs.lengths,
            "rows": packs.n_units,
            SHARED: sharing.shared,
        },
        lines=(
            _filling_line(packs, unit, packing=config.data.packing),
            *lines,
            *sharing.lines,
            reference_line(config),
        ),
    )


def _filling_line(packs: Preferences, unit: str, *, packing: bool) -> str:
    """Returns a line with the number, lengths and filled share of padded or packed rows."""
    if packing:
        return (
            f"{packs.n_units:,} {unit} are packed into {len(packs):,} rows of "
            f"{packs.lengths[-1]} tokens, {100 * packs.filled:.1f}% filled"
        )
    return format_padding_line(len(packs), unit, packs.lengths, packs.filled)


def _tokenize_rows(config: Config, dataset: Dataset, outline: ModelInfo) -> Sequences:
    """Returns a data set's rows as sequences."""
    return tokenize(
        dataset,
        outline.tokenizer,
        work=tokenize_pairs,
        labelled=KTO in config.optim.loss,
        write=not config.run.dry_run,
    )


def _check_lengths(config: Config, source: str, tokens: Sequences) -> Sequences:
    """Returns sequences of at most --seq-len tokens, without pairs that lose a completion.

    Raises:
      TrainingError: a sequence is longer, and --truncate is not given.
    """
    data = config.data
    unit_sequences = 1 if KTO in config.optim.loss else 2
    fitting = check_lengths(tokens, data.seq_len, truncate=data.truncate, a_unit=unit_sequences)
    n_left_out = (len(tokens) - len(fitting)) // unit_sequences
    if n_left_out:
        tell(
            hosts.console(),
            f"{source}: {n_left_out} rows are not used, because --seq-len cuts them off before a "
            "completion",
        )
    return fitting


def _choose_sharing(config: Config, outline: ModelInfo, tokens: Sequences) -> SharedPrompts:
    """Chooses between one prompt for both completions of a pair and one for each completion."""
    if KTO in config.optim.loss:  # single completions share no prompt
        single_rows = PromptRows(completions=1, share=0.0, rows=0, shared=(0, 0), alone=(0, 0))
        return choose_sharing(config, [outline], single_rows)
    data = config.data
    # Pack the pairs both ways. The number of rows and their length tell which way costs less.
    packs_sharing = pack_pairs(tokens, data.seq_len, packing=data.packing, share_prompt=True)
    packs_alone = pack_pairs(tokens, data.seq_len, packing=data.packing, share_prompt=False)
    rows = PromptRows(
        completions=2,
        share=share_of_prompts(tokens),
        rows=config.optim.batch_size,
        shared=(len(packs_sharing), packs_sharing.lengths[-1]),
        alone=(len(packs_alone), packs_alone.lengths[-1]),
    )
    return choose_sharing(config, [outline], rows)


def _pack(config: Config, tokens: Sequences, *, share_prompt: bool) -> Preferences:
    """Returns examples, with zeros in place of the reference's log-probabilities."""
    data = config.data
    packs = pack_pairs(
        tokens,
        data.seq_len,
        packing=data.packing,
        labelled=KTO in config.optim.loss,
        predict_prompts=config.optim.predicts_prompts,
        share_prompt=share_prompt,
    )
    if data.reference == NONE:
        return packs
    zeros = np.zeros((len(packs), packs.segments_a_row), np.float32)
    return dataclasses.replace(packs, reference=zeros)


def loss(config: Config, layout: Layout) -> Loss:
    """Returns the loss of --loss."""
    optim = config.optim
    chunks = layout.chunks(optim.loss_chunk)
    if KTO in optim.loss:
        return unpaired_loss(optim.beta, optim.kto_weights or (1.0, 1.0), **chunks)
    return pair_loss(optim.terms, optim.preference, **chunks)


TASK = Task(
    defaults=Defaults(model=SMOLLM2.name, alpha=2.0, lr=5e-5, full_lr=5e-6),
    check=chats.check_measured,
    rows=read_rows,
    outline=outline,
    examples=examples,
    loss=loss,
    prepare=prepare,
    reads=lambda config: ("loss", "nll_weight", *OF_SHARING, *chats.seed_read(config)),
)
