"""The rows of a data set, read only if no earlier run kept their tokens."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence

from lora_jax.training.data.rows import Row, check_rows
from train.data import cache
from train.data.fields import found_in, pairs_of, renamed
from train.data.files import files_of, read_rows


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Holds where rows come from, and a hash of them that needs no parsing.

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

    def rows(self) -> list[Row]:
        """Returns the rows, read once more unless `check` just has."""
        if "_rows" in self.__dict__:
            return self.__dict__.pop("_rows")  # many rows take much memory: they are not kept
        return self.read()

    def check(self, *, again: bool = False) -> None:
        """Reads and checks the rows, unless an earlier run did; with `again` in any case.

        Raises:
          TrainingError: a row cannot be read or used; names it.
        """
        if again or self.hashed is None or not cache.knows(self.kept_in, self.hashed):
            self.__dict__["_rows"] = self.read()
            _ = self.key

    @functools.cached_property
    def key(self) -> str:
        """Returns a hash of the rows."""
        if self.hashed is not None:
            return self.hashed
        self.__dict__.setdefault("_rows", self.read())
        made = hashlib.sha256()
        for row in self.__dict__["_rows"]:
            made.update(json.dumps(row, default=repr).encode() + b"\n")
        return made.hexdigest()

    def __repr__(self) -> str:
        return f"{self.name} {self.key}"


def of_rows(name: str, rows: list[Row]) -> Dataset:
    """Returns rows in memory as a data set; their tokens are not kept."""
    return Dataset(name, lambda: rows)


def find(
    name: str,
    *,
    split: str = "train",
    subset: str | None = None,
    fields: Sequence[str] = (),
    used: set[str] | None = None,
    rows: int | None = None,
    kept_in: str | None = cache.OFF,
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

    Raises:
      UserError: there is no such file, or --fields names none.
    """
    pairs = pairs_of(fields)

    def read() -> list[Row]:
        found = read_rows(name, split=split, subset=subset)[:rows]
        own = pairs if used is None else found_in(found, pairs)
        if used is not None:
            used.update(field for _, field in own)
        found = renamed(found, own, name)
        check_rows(found, name)
        return found

    hashed, n_bytes = None, 0
    if (paths := files_of(name, split)) is not None:
        made = hashlib.sha256(repr((pairs, rows, used is None)).encode())
        for path in paths:
            n_bytes += path.stat().st_size
            with path.open("rb") as file:
                made.update(path.suffix.encode() + hashlib.file_digest(file, "sha256").digest())
        hashed = made.hexdigest()
    return Dataset(name, read, hashed, kept_in, n_bytes)
