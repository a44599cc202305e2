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
# Kinds of weights that do not multiply every token.
_KINDS_OF_SOME_TOKENS = ("embedding", "head", "experts", "router")


def invocation_ids(alora: str, outline: ModelInfo) -> tuple[int, ...]:
    """Returns the token ids of --alora, which is a text or a list of token ids.

    Raises:
      UserError: the text has no tokens, or the model has no such token.
    """
    if _IDS.fullmatch(alora):
        ids = [int(number) for number in alora.split(",")]
    else:
        ids = outline.tokenizer(alora, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"--alora {alora!r} has no tokens. Pass the text that invokes the adapter.")
    config: Any = outline.config
    if max(ids) >= config.vocab_size:
        raise UserError(
            f"--alora {alora} contains the token id {max(ids)}, but the ids of {outline.name} end "
            f"at {config.vocab_size - 1}. Pass ids of this model."
        )
    return tuple(ids)


def meets_every_token(kind: str | None) -> bool:
    """Returns True if weights of a kind (see `lora_jax.models.kinds`) multiply every token."""
    return kind not in _KINDS_OF_SOME_TOKENS


def check_invoked(tree: Tree, outline: ModelInfo) -> None:
    """Raises a UserError for an activated LoRA of weights that do not multiply every token."""
    if outline.is_torch:
        raise UserError(
            f"{outline.name} runs as a torch module, which does not support an activated LoRA. Use "
            "a model whose family this library supports."
        )
    kinds = outline.kinds
    for path, node in nodes_of(tree).items():
        if getattr(node, "invocation", None) is None:
            raise UserError(
                f"{path} would also change tokens before the invocation, but an activated LoRA "
                "must leave these tokens to the base. Remove --train, --train-tokens and --bias."
            )
        kind = kinds.get(path)
        if not meets_every_token(kind):
            raise UserError(
                f"{path} belongs to the {kind}, which an activated LoRA cannot adapt. Choose other "
                "modules with --targets, such as attention."
            )


def invoked_data(data: Data, invocation: Sequence[int]) -> tuple[Data, list[str]]:
    """Returns data whose loss counts only tokens after the invocation, and lines for the log.

    Args:
      data: rows as token sequences.
      invocation: the token ids that invoke the adapter.

    Raises:
      UserError: the data are of another kind, or no counted token follows an invocation.
    """
    if type(data.train) is not Packs or data.feed is not None:
        raise UserError(
            "An activated LoRA (--alora, or alora_invocation_tokens) needs rows that are read "
            "before training. Use train.sft without --stream."
        )
    train, lines = _count_after_invocation(data.train, invocation)
    held_out = data.held_out
    if isinstance(held_out, Packs):
        held_out, held_out_lines = _count_after_invocation(held_out, invocation)
        lines += [f"held out: {line}" for line in held_out_lines]
    return dataclasses.replace(data, train=train, held_out=held_out), lines


def _count_after_invocation(packs: Packs, invocation: Sequence[int]) -> tuple[Packs, list[str]]:
    """Returns sequences in which only tokens after the invocation count, and lines for the log."""
    table = packs.table
    starts = last_starts(table, invocation)
    has_invocation = starts >= 0
    n_rows = len(table)
    ids = ",".join(map(str, invocation))
    if not has_invocation.any():
        raise UserError(
            f"None of the {n_rows} rows contains the invocation {ids}, from which the adapter "
            "acts, so nothing would train. Copy the text from a row that --dry-run shows, where "
            "the chat template is applied."
        )
    # Each token is predicted from the token before it, so the adapter must act there already.
    row_of_token = np.repeat(np.arange(n_rows), table.lengths)
    start_of_token = np.where(has_invocation, starts, np.iinfo(np.int64).max)[row_of_token]
    is_after_start = np.arange(len(table.ids)) > start_of_token
    counted_table = dataclasses.replace(table, counts=table.counts & is_after_start)
    if not counted_table.predicted.any():
        raise UserError(
            f"The loss counts no token after the invocation {ids}. Change --train-on, or pass "
            "another invocation."
        )
    line = f"{int(has_invocation.sum()):,} of {n_rows:,} rows have the invocation ({ids})"
    if not has_invocation.all():
        names = _name_rows(packs, np.flatnonzero(~has_invocation).tolist())
        line += f"; rows without it, which do not train the adapter: {names}"
    lines = [line]
    n_uncounted = int(table.predicted.sum()) - int(counted_table.predicted.sum())
    if n_uncounted:
        lines.append(
            f"{n_uncounted:,} tokens before the invocation do not count in the loss, because the "
            "base predicts them"
        )
    return dataclasses.replace(packs, table=counted_table), lines


def _name_rows(packs: Packs, indices: Sequence[int]) -> str:
    """Returns the names of the first rows of some sequences as one text."""
    # Several sequences may come from one row of the data, which is named once.
    names: list[str] = []
    for index in indices[: 4 * _MAX_NAMED_ROWS]:
        name = _row_name(packs, index)
        if name not in names:
            names.append(name)
    text = ", ".join(names[:_MAX_NAMED_ROWS])
    return f"{text}, …" if len(indices) > _MAX_NAMED_ROWS else text


def _row_name(packs: Packs, index: int) -> str:
    """Returns the name of a sequence's row in the data, such as "row 3"."""
    row = int(packs.table.rows[index])
    if not packs.sources:
        return f"row {row}"
    return f"row {row} of {packs.sources[int(packs.table.origins[index])]}"


def last_starts(table: Sequences, invocation: Sequence[int]) -> np.ndarray:
    """Returns the start of each sequence's last invocation in `table.ids` [n], or -1 for none."""
    starts = np.full(len(table), -1, np.int64)
    n_positions = len(table.ids) - len(invocation) + 1
    if n_positions <= 0:
        return starts
    # The positions in all sequences at which the invocation starts.
    is_match = np.ones(n_positions, bool)
    for offset, token in enumerate(invocation):
        is_match &= table.ids[offset : offset + n_positions] == token
    (positions,) = np.nonzero(is_match)
    # The last start of each sequence. An invocation must not reach into the next sequence.
    sequence_of_position = np.searchsorted(table.starts, positions, side="right") - 1
    ends = positions + len(invocation)
    is_within = ends <= table.starts[sequence_of_position + 1]
    np.maximum.at(starts, sequence_of_position[is_within], positions[is_within])
    return starts
