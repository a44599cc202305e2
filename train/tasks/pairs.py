"""The task of training on preferences: a user's pairs, or rows that are good or bad."""

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
    """Checks rows, and says which of their fields are not read."""
    check_pairs(rows, source, labelled=labelled)
    fields = dict.fromkeys(name for row in rows for name in row)
    unread_fields = [name for name in fields if name not in READ]
    if unread_fields:
        tell(hosts.console(), f"{source}: fields that are not read: {', '.join(unread_fields)}")


def outline(config: Config, rows: TaskRows) -> ModelInfo:
    """Reads the model's outline; checks --seq-len and --reference against it."""
    info = chats.outline(config, rows)
    if KTO not in config.optim.loss:
        reason = "the completions of a pair share one row, and "
        chats.check_keeps_apart(info, reason, "name another model, or use --loss kto")
    check_reference(config, info)
    return info


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the rows as sequences, two a pair; with --eval-every, some are held out."""
    train = rows.train[0]
    tokens = _tokens(config, train, outline)
    held_out_tokens: Sequences | None = None
    lines: list[str] = []
    if rows.held_out:
        held_out_tokens = _tokens(config, rows.held_out[0], outline)
    else:
        held_out_rows = chats.hold_out(config, {train.name: int(tokens.rows[-1])})
        if held_out_rows is not None:
            (row_numbers,) = held_out_rows
            tokens, held_out_tokens = tokens.split(row_numbers)
            lines.append(f"{len(row_numbers)} rows of {train.name} are held out")
    is_kto = KTO in config.optim.loss
    if is_kto and held_out_tokens is not None and len(held_out_tokens) < 2:
        raise UserError(
            "--loss kto compares held-out rows with one another, and there is one: give more, or "
            "leave out --eval-every"
        )
    tokens = _fitting(config, train.name, tokens)
    sharing = _sharing(config, outline, tokens)
    packs = _packed(config, tokens, share_prompt=sharing.shared)
    unit = "rows" if packs.a_unit == 1 else "pairs"
    held_out_packs: Preferences | None = None
    if held_out_tokens is not None:
        held_out_tokens = _fitting(config, "the held-out rows", held_out_tokens)
        held_out_packs = _packed(config, held_out_tokens, share_prompt=sharing.shared)
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
    """Returns a line on the padded or packed rows: their number, lengths and filled share."""
    if packing:
        return (
            f"{packs.n_units:,} {unit} are packed into {len(packs):,} rows of "
            f"{packs.lengths[-1]} tokens, {100 * packs.filled:.1f}% filled"
        )
    return format_padding_line(len(packs), unit, packs.lengths, packs.filled)


def _tokens(config: Config, dataset: Dataset, outline: ModelInfo) -> Sequences:
    """Returns a data set's rows as sequences."""
    return tokenize(
        dataset,
        outline.tokenizer,
        work=tokenize_pairs,
        labelled=KTO in config.optim.loss,
        write=not config.run.dry_run,
    )


def _fitting(config: Config, source: str, tokens: Sequences) -> Sequences:
    """Returns sequences of --seq-len at most, without pairs that have no token left to learn."""
    data = config.data
    unit_sequences = 1 if KTO in config.optim.loss else 2
    fitting = check_lengths(tokens, data.seq_len, truncate=data.truncate, a_unit=unit_sequences)
    n_left_out = (len(tokens) - len(fitting)) // unit_sequences
    if n_left_out:
        tell(
            hosts.console(),
            f"{source}: left out {n_left_out} rows, truncated before a completion began",
        )
    return fitting


def _sharing(config: Config, outline: ModelInfo, tokens: Sequences) -> SharedPrompts:
    """Chooses between a prompt for both completions of a pair, and one for each."""
    if KTO in config.optim.loss:  # single completions, which share nothing
        single_rows = PromptRows(completions=1, share=0.0, rows=0, shared=(0, 0), alone=(0, 0))
        return choose_sharing(config, [outline], single_rows)
    data = config.data
    shared = pack_pairs(tokens, data.seq_len, packing=data.packing, share_prompt=True)
    alone = pack_pairs(tokens, data.seq_len, packing=data.packing, share_prompt=False)
    rows = PromptRows(
        completions=2,
        share=share_of_prompts(tokens),
        rows=config.optim.batch_size,
        shared=(len(shared), shared.lengths[-1]),
        alone=(len(alone), alone.lengths[-1]),
    )
    return choose_sharing(config, [outline], rows)


def _packed(config: Config, tokens: Sequences, *, share_prompt: bool) -> Preferences:
    """Returns examples; zeros stand for the reference's log-probabilities, until it is read."""
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
    """Returns the loss that --loss names."""
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
