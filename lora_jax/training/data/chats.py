"""Converts chats to token sequences, and marks the tokens that the loss counts.

The model's own template renders chats, with their tools. The loss counts what the assistant says,
its tool calls included, up to and including the end of its turn, and nothing else. Where a template
marks the assistant's words itself (``{% generation %}``), those marks count.
"""

import base64
import dataclasses
import functools
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_jax.core.types import Tokenizer
from lora_jax.hf.vision.readers import AnyReader
from lora_jax.training.data.batches import Packs, pack
from lora_jax.training.data.drafts import Draft, Drafts, TrainOn, draft_sequences
from lora_jax.training.data.image_parts import TEXTS_ONLY, has_images
from lora_jax.training.data.rows import Row, check_rows, conversation, name_of
from lora_jax.training.data.sequences import MapFunction, Sequences, TokenSequence, map_serially
from lora_jax.training.data.templates import LeftOut
from lora_jax.training.data.vision.pictures import Pictures, PixelValues, read_pictures
from lora_jax.training.errors import TrainingError

BLOCK = 1_000  # rows that one process tokenises
_AT_ONCE = 2**17  # characters tokenised at once; a token's offsets take over a hundred bytes


def chats(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    packing: bool = False,
    truncate: bool = False,
    train_on: TrainOn = "assistant",
    images: AnyReader | None = None,
    source: str = "the rows",
) -> Packs:
    """Returns chats as examples for a language model, which learns the assistant's turns.

    Args:
      rows: dicts with `messages` (turns with `role` and `content`, also `tool_calls`) and perhaps
        `tools`; or another of the forms in `lora_jax.training.data.rows`. What the template shows
        in no turn is an error; a field that it shows in some turns only is a warning.
      tokenizer: the model's; its chat template renders the turns.
      seq_len: tokens a sequence, at most.
      packing: puts several rows into one sequence; none sees another. Without it, rows of about
        one length share a batch.
      truncate: cuts longer rows off, which are an error otherwise; drops one that has no token of a
        completion left.
      train_on: the tokens that the loss counts: "assistant", all that the assistant says; "last",
        its last turn; "all", every token.
      images: reads images for the model (`lora_jax.models.load_image_reader`), which rows then may
        have: turns have parts of the type "image", and a row `images`. None for texts alone.
      source: the name of the rows in errors.

    Raises:
      TrainingError: a row cannot be used; names it. Or rows with images are to be packed.

    >>> from lora_jax import models, training
    >>> rows = [{"prompt": "What is one plus one?", "completion": "Two."}]
    >>> tokenizer = models.load_tokenizer("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    >>> examples = training.chats(rows, tokenizer, seq_len=64)  # doctest: +SKIP
    """
    if not rows:
        raise TrainingError(f"{source} is empty. Give data with at least one row.")
    check_rows(rows, source)
    pictures = None if images is None else read_images_of_rows(rows, images, source)
    tokens = tokenize(
        rows, tokenizer, source, train_on=train_on, say=warn_caller, pictures=pictures
    )
    has_pixels = pictures is not None and len(pictures.pixels) > 0
    sequences = check_lengths(tokens, seq_len, truncate=truncate, images=has_pixels)
    packs = pack(sequences, seq_len, packing=packing)
    return packs if pictures is None else add_pictures(packs, [pictures], packing=packing)


def read_images_of_rows(rows: Sequence[Row], reader: AnyReader, source: str) -> Pictures:
    """Returns the images of chats; see `read_pictures`."""
    names = [name_of(row, source, number) for number, row in enumerate(rows, start=1)]
    images = [conversation(row, name).images for row, name in zip(rows, names, strict=True)]
    return read_pictures(images, names, reader)


def add_pictures(packs: Packs, parts: Sequence[Pictures], *, packing: bool) -> Packs:
    """Returns rows whose batches include image inputs, if there are images.

    Args:
      packs: the rows.
      parts: the images of each data set.
      packing: whether several sequences share a row.

    Raises:
      TrainingError: there are images, and rows are packed.
    """
    if not any(len(part.pixels) for part in parts):
        return packs
    if packing:
        raise TrainingError(
            lambda option: (
                f"{option('packing', True)} does not work with images, because each example with "
                f"images needs its own row of a batch. Remove {option('packing')}."
            )
        )
    table = packs.table
    rows = [np.unique(table.rows[table.origins == origin]) for origin in range(len(parts))]
    return dataclasses.replace(packs, further=PixelValues(parts, rows))


