"""Examples as the model sees them: decoded tokens, with a mark on what the loss counts."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lora_jax.training.data.batches import Examples, Packs
from lora_jax.training.data.labelled import Labelled
from lora_jax.training.data.preferences import Preferences
from lora_jax.training.data.shared_prompts import JoinedPairs, split_pairs
from lora_jax.training.data.vision.images import Images

_ENDS = 160  # tokens shown of the beginning of a long sequence, and of its end


class Span(NamedTuple):
    """A piece of text, and whether the loss counts its tokens."""

    text: str
    counted: bool


class PreviewRow(NamedTuple):
    """One sequence in words: what it is, and its text."""

    title: str
    spans: list[Span]


def preview_rows(
    examples: Examples,
    tokenizer: Any,
    n: int,
    labels: Any = (),
    named: Callable[[int, int], str] | None = None,
) -> list[PreviewRow]:
    """Returns the first `n` sequences, or those of so many pairs, as the model sees them.

    Args:
      examples: chats, prompts, preferences, or labelled texts or images.
      tokenizer: the model's.
      n: the number of sequences or pairs.
      labels: the names of the classes.
      named: returns the name of a row, from its data set and its number there.
    """
    if isinstance(examples, Packs):
        examples = _with_own_prompts(examples)
        known = range(min(n * _a_unit(examples), len(examples.table)))
        return [_pack_rows(examples, tokenizer, at, named) for at in known]
    if isinstance(examples, Labelled):
        known = range(min(n, len(lengths(examples))))
        return [_label_row(examples, tokenizer, at, labels) for at in known]
    if isinstance(examples, Images):
        return [_image_row(examples, at, labels) for at in range(min(n, len(examples)))]
    return []


def lengths(examples: Examples) -> np.ndarray:
    """Returns the number of tokens of each sequence: [n]."""
    if isinstance(examples, Packs):
        return _with_own_prompts(examples).table.lengths
    if isinstance(examples, Labelled):
        return examples.attention_mask.sum(axis=-1).ravel()
    if isinstance(examples, Images):
        return np.full(len(examples), examples.length)
    return np.empty(0, np.int64)


def _with_own_prompts(packs: Packs) -> Packs:
    """Returns rows to look at, each completion after its prompt."""
    if not isinstance(packs, Preferences) or packs.branches is None:
        return packs
    table = split_pairs(JoinedPairs(packs.table, packs.branches))
    return dataclasses.replace(packs, table=table, firsts=2 * packs.firsts, branches=None)


def _a_unit(packs: Packs) -> int:
    """Returns the number of sequences that make a unit: 2 of pairs."""
    return packs.a_unit if isinstance(packs, Preferences) else 1


def _pack_rows(
    packs: Packs, tokenizer: Any, at: int, named: Callable[[int, int], str] | None
) -> PreviewRow:
    tokens, origin = packs.table[at], int(packs.table.origins[at])
    ids, counted = tokens.ids, tokens.counts.copy()
    counted[:1] = False  # the first token of a sequence is never predicted
    unit = int(np.searchsorted(packs.firsts, at, side="right")) - 1
    a_unit = _a_unit(packs)
    of_unit = (packs.firsts[unit + 1] - packs.firsts[unit]) // a_unit
    source = f" of {packs.sources[origin]}" if packs.sources else ""
    name = f"row {tokens.row}{source}" if named is None else named(origin, tokens.row)
    if a_unit == 2:
        name += ", rejected" if at % 2 else ", chosen"
    elif isinstance(packs, Preferences):
        name += ", good" if packs.table.labels[at] else ", bad"
    title = f"{name}: {len(ids)} tokens"
    if packs.table.counts.any():  # or else they are prompts
        title += f", {counted.sum()} of them count"
    if of_unit > 1:
        place = f"{(at - packs.firsts[unit]) // a_unit + 1} of {of_unit}"
        title += f"; {place} in packed sequence {unit + 1}"
    return PreviewRow(title, _spans(ids, counted, tokenizer))


def _label_row(texts: Labelled, tokenizer: Any, at: int, labels: Any) -> PreviewRow:
    ids, mask = (x.reshape(-1, x.shape[-1])[at] for x in (texts.ids, texts.attention_mask))
    ids = ids[mask > 0]
    if texts.ids.ndim == 3:
        title = f"pair {at // 2 + 1}, {'rejected' if at % 2 else 'chosen'}: {len(ids)} tokens"
    else:
        name = labels[int(texts.labels[at])]
        title = f"text {at + 1}: {len(ids)} tokens; the label to learn is {name!r}"
    return PreviewRow(title, _spans(ids, np.zeros(len(ids), bool), tokenizer))


def _image_row(images: Images, at: int, labels: Any) -> PreviewRow:
    size = " x ".join(map(str, images.pixels.shape[1:]))
    title = f"image {at + 1}: the label to learn is {labels[int(images.labels[at])]!r}"
    return PreviewRow(title, [Span(f"{images.length} tokens, of {size} pixels", False)])


def _spans(ids: np.ndarray, counted: np.ndarray, tokenizer: Any) -> list[Span]:
    """Returns runs of tokens that count, or do not; the middle of a long sequence is left out."""
    if len(ids) <= 2 * _ENDS:
        return _runs(ids, counted, tokenizer)
    left_out = Span(f" … {len(ids) - 2 * _ENDS:,} tokens … ", False)
    first = _runs(ids[:_ENDS], counted[:_ENDS], tokenizer)
    return [*first, left_out, *_runs(ids[-_ENDS:], counted[-_ENDS:], tokenizer)]


def _runs(ids: np.ndarray, counted: np.ndarray, tokenizer: Any) -> list[Span]:
    at = np.flatnonzero(np.diff(counted.astype(np.int8))) + 1
    parts = zip(np.split(ids, at), np.split(counted, at), strict=True)
    how = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return [Span(tokenizer.decode(part.tolist(), **how), bool(c[0])) for part, c in parts]
