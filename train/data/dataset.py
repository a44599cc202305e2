"""The rows of a data set with renamed fields, which are read only if no tokens are cached."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence

from lora_jax.training.data import pairs as of_pairs
from lora_jax.training.data.rows import FORMS, Row, check_rows, field_names, name_of, replace_values
from train.console.errors import UserError, flag
from train.data import cache
from train.data.files import find_data_files, read_rows

_KNOWN_FIELDS = sorted({"input", "tools", "images"}.union(*FORMS, *of_pairs.FORMS))

Pairs = list[tuple[str, str]]


def parse_fields(fields: Sequence[str]) -> Pairs:
    """Parses --fields into pairs of a field's name and its name in the rows.

    Args:
      fields: the option: `prompt=question`, one or several, also parted by commas.

    Raises:
      UserError: a name is not that of a known field.
    """
    pairs = [pair.partition("=")[::2] for field in fields for pair in field.split(",")]
    for name, row_field in pairs:
        if name not in _KNOWN_FIELDS or not row_field:
            raise UserError(
                f"{flag('fields', *fields)} must have the form name=field. Use one of these names: "
                f"{', '.join(_KNOWN_FIELDS)}."
            )
    return pairs


def rename_fields(rows: list[Row], pairs: Pairs, source: str) -> list[Row]:
    """Returns rows with their fields renamed.

    Args:
      rows: the rows, as they were read.
      pairs: the names; see `parse_fields`.
      source: the name of the rows in messages.

    Raises:
      UserError: a row lacks a field, or two fields would have one name.
    """
    if not pairs:
        return rows
    option = flag("fields", *(f"{name}={row_field}" for name, row_field in pairs))
    names = [name for name, _ in pairs]
    repeated_names = [name for name in names if names.count(name) > 1]
    if repeated_names:
        raise UserError(
            f"{option} gives `{repeated_names[0]}` two fields of {source}. Name one field for it."
        )
    row_fields = {row_field for _, row_field in pairs}
    renamed_rows = []
    for number, row in enumerate(rows, start=1):
        for row_field in row_fields - {*row}:
            raise UserError(
                f"{option}: {name_of(row, source, number)} has no field `{row_field}`. It has "
                f"{field_names(row)}. Name one of these fields, or add `{row_field}` to the row."
            )
        others = {name: value for name, value in row.items() if name not in row_fields}
        renamed = {name: row[row_field] for name, row_field in pairs}
        renamed_rows.append(replace_values(row, others | renamed))
    return renamed_rows


@dataclasses.dataclass(eq=False)
class Dataset:
    """A source of rows, with a hash that is known without parsing the rows.

    Attributes:
      name: the name of the rows in messages.
      read: reads and checks them.
      hashed: a hash of the rows; None to take one of what `read` returns.
      kept_in: the option --token-cache; see `train.data.cache`.
      n_bytes: the size of its files; 0 where it has none.
    """

    name: str
    read: Callable[[], list[Row]]
    hashed: str | None = None
    kept_in: str | None = cache.OFF
    n_bytes: int = 0
    _rows: list[Row] | None = dataclasses.field(default=None, init=False)

    def rows(self) -> list[Row]:
        """Returns the rows, and reads them again unless `check` has just read them."""
        rows, self._rows = self._rows, None  # many rows take much memory: they are not kept
        return self.read() if rows is None else rows

    def peek(self) -> list[Row]:
        """Returns the rows without releasing those that `check` has read."""
        return self.read() if self._rows is None else self._rows

    def check(self, *, again: bool = False) -> None:
        """Reads and checks the rows; skips rows with cached tokens unless `again` is True.

        Raises:
          TrainingError: a row cannot be read or used; names it.
        """
        if again or self.hashed is None or not cache.has_tokens(self.kept_in, self.hashed):
            self._rows = self.read()
            _ = self.key

    @functools.cached_property
    def key(self) -> str:
        """Returns a hash of the rows."""
        if self.hashed is not None:
            return self.hashed
        if self._rows is None:
            self._rows = self.read()
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(json.dumps(row, default=repr).encode() + b"\n")
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"{self.name} {self.key}"


def dataset_from_rows(name: str, rows: list[Row]) -> Dataset:
    """Returns a data set of rows in memory, whose tokens are not cached."""
    return Dataset(name, lambda: rows)


def find_dataset(
    name: str,
    *,
    split: str = "train",
    subset: str | None = None,
    fields: Sequence[str] = (),
    used: set[str] | None = None,
    rows: int | None = None,
    kept_in: str | None = cache.OFF,
    check: Callable[[list[Row], str], None] = check_rows,
) -> Dataset:
    """Returns the data set that an option names, without reading its rows.

    Args:
      name, split, subset: see `read_rows`.
      fields: the option --fields.
      used: for one of several data sets. Only those of `fields` that the first row has are
        renamed, and once the rows are read, their names are added to this set. With None, a row
        must have all of `fields`.
      rows: use only this many, from the beginning.
      kept_in: the option --token-cache.
      check: raises an error for rows that cannot be used, from them and their name.

    Raises:
      UserError: there is no such file, or --fields names none.
    """
    pairs = parse_fields(fields)

    def read() -> list[Row]:
        """Reads the rows, renames their fields, and checks them."""
        table = read_rows(name, split=split, subset=subset)[:rows]
        row_pairs = pairs
        if used is not None:
            row_pairs = [pair for pair in pairs if table and pair[1] in table[0]]
            used.update(field for _, field in row_pairs)
        table = rename_fields(table, row_pairs, name)
        check(table, name)
        return table

    # Hash the files as they are, so that a cached data set need not be parsed.
    paths = find_data_files(name, split)
    if paths is None:
        return Dataset(name, read, kept_in=kept_in)
    n_bytes = sum(path.stat().st_size for path in paths)
    options = (pairs, rows, used is None, check is check_rows)
    digest = hashlib.sha256(repr(options).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.suffix.encode() + hashlib.file_digest(file, "sha256").digest())
    return Dataset(name, read, digest.hexdigest(), kept_in, n_bytes)
