"""Decodes examples as the model sees them, and marks the tokens that the loss counts."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lora_jax.training.data.batches import Examples, Packs
from lora_jax.training.data.labelled import Labelled
from lora_jax.training.data.preferences import Preferences
from lora_jax.training.data.shared_prompts import JoinedPairs, split_pairs
from lora_jax.training.data.vision.images import Images

_SHOWN_END_TOKENS = 160  # tokens shown of the beginning of a long sequence, and of its end


class Span(NamedTuple):
    """A piece of text, and whether the loss counts its tokens."""

    text: str
    counted: bool


class PreviewRow(NamedTuple):
    """One sequence as text, with a title."""

    title: str
    spans: list[Span]


def preview_rows(
    examples: Examples,
    tokenizer: Any,
    n: int,
    labels: Any = (),
    row_name: Callable[[int, int], str] | None = None,
) -> list[PreviewRow]:
    """Returns the sequences of the first `n` examples or pairs as the model sees them.

    Args:
      examples: chats, prompts, preferences, or labelled texts or images.
      tokenizer: the model's.
      n: the number of sequences or pairs.
      labels: the names of the classes.
      row_name: returns the name of a row, from the index of its data set and its number there.
    """
    if isinstance(examples, Packs):
        examples = _repeat_shared_prompts(examples)
        n_sequences = min(n * _count_sequences_per_unit(examples), len(examples.table))
        return [_preview_sequence(examples, tokenizer, i, row_name) for i in range(n_sequences)]
    if isinstance(examples, Labelled):
        n_texts = min(n, len(lengths(examples)))
        return [_preview_labelled_text(examples, tokenizer, i, labels) for i in range(n_texts)]
    if isinstance(examples, Images):
        n_images = min(n, len(examples))
        return [_preview_image(examples, i, labels) for i in range(n_images)]
    return []


def lengths(examples: Examples) -> np.ndarray:
    """Returns the number of tokens of each sequence: [n]."""
    if isinstance(examples, Packs):
        return _repeat_shared_prompts(examples).table.lengths
    if isinstance(examples, Labelled):
        return examples.attention_mask.sum(axis=-1).ravel()
    if isinstance(examples, Images):
        return np.full(len(examples), examples.length)
    return np.empty(0, np.int64)


def _repeat_shared_prompts(packs: Packs) -> Packs:
    """Returns packs in which each completion follows its own copy of the prompt."""
    if not isinstance(packs, Preferences) or packs.branches is None:
        return packs
    table = split_pairs(JoinedPairs(packs.table, packs.branches))
    return dataclasses.replace(packs, table=table, firsts=2 * packs.firsts, branches=None)


def _count_sequences_per_unit(packs: Packs) -> int:
    """Returns the number of sequences per unit: 2 for pairs, else 1."""
    return packs.a_unit if isinstance(packs, Preferences) else 1


def _preview_sequence(
    packs: Packs, tokenizer: Any, index: int, row_name: Callable[[int, int], str] | None
) -> PreviewRow:
    """Returns the preview of one sequence of packs."""
    sequence = packs.table[index]
    counted = sequence.counts.copy()
    counted[:1] = False  # the first token of a sequence is never predicted
    title = f"{_name_sequence(packs, index, row_name)}: {len(sequence.ids)} tokens"
    are_prompts = not packs.table.counts.any()
    if not are_prompts:
        title += f", {counted.sum()} of them count"
    # Several units share a packed sequence: say which one of them this is.
    pack = int(np.searchsorted(packs.firsts, index, side="right")) - 1
    unit_sequences = _count_sequences_per_unit(packs)
    units_of_pack = (packs.firsts[pack + 1] - packs.firsts[pack]) // unit_sequences
    if units_of_pack > 1:
        unit = (index - packs.firsts[pack]) // unit_sequences
        title += f"; {unit + 1} of {units_of_pack} in packed sequence {pack + 1}"
    return PreviewRow(title, _decode_spans(sequence.ids, counted, tokenizer))


def _name_sequence(packs: Packs, index: int, row_name: Callable[[int, int], str] | None) -> str:
    """Names a sequence by its row and, for preferences, by its side or label."""
    origin = int(packs.table.origins[index])
    number = packs.table[index].row
    if row_name is not None:
        name = row_name(origin, number)
    else:
        source = f" of {packs.sources[origin]}" if packs.sources else ""
        name = f"row {number}{source}"
    if not isinstance(packs, Preferences):
        return name
    if packs.a_unit == 2:
        return name + (", rejected" if index % 2 else ", chosen")
    return name + (", good" if packs.table.labels[index] else ", bad")


def _preview_labelled_text(texts: Labelled, tokenizer: Any, index: int, labels: Any) -> PreviewRow:
    """Returns the preview of a labelled text, or of one side of a pair."""
    seq = texts.ids.shape[-1]
    mask = texts.attention_mask.reshape(-1, seq)[index]
    ids = texts.ids.reshape(-1, seq)[index][mask > 0]
    if texts.ids.ndim == 3:
        side = "rejected" if index % 2 else "chosen"
        title = f"pair {index // 2 + 1}, {side}: {len(ids)} tokens"
    else:
        label = labels[int(texts.labels[index])]
        title = f"text {index + 1}: {len(ids)} tokens; the label to learn is {label!r}"
    return PreviewRow(title, _decode_spans(ids, np.zeros(len(ids), bool), tokenizer))


def _preview_image(images: Images, index: int, labels: Any) -> PreviewRow:
    """Returns the preview of an image: its label and its size."""
    size = " x ".join(map(str, images.pixels.shape[1:]))
    label = labels[int(images.labels[index])]
    title = f"image {index + 1}: the label to learn is {label!r}"
    return PreviewRow(title, [Span(f"{images.length} tokens, of {size} pixels", False)])


def _decode_spans(ids: np.ndarray, counted: np.ndarray, tokenizer: Any) -> list[Span]:
    """Decodes a sequence into spans, and shortens the middle of a long sequence."""
    if len(ids) <= 2 * _SHOWN_END_TOKENS:
        return _decode_runs(ids, counted, tokenizer)
    beginning = _decode_runs(ids[:_SHOWN_END_TOKENS], counted[:_SHOWN_END_TOKENS], tokenizer)
    middle = Span(f" … {len(ids) - 2 * _SHOWN_END_TOKENS:,} tokens … ", False)
    end = _decode_runs(ids[-_SHOWN_END_TOKENS:], counted[-_SHOWN_END_TOKENS:], tokenizer)
    return [*beginning, middle, *end]


def _decode_runs(ids: np.ndarray, counted: np.ndarray, tokenizer: Any) -> list[Span]:
    """Decodes each run of consecutive tokens that all count or all do not count."""
    starts = np.flatnonzero(np.diff(counted.astype(np.int8))) + 1
    spans: list[Span] = []
    for run_ids, run_counted in zip(np.split(ids, starts), np.split(counted, starts), strict=True):
        text = tokenizer.decode(
            run_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        spans.append(Span(text, bool(run_counted[0])))
    return spans
