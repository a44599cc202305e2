"""Reads texts with labels, and encodes them as arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from lora_jax.training.batches import round_up
from lora_jax.training.data.chats import Row
from lora_jax.training.data.labelled import Labelled
from train.data.files import FILE_KINDS, read_rows
from train.run.classify_options import DataConfig
from train.run.errors import UserError
from train.run.hosts import map_over_processes

_BLOCK = 256  # texts encoded at once
_SEED = 0  # of the held-out rows: the same for every run, so that runs are comparable


def read_labelled(data: DataConfig) -> tuple[list[Row], list[Row]]:
    """Returns (rows to train on, rows to test on), each with a text and a label.

    Raises:
      UserError: the rows cannot be read, lack a field, or are too few to hold out a share of them.
    """
    rows = read_rows(data.dataset, split=data.split, subset=data.subset)[: data.rows]
    _check_fields(data, rows, data.dataset)
    if data.test is None:
        names = [_name(row[data.label]) for row in rows]
        try:
            split = train_test_split(
                rows, test_size=data.test_share, random_state=_SEED, stratify=names
            )
        except ValueError as error:
            raise UserError(
                f"--test-share {data.test_share:g} of the {len(rows)} rows cannot be held out: "
                f"{error} Name other rows with --test"
            ) from None
        return split[0], split[1]
    if data.test.endswith(FILE_KINDS):
        test = read_rows(data.test)
    else:
        test = read_rows(data.dataset, split=data.test, subset=data.subset)
    _check_fields(data, test, data.test)
    return rows, test


def _check_fields(data: DataConfig, rows: Sequence[Row], source: str) -> None:
    texts = {"--text": data.text} | ({"--text-pair": data.text_pair} if data.text_pair else {})
    for number, row in enumerate(rows, start=1):
        for option, field in texts.items():
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise UserError(_no_field(row, f"{source}, row {number}", option, field, "a text"))
        label = row.get(data.label)
        if not isinstance(label, str | int) or label == "":
            what = "a name or a whole number"
            raise UserError(_no_field(row, f"{source}, row {number}", "--label", data.label, what))


def _no_field(row: Row, where: str, option: str, field: str, what: str) -> str:
    if field in row:
        return f"{where}: `{field}` is {row[field]!r}; {what} is needed"
    found = ", ".join(f"`{name}`" for name in row) or "nothing"
    return f"{where} has {found}, and no `{field}`: name the field with {option}"


def _name(label: Any) -> str:
    return str(label)


def label_names(data: DataConfig, rows: Sequence[Row]) -> tuple[str, ...]:
    """Returns the classes in the order of their indices: by number, or else alphabetically.

    Raises:
      UserError: all rows have the same label.
    """
    names = {_name(row[data.label]) for row in rows}
    if len(names) < 2:
        raise UserError(f"all rows have the label {names.pop()}: there is nothing to tell apart")
    numbers = all(name.lstrip("-").isdigit() for name in names)
    return tuple(sorted(names, key=int) if numbers else sorted(names))


def encode(
    data: DataConfig, rows: Sequence[Row], names: Sequence[str], tokenizer: Any, source: str
) -> Labelled:
    """Returns rows as arrays, padded to the longest text.

    Args:
      data: the options; they name the fields.
      rows: texts with labels.
      names: the classes; a label's index is its class.
      tokenizer: the model's tokenizer.
      source: the name of the rows in messages.

    Raises:
      UserError: a text is too long, or a label is not among `names`.
    """
    texts = [row[data.text] for row in rows]
    pairs = [row[data.text_pair] for row in rows] if data.text_pair else None
    limit = {"truncation": True, "max_length": data.seq_len} if data.truncate else {}

    def encoded_block(first: int) -> dict[str, list[list[int]]]:
        block = slice(first, first + _BLOCK)
        second = pairs[block] if pairs else None
        return dict(
            tokenizer(texts[block], second, return_token_type_ids=True, verbose=False, **limit)
        )

    blocks = map_over_processes(encoded_block, range(0, len(rows), _BLOCK))
    ids, types = (
        [one for block in blocks for one in block[name]] for name in ("input_ids", "token_type_ids")
    )
    lengths = [len(one) for one in ids]
    if longer := sum(length > data.seq_len for length in lengths):
        raise UserError(
            f"{source}: {longer} of {len(rows)} texts are longer than --seq-len {data.seq_len}, "
            f"the longest has {max(lengths)} tokens. Raise --seq-len, take those rows out, or cut "
            "them off at the end with --truncate"
        )
    index = {name: i for i, name in enumerate(names)}
    for number, row in enumerate(rows, start=1):
        if _name(row[data.label]) not in index:
            raise UserError(
                f"{source}, row {number}: the label {row[data.label]!r} is not among those to "
                f"train on: {', '.join(names)}"
            )
    length = round_up(max(lengths), data.seq_len)
    padding = tokenizer.pad_token_id or 0

    def padded(lists: Sequence[Sequence[int]], fill: int) -> np.ndarray:
        return np.array([[*ids, *[fill] * (length - len(ids))] for ids in lists], np.int32)

    return Labelled(
        ids=padded(ids, padding),
        attention_mask=padded([[1] * n for n in lengths], 0),
        token_type_ids=padded(types, 0),
        labels=np.array([index[_name(row[data.label])] for row in rows], np.int32),
        weights=np.ones(len(rows), np.int32),
    )
