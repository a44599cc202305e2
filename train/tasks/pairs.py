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
from train.data.lines import measured_line, padding_line
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
    look = functools.partial(
        find_dataset,
        subset=data.subset,
        fields=data.fields,
        kept_in=data.token_cache,
        check=functools.partial(_check_rows, labelled=KTO in config.optim.loss),
    )
    train = look(data.dataset, split=data.split, rows=data.rows)
    measured = []
    if data.eval_dataset is not None:
        measured = [look(data.eval_dataset, split=data.eval_split)]
    for dataset in (train, *measured):
        dataset.check()
    return TaskRows([train], measured)


def _check_rows(rows: list[Row], source: str, *, labelled: bool) -> None:
    """Checks rows, and says which of their fields are not read."""
    check_pairs(rows, source, labelled=labelled)
    names = dict.fromkeys(name for row in rows for name in row)
    if unread := [name for name in names if name not in READ]:
        tell(hosts.console(), f"{source}: fields that are not read: {', '.join(unread)}")


def outline(config: Config, rows: TaskRows) -> ModelInfo:
    """Reads the model's outline; checks --seq-len and --reference against it."""
    info = chats.outline(config, rows)
    if KTO not in config.optim.loss:
        why = "the completions of a pair share one row, and "
        chats.check_keeps_apart(info, why, "name another model, or use --loss kto")
    check_reference(config, info)
    return info


def examples(config: Config, rows: TaskRows, outline: ModelInfo) -> Data:
    """Returns the rows as sequences, two a pair; with --eval-every, some are held out."""
    (train,), measured = rows
    tokens = _tokens(config, train, outline)
    held_out = _tokens(config, measured[0], outline) if measured else None
    lines = []
    drawn = None if measured else chats.hold_out(config, {train.name: int(tokens.rows[-1])})
    if drawn is not None:
        tokens, held_out = tokens.split(drawn[0])
        lines = [f"{len(drawn[0])} rows of {train.name} are held out"]
    if held_out is not None and KTO in config.optim.loss and len(held_out) < 2:
        raise UserError(
            "--loss kto compares held-out rows with one another, and there is one: give more, or "
            "leave out --eval-every"
        )
    kept = _kept(config, train.name, tokens)
    sharing = _sharing(config, outline, kept)
    packs = _packed(config, kept, share_prompt=sharing.shared)
    unit = "rows" if packs.a_unit == 1 else "pairs"
    if config.data.packing:
        full = f"{packs.lengths[-1]} tokens, {100 * packs.filled:.1f}% filled"
        lines.insert(0, f"{packs.n_units:,} {unit} are packed into {len(packs):,} rows of {full}")
    else:
        lines.insert(0, padding_line(len(packs), unit, packs.lengths, packs.filled))
    measured_on = None
    if held_out is not None:
        kept = _kept(config, "the held-out rows", held_out)
        measured_on = _packed(config, kept, share_prompt=sharing.shared)
        if measured:
            lines.append(measured_line(measured_on.n_units, unit, measured[0].name))
    facts = {"sequence_length": packs.lengths[-1], "lengths": packs.lengths, "rows": packs.n_units}
    return Data(
        train=packs,
        held_out=measured_on,
        name=packs.name,
        source=train.name,
        facts=facts | {SHARED: sharing.shared},
        lines=(*lines, *sharing.lines, reference_line(config)),
    )


def _tokens(config: Config, dataset: Dataset, outline: ModelInfo) -> Sequences:
    labelled = KTO in config.optim.loss
    write = not config.run.dry_run
    return tokenize(dataset, outline.tokenizer, work=tokenize_pairs, labelled=labelled, write=write)


def _kept(config: Config, source: str, tokens: Sequences) -> Sequences:
    """Returns sequences of --seq-len at most, without pairs that have no token left to learn."""
    data, a_unit = config.data, 1 if KTO in config.optim.loss else 2
    kept = check_lengths(tokens, data.seq_len, truncate=data.truncate, a_unit=a_unit)
    if left_out := (len(tokens) - len(kept)) // a_unit:
        tell(
            hosts.console(),
            f"{source}: left out {left_out} rows, truncated before a completion began",
        )
    return kept


def _sharing(config: Config, outline: ModelInfo, kept: Sequences) -> SharedPrompts:
    """Chooses between a prompt for both completions of a pair, and one for each."""
    if KTO in config.optim.loss:
        return choose_sharing(config, [outline], PromptRows(1, 0.0, 0, (0, 0), (0, 0)))
    data = config.data
    shared, alone = (
        pack_pairs(kept, data.seq_len, packing=data.packing, share_prompt=share_prompt)
        for share_prompt in (True, False)
    )
    rows = PromptRows(
        completions=2,
        share=share_of_prompts(kept),
        rows=config.optim.batch_size,
        shared=(len(shared), shared.lengths[-1]),
        alone=(len(alone), alone.lengths[-1]),
    )
    return choose_sharing(config, [outline], rows)


def _packed(config: Config, kept: Sequences, *, share_prompt: bool) -> Preferences:
    """Returns examples; zeros stand for the reference's log-probabilities, until it is read."""
    data = config.data
    packs = pack_pairs(
        kept,
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
    split = layout.chunks(optim.loss_chunk)
    if KTO in optim.loss:
        return unpaired_loss(optim.beta, optim.kto_weights or (1.0, 1.0), **split)
    return pair_loss(optim.terms, optim.preference, **split)


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