def warn_caller(lines: Sequence[str], above: int = 1) -> None:
    """Warns at the line that called the caller of `tokenize`, or `above` frames further up."""
    warnings.warn("; ".join(lines), stacklevel=3 + above)


def tokenize(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    source: str,
    *,
    numbers: Sequence[int] | None = None,
    mapped: MapFunction = map_serially,
    train_on: TrainOn = "assistant",
    say: Callable[[Sequence[str]], None] | None = None,
    drafted: Callable[[Row, int, Tokenizer, str], Drafts] | None = None,
    pictures: Pictures | None = None,
) -> Sequences:
    """Returns the token sequences of each row, one or several.

    There are several where the template renders a turn differently once others follow, and does not
    mark what the assistant says.

    Args:
      rows: see `chats`.
      tokenizer: the model's. It tokenises a block of rows at a time, on all cores.
      source: the name of the rows in errors.
      numbers: the rows' numbers in the data, where these rows are a part; by default from 1 on.
      mapped: applies a function to each of a list of items (here the first row of each block), in
        several processes, say; results are JSON.
      train_on: see `chats`.
      say: gets a line on each field that the template shows in some turns only, if there is one.
      drafted: finds the sequences of a row (its number, the tokenizer and its name follow it); by
        default as `train_on` says.
      pictures: the images of all rows; None where the model reads none.

    Raises:
      TrainingError: a row is not usable; names the first one.
    """
    drafted = drafted or functools.partial(draft_sequences, train_on=train_on)
    numbered = range(1, len(rows) + 1) if numbers is None else numbers

    def tokenize_block(start: int) -> dict[str, Any]:
        """Tokenizes one block of rows; returns JSON-compatible results."""
        drafts: list[Draft] = []
        counts: Counter[str] = Counter()
        names: dict[int, str] = {}
        block = slice(start, start + BLOCK)
        for number, row in zip(numbered[block], rows[block], strict=True):
            name = name_of(row, source, number)
            names[number] = name
            if pictures is None and has_images(row):
                raise TrainingError(f"{name} has {TEXTS_ONLY}")
            row_drafts = drafted(row, number, tokenizer, name)
            drafts += row_drafts.sequences
            for field, left_out in row_drafts.left_out.items():
                counts.update({f"{kind} {field}": n for kind, n in left_out._asdict().items()})
        sequences = _encode_drafts(drafts, tokenizer)
        if pictures is not None:
            sequences = _expand_images(sequences, pictures, names)
        return {**sequences_to_json(sequences), "left_out": counts}

    blocks = mapped(tokenize_block, range(0, len(rows), BLOCK))
    if say is not None:
        total_counts: Counter[str] = Counter()
        for block in blocks:
            total_counts.update(block["left_out"])
        lines = _left_out_lines(total_counts, source)
        if lines:
            say(lines)
    return Sequences.concatenate(map(sequences_from_json, blocks))


def _expand_images(
    sequences: Sequence[TokenSequence], pictures: Pictures, names: Mapping[int, str]
) -> list[TokenSequence]:
    """Inserts image tokens into the sequences of a block.

    Only the last sequence of a row must have all images of the row.

    Args:
      sequences: sequences with one token for each image.
      pictures: the images of all rows.
      names: the name of each row, by its number, for errors.
    """
    expanded = []
    for index, sequence in enumerate(sequences):
        is_last = index + 1 == len(sequences) or sequences[index + 1].row != sequence.row
        expanded.append(pictures.expand(sequence, names[sequence.row], whole=is_last))
    return expanded


def _left_out_lines(counts: Mapping[str, int], source: str) -> list[str]:
    """Returns a warning line for each field that the template omits in some turns."""
    lines = []
    fields = {name.partition(" ")[2] for name in counts}
    for field in sorted(fields):
        left_out = LeftOut(*(counts[f"{kind} {field}"] for kind in LeftOut._fields))
        prefix = f"{source}: the model's chat template leaves out `{field}` of"
        if left_out.later:
            lines.append(
                f"{prefix} {left_out.later:,} of {left_out.turns:,} turns once others follow; each "
                "of these turns is learned with it, in a sequence that ends there"
            )
        if left_out.never:
            lines.append(
                f"{prefix} {left_out.never:,} of {left_out.turns:,} turns, and it is not learned "
                "there"
            )
    return lines


