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
_NAMED = 5  # rows without an invocation that a line names
_OTHERS = ("embedding", "head", "experts", "router")  # kinds that do not multiply every token


def invocation_ids(given: str, outline: ModelInfo) -> tuple[int, ...]:
    """Returns the tokens of --alora: its text as the model's tokenizer has it, or token ids.

    Raises:
      UserError: the text has no tokens, or the model has no such token.
    """
    if _IDS.fullmatch(given):
        ids = [int(number) for number in given.split(",")]
    else:
        ids = outline.tokenizer(given, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"--alora {given!r} has no tokens: give the text that invokes the adapter")
    config: Any = outline.config
    if max(ids) >= config.vocab_size:
        raise UserError(
            f"--alora {given}: {outline.name} has {config.vocab_size} tokens, counted from 0, and "
            f"{max(ids)} is none of them"
        )
    return tuple(ids)


def meets_every_token(kind: str | None) -> bool:
    """Returns True if weights of a kind (see `lora_jax.models.kinds`) multiply every token."""
    return kind not in _OTHERS


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
        if not meets_every_token(kind := kinds.get(path)):
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
    train, *lines = _invoked(data.train, invocation)
    held_out: Any = data.held_out
    if isinstance(held_out, Packs):
        held_out, *of_held_out = _invoked(held_out, invocation)
        lines += [f"held out: {line}" for line in of_held_out]
    return dataclasses.replace(data, train=train, held_out=held_out), lines


def _invoked(packs: Packs, invocation: Sequence[int]) -> tuple[Any, ...]:
    """Returns sequences of which the tokens after the invocation alone count, and lines."""
    table = packs.table
    starts = last_starts(table, invocation)
    n, ids = len(table), ",".join(map(str, invocation))
    if (starts < 0).all():
        raise UserError(
            f"none of the {n} rows has the invocation {ids}, so that nothing would train: give "
            "the text as it stands in the rows, template and all (--dry-run shows them)"
        )
    owner = np.repeat(np.arange(n), table.lengths)
    first = np.where(starts < 0, np.iinfo(np.int64).max, starts)[owner]
    after = np.arange(len(table.ids)) > first  # the token before predicts each
    counts = table.counts & after
    lost = int(table.predicted.sum())
    table = dataclasses.replace(table, counts=counts)
    lost -= int(table.predicted.sum())
    if not table.predicted.any():
        raise UserError(
            f"no token that the loss counts stands after the invocation {ids}: see --train-on"
        )
    line = f"{int((starts >= 0).sum()):,} of {n:,} rows have the invocation ({ids})"
    if without := np.flatnonzero(starts < 0).tolist():
        rows = dict.fromkeys(_row_name(packs, at) for at in without[: 4 * _NAMED])
        some = ", ".join([*rows][:_NAMED]) + ", …" * (len(without) > _NAMED)
        line += f"; without it, and so by the base alone: {some}"
    lines = [line]
    if lost:
        lines.append(
            f"{lost:,} tokens stand before the invocation, where the base predicts: the loss "
            "leaves them out"
        )
    return dataclasses.replace(packs, table=table), *lines


def _row_name(packs: Packs, at: int) -> str:
    """Returns the name of a sequence's row in the data."""
    origin, row = int(packs.table.origins[at]), int(packs.table.rows[at])
    return f"row {row}" + (f" of {packs.sources[origin]}" if packs.sources else "")


def last_starts(table: Sequences, invocation: Sequence[int]) -> np.ndarray:
    """Returns the place in `table.ids` of each sequence's last invocation, [n]; -1 for none."""
    places = len(table.ids) - len(invocation) + 1
    starts = np.full(len(table), -1, np.int64)
    if places <= 0:
        return starts
    matches = np.ones(places, bool)
    for offset, token in enumerate(invocation):
        matches &= table.ids[offset : offset + places] == token
    (here,) = np.nonzero(matches)
    owners = np.searchsorted(table.starts, here, side="right") - 1
    whole = here + len(invocation) <= table.starts[owners + 1]
    np.maximum.at(starts, owners[whole], here[whole])
    return starts
