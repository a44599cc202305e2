"""The invocation of an activated LoRA: its tokens, and the rows that have it."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.core.types import Tree
from lora_jax.lorafy import nodes_of
from lora_jax.training.data.batches import Packs
from lora_jax.training.data.sequences import Sequences
from train.console.errors import UserError
from train.run.pretrained import ModelInfo
from train.run.task import Data

_IDS = re.compile(r"\d+(,\d+)*")
_MAX_NAMED_ROWS = 5  # rows without an invocation that a line names
_KINDS_OF_SOME_TOKENS = (
    "embedding",
    "head",
    "experts",
    "router",
)  # kinds that do not multiply every token


def invocation_ids(alora: str, outline: ModelInfo) -> tuple[int, ...]:
    """Returns the tokens of --alora: its text as the model's tokenizer has it, or token ids.

    Raises:
      UserError: the text has no tokens, or the model has no such token.
    """
    if _IDS.fullmatch(alora):
        ids = [int(number) for number in alora.split(",")]
    else:
        ids = outline.tokenizer(alora, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"--alora {alora!r} has no tokens: give the text that invokes the adapter")
    config: Any = outline.config
    if max(ids) >= config.vocab_size:
        raise UserError(
            f"--alora {alora}: {outline.name} has {config.vocab_size} tokens, counted from 0, and "
            f"{max(ids)} is none of them"
        )
    return tuple(ids)


def meets_every_token(kind: str | None) -> bool:
    """Returns True if weights of a kind (see `lora_jax.models.kinds`) multiply every token."""
    return kind not in _KINDS_OF_SOME_TOKENS


def check_invoked(tree: Tree, outline: ModelInfo) -> None:
    """Raises a UserError for an activated LoRA of weights that do not multiply every token."""
    if outline.is_torch:
        raise UserError(
            f"{outline.name} runs as a torch module, for which there is no activated LoRA: name a "
            "model that a family of this library knows"
        )
    kinds = outline.kinds
    for path, node in nodes_of(tree).items():
        if getattr(node, "invocation", None) is None:
            raise UserError(
                f"{path} trains without the invocation, so that the tokens before it would not be "
                "the base's: an activated LoRA goes without --train, --train-tokens and --bias"
            )
        kind = kinds.get(path)
        if not meets_every_token(kind):
            raise UserError(
                f"{path} belongs to the {kind}, which an activated LoRA cannot adapt: choose "
                "others with --targets, such as attention"
            )


def invoked_data(data: Data, invocation: Sequence[int]) -> tuple[Data, list[str]]:
    """Returns data whose loss counts what an activated LoRA predicts, and lines about them.

    Args:
      data: rows as token sequences.
      invocation: the tokens from whose last occurrence in a row on the adapter acts.

    Raises:
      UserError: the data are of another kind, or no row has anything to learn.
    """
    if type(data.train) is not Packs or data.feed is not None:
        raise UserError(
            "an activated LoRA (--alora, or alora_invocation_tokens) trains on rows that are read "
            "before training, by train.sft without --stream"
        )
    train, lines = _invoked(data.train, invocation)
    held_out = data.held_out
    if isinstance(held_out, Packs):
        held_out, held_out_lines = _invoked(held_out, invocation)
        lines += [f"held out: {line}" for line in held_out_lines]
    return dataclasses.replace(data, train=train, held_out=held_out), lines


def _invoked(packs: Packs, invocation: Sequence[int]) -> tuple[Packs, list[str]]:
    """Returns sequences of which the tokens after the invocation alone count, and lines."""
    table = packs.table
    starts = last_starts(table, invocation)
    has_invocation = starts >= 0
    n_rows = len(table)
    ids = ",".join(map(str, invocation))
    if not has_invocation.any():
        raise UserError(
            f"none of the {n_rows} rows has the invocation {ids}, so that nothing would train: "
            "give the text as it stands in the rows, template and all (--dry-run shows them)"
        )
    row_of_token = np.repeat(np.arange(n_rows), table.lengths)
    start_of_token = np.where(has_invocation, starts, np.iinfo(np.int64).max)[row_of_token]
    is_after_start = np.arange(len(table.ids)) > start_of_token  # the token before predicts each
    invoked = dataclasses.replace(table, counts=table.counts & is_after_start)
    if not invoked.predicted.any():
        raise UserError(
            f"no token that the loss counts stands after the invocation {ids}: see --train-on"
        )
    line = f"{int(has_invocation.sum()):,} of {n_rows:,} rows have the invocation ({ids})"
    if not has_invocation.all():
        names = _names_without(packs, np.flatnonzero(~has_invocation).tolist())
        line += f"; without it, and so by the base alone: {names}"
    lines = [line]
    n_uncounted = int(table.predicted.sum()) - int(invoked.predicted.sum())
    if n_uncounted:
        lines.append(
            f"{n_uncounted:,} tokens stand before the invocation, where the base predicts: the "
            "loss leaves them out"
        )
    return dataclasses.replace(packs, table=invoked), lines


def _names_without(packs: Packs, indices: Sequence[int]) -> str:
    """Returns the names of the first rows without an invocation, from all their indices."""
    # A row of the data may have several sequences.
    names = dict.fromkeys(_row_name(packs, index) for index in indices[: 4 * _MAX_NAMED_ROWS])
    text = ", ".join([*names][:_MAX_NAMED_ROWS])
    return f"{text}, …" if len(indices) > _MAX_NAMED_ROWS else text


def _row_name(packs: Packs, index: int) -> str:
    """Returns the name of a sequence's row in the data."""
    row = int(packs.table.rows[index])
    if not packs.sources:
        return f"row {row}"
    return f"row {row} of {packs.sources[int(packs.table.origins[index])]}"


def last_starts(table: Sequences, invocation: Sequence[int]) -> np.ndarray:
    """Returns the index in `table.ids` of each sequence's last invocation, [n]; -1 for none."""
    starts = np.full(len(table), -1, np.int64)
    n_positions = len(table.ids) - len(invocation) + 1
    if n_positions <= 0:
        return starts
    is_match = np.ones(n_positions, bool)
    for offset, token in enumerate(invocation):
        is_match &= table.ids[offset : offset + n_positions] == token
    (positions,) = np.nonzero(is_match)
    sequence_of_position = np.searchsorted(table.starts, positions, side="right") - 1
    # An invocation must not reach into the next sequence.
    ends = positions + len(invocation)
    is_within = ends <= table.starts[sequence_of_position + 1]
    np.maximum.at(starts, sequence_of_position[is_within], positions[is_within])
    return starts