def _encode_drafts(drafts: Sequence[Draft], tokenizer: Tokenizer) -> list[TokenSequence]:
    """Returns drafts as tokens, tokenized in large blocks of texts."""
    plain_texts: list[str] = []
    special_texts: list[str] = []
    for draft in drafts:
        for text in draft.parts:
            (special_texts if text.special else plain_texts).append(text.text)
    # Yields the tokens of the texts in the order of the drafts; a text is tokenised when needed.
    plain_tokens = _encode_texts(plain_texts, False, tokenizer)
    special_tokens = _encode_texts(special_texts, True, tokenizer)
    sequences = []
    for draft in drafts:
        if draft.marked is not None:  # tokenised already
            sequences.append(draft.marked)
            continue
        ids: list[int] = []
        counts = []
        for text in draft.parts:
            text_ids, offsets = next(special_tokens if text.special else plain_tokens)
            ids += text_ids
            is_counted = np.zeros(len(offsets), bool)
            for begin, end in text.spans:
                is_counted |= (offsets >= begin) & (offsets < end)
            counts.append(is_counted)
        if draft.end and tokenizer.eos_token_id not in (None, ids[-1]):
            ids.append(tokenizer.eos_token_id)
            counts.append(np.ones(1, bool))
        sequences.append(TokenSequence(np.array(ids, np.int32), np.concatenate(counts), draft.row))
    return sequences


def _encode_texts(
    texts: Sequence[str], special: bool, tokenizer: Tokenizer
) -> Iterator[tuple[list[int], NDArray[np.int64]]]:
    """Yields the tokens of each text, and the start character of each token.

    The tokenizer gets so many texts at a time that they have some `_AT_ONCE` characters.
    """
    ends = itertools.accumulate(map(len, texts))
    block_of_text = [end // _AT_ONCE for end in ends]
    for _, members in itertools.groupby(range(len(texts)), block_of_text.__getitem__):
        encoding = tokenizer(
            [texts[index] for index in members],
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for ids, spans in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            yield ids, np.array([begin for begin, _ in spans], np.int64)


def sequences_to_json(sequences: Sequence[TokenSequence], origin: int = 0) -> dict[str, Any]:
    """Returns sequences as JSON with arrays encoded as text, for transfer."""
    content = b"".join(Sequences.from_list(sequences).as_bytes())
    return {"origin": origin, "sequences": base64.b64encode(content).decode()}


def sequences_from_json(block: Mapping[str, Any]) -> Sequences:
    """Returns the sequences that `sequences_to_json` encoded, all of one data set."""
    return Sequences.from_bytes(base64.b64decode(block["sequences"]), block["origin"])


def check_lengths(
    sequences: Sequence[TokenSequence],
    seq_len: int,
    *,
    truncate: bool,
    a_unit: int = 1,
    images: bool = False,
) -> Sequences:
    """Returns the sequences, checked or cut to `seq_len`, each with tokens that count.

    If one sequence of a unit (`a_unit` sequences) has no such token, the unit is dropped. An error
    says how rows with `images` become shorter.

    Raises:
      TrainingError: one is longer and `truncate` is off, or none is left.
    """
    table = Sequences.from_list(sequences)
    n_longer = int((table.lengths > seq_len).sum())
    if n_longer and not truncate:
        longest = int(table.lengths.max())
        image_remedy = ""
        if images:
            image_remedy = (
                ". For fewer tokens of images, reduce longest_edge in the size of "
                "preprocessor_config.json, in a copy of the model's folder"
            )
        raise TrainingError(
            lambda option: (
                f"{n_longer} of {len(sequences)} sequences are longer than "
                f"{option('seq_len', seq_len)}. The longest sequence has {longest} tokens. "
                f"Increase {option('seq_len')} to {longest}, remove these rows, or cut off their "
                f"ends with {option('truncate', True)}{image_remedy}."
            )
        )
    table = table.cut(seq_len)
    is_usable_unit = table.predicted.reshape(-1, a_unit).all(axis=1)
    table = table.select(np.flatnonzero(np.repeat(is_usable_unit, a_unit)))
    if not len(table):
        raise TrainingError(
            lambda option: (
                f"{option('seq_len', seq_len)} cuts off every row before its completion begins, so "
                f"there is nothing to learn. Increase {option('seq_len')}, or shorten the prompts."
            )
        )
    return table
