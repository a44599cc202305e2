"""Reads texts with labels, and encodes them as arrays."""

from collections.abc import Sequence
from typing import Any

from sklearn.model_selection import train_test_split

from lora_jax.training.data import labelled
from lora_jax.training.data.labelled import Fields, Labelled
from lora_jax.training.data.rows import Row
from train.console.errors import UserError
from train.data.files import kind_of, read_rows
from train.options.classify import DataConfig
from train.processes.hosts import map_over_processes

_SEED = 0  # of the held-out rows: the same for every run, so that runs are comparable


def read_labelled(data: DataConfig) -> tuple[list[Row], list[Row]]:
    """Returns (rows to train on, rows to test on), each with a text and a label.

    Raises:
      TrainingError: the rows cannot be read, lack a field, or are too few to hold out a share.
    """
    rows = read_rows(data.dataset, split=data.split, subset=data.subset)[: data.rows]
    labelled.check_rows(rows, data.dataset, fields_of(data))
    if data.test is None:
        names = [str(row[data.label]) for row in rows]
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
    if kind_of(data.test):
        test = read_rows(data.test)
    else:
        test = read_rows(data.dataset, split=data.test, subset=data.subset)
    labelled.check_rows(test, data.test, fields_of(data))
    return rows, test


def fields_of(data: DataConfig) -> Fields:
    """Returns the names of the fields, from the options."""
    return Fields(text=data.text, text_pair=data.text_pair, label=data.label)


def encode(
    data: DataConfig, rows: Sequence[Row], names: Sequence[str], tokenizer: Any, source: str
) -> Labelled:
    """Returns rows as arrays; each process encodes its part. See `lora_jax.training.texts`."""
    return labelled.encode(
        rows,
        names,
        tokenizer,
        fields=fields_of(data),
        seq_len=data.seq_len,
        truncate=data.truncate,
        source=source,
        mapped=map_over_processes,
    )
