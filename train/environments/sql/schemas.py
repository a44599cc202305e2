"""A schema: two linked tables, their columns, and the values of each column.

A schema is written as text; the foreign key is the column `<other table>_id`:

    book(id, title=@title, author_id, genre=novel|poetry|drama, year=1950..2020, length=90..900+)
    author(id, name=@person, country=@country, birth_year=1900..1990)

All names are nouns; questions use them for rows and columns (with spaces for underscores). In SQL,
the tables of a database share a suffix: `bookData`, `authorData`, with the key `author_id`. No
question mentions the suffix, so that no query can be written without reading the schema.

A column is `name=values`. Values are `low..high` (integers, or tenths if written so; `+` marks
quantities that may be summed), `a|b|c` (texts), `a|b*c|d` (texts of two words) or `@pool`. The
first column that is no key names the row, uniquely."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A random stream, named by its seeds.

    Python guarantees the sequence of `random()` across versions, but not those of `sample` and
    `shuffle`, so all draws here use `random()` alone.
    """

    def __init__(self, *seeds: str | int) -> None:
        self._random = random.Random("/".join(str(seed) for seed in seeds)).random

    def integer(self, low: int, high: int) -> int:
        """Draws an integer between `low` and `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """Draws one of `items`."""
        return items[self.integer(0, len(items) - 1)]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Draws `count` of `items` without replacement, in random order."""
        pool = list(items)
        if count > len(pool):
            raise ValueError(f"cannot sample {count} of {len(pool)} items")
        for i in range(count):
            j = self.integer(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """Returns `items` in random order."""
        return self.sample(items, len(items))


_WORDS = {
    "person": "Anna Boris Clara David Elena Felix Grace Hugo Irene Jonas Karin Liam*"
    "Adler Brooks Costa Dietz Evans Fischer Garcia Hall Ito Jensen Kaya Lopez",
    "title": "Silent Red Last Golden Hidden Broken Winter Distant*"
    "River City Garden Letter Mirror Island Road Promise",
    "firm": "Apex Nova Delta Summit Orion Harbor Vertex Atlas*Group Partners Systems Works",
    "place": "Oak Maple Stone Green River North Lake Sunny*Hill Park Valley Bridge Field Grove",
    "country": "Spain France Italy Japan Brazil Kenya Canada India",
    "city": "Paris Rome Berlin Madrid Oslo Lisbon Vienna Dublin Prague Athens",
    "pet": "Bella Max Luna Rocky Daisy Milo Coco Simba Nala Oscar Ruby Toby Zara Leo Kiwi Pepper "
    "Shadow Ginger Bruno Hazel Otis Willow Ziggy Maple Fern Bear Jasper Olive",
    "code": "AX BK CT DR EV FL*12 35 47 58 61 74",
    "ship": "Ocean Royal Pacific Arctic Silver Blue*Star Queen Spirit Wind Pearl Dawn",
}


def _combinations(text: str, separator: str) -> tuple[str, ...]:
    """Expands `a|b*c|d` to "a c", "a d", "b c", "b d"."""
    first_text, _, second_text = text.partition("*")
    first_words = first_text.strip().split(separator)
    if not second_text:
        return tuple(first_words)
    second_words = second_text.strip().split(separator)
    return tuple(f"{first} {second}" for first in first_words for second in second_words)


POOLS = {name: _combinations(words, " ") for name, words in _WORDS.items()}
POOLS["code"] = tuple(code.replace(" ", "") for code in POOLS["code"])


def plural(noun: str) -> str:
    """Returns the plural of an English noun: regular, or the same as the singular."""
    if noun in ("species", "goods"):
        return noun
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column. `kind` is "key", "link" (a foreign key), "name", "text", "year" or "number"."""

    table: str
    name: str
    wording: str
    kind: str
    values: tuple[str, ...] = ()
    low: int = 0
    high: int = 0
    scale: int = 1  # values are multiples of 1/scale
    summable: bool = False

    @property
    def path(self) -> str:
        """`table.column`."""
        return f"{self.table}.{self.name}"

    @property
    def is_number(self) -> bool:
        """True for numbers and years; False for keys."""
        return self.kind in ("number", "year")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, with the nouns that questions use for its rows."""

    name: str
    singular: str
    plural: str
    columns: tuple[Column, ...]

    def columns_of_kind(self, *kinds: str) -> list[Column]:
        """Returns the columns of these kinds, in order."""
        return [column for column in self.columns if column.kind in kinds]

    @property
    def title(self) -> Column:
        """The column that names a row."""
        return self.columns_of_kind("name")[0]


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Two tables in the order of the prompt; each row of `child` points to one of `parent`."""

    name: str
    tables: tuple[Table, Table]

    @property
    def child(self) -> Table:
        """The table with the foreign key."""
        return next(table for table in self.tables if table.columns_of_kind("link"))

    @property
    def parent(self) -> Table:
        """The table that the foreign key points to."""
        return next(table for table in self.tables if not table.columns_of_kind("link"))

    @property
    def link(self) -> Column:
        """The foreign key."""
        return self.child.columns_of_kind("link")[0]

    @property
    def join(self) -> str:
        """The JOIN that adds the parent's columns to each row of the child."""
        parent = self.parent.name
        return f"JOIN {parent} ON {self.link.path} = {parent}.id"

    def table(self, name: str) -> Table:
        """Returns the table of this name."""
        return next(table for table in self.tables if table.name == name)

    def column(self, path: str) -> Column:
        """Returns the column at `table.column`."""
        return next(c for table in self.tables for c in table.columns if c.path == path)

    def describe(self) -> str:
        """Describes the schema for a prompt, in three lines: the tables, and their join.

        `bookData(id, title, author_id)`, `authorData(id, name)`, and
        `JOIN authorData ON bookData.author_id = authorData.id`.
        """
        lines = []
        for table in self.tables:
            columns = ", ".join(column.name for column in table.columns)
            lines.append(f"{table.name}({columns})")
        return "\n".join([*lines, self.join])


def _column(table: str, text: str, *, has_name: bool) -> Column:
    """Reads a column of the notation.

    Args:
      table: the name of its table.
      text: the column's text, `name=values` or a key's name.
      has_name: whether a column before it names the rows of the table.
    """
    head, _, values = text.partition("=")
    name = head.strip()
    values = values.strip()
    column = partial(Column, table=table, name=name, wording=name.replace("_", " "))
    if not values:
        return column(kind="key" if name == "id" else "link")
    numbers = re.fullmatch(r"([\d.]+)\.\.([\d.]+)(\+?)", values)
    if numbers is None:
        texts = POOLS[values[1:]] if values.startswith("@") else _combinations(values, "|")
        return column(kind="text" if has_name else "name", values=texts)
    scale = 10 if "." in numbers[1] else 1
    low = round(float(numbers[1]) * scale)
    high = round(float(numbers[2]) * scale)
    is_summable = numbers[3] == "+"
    is_year = scale == 1 and low >= 1000 and high < 2030 and not is_summable
    kind = "year" if is_year else "number"
    return column(kind=kind, low=low, high=high, scale=scale, summable=is_summable)


def _table(text: str, suffix: str) -> Table:
    """Reads a table of the notation; `suffix` ends its name."""
    noun, _, body = text.strip().partition("(")
    name = noun + suffix
    singular = noun.replace("_", " ")
    columns: list[Column] = []
    for column_text in body.rstrip(") \n").split(","):
        has_name = any(column.kind == "name" for column in columns)
        columns.append(_column(name, column_text, has_name=has_name))
    return Table(name=name, singular=singular, plural=plural(singular), columns=tuple(columns))


def read_blocks(name: str) -> dict[str, str]:
    """Returns the blocks of a text file beside this one, by the line that heads each."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    blocks = {}
    for block in text.strip().split("\n\n"):
        head, _, body = block.partition("\n")
        blocks[head] = body
    return blocks


def parse_schema(name: str, text: str, suffix: str) -> Schema:
    """Parses a schema in the notation of this module; `suffix` ends the names of its tables.

    Raises:
      ValueError: the foreign key does not name the other table.
    """
    table_text, other_table_text = text.strip().split(")\n")
    tables = (_table(table_text, suffix), _table(other_table_text, suffix))
    schema = Schema(name=name, tables=tables)
    linked_table = schema.link.name.removesuffix("_id") + suffix
    if linked_table != schema.parent.name:
        raise ValueError(f"schema {name}: {schema.link.path} does not name {schema.parent.name}")
    return schema


# Suffixes of table names (see above); those of the test schemas never occur in training.
_TRAINING_SUFFIXES = """
    Data List Table Log Set File Line Store View Map Base Entry Slot Main Item Block Sheet Pool
    Cache Group Index Stack Page Unit
""".split()
_TEST_SUFFIXES = "Info Tab Record Book Core Array Card Master Node Report Bank Live".split()


def _schemas(texts: dict[str, str], suffixes: Sequence[str]) -> tuple[Schema, ...]:
    """Parses schemas; uses each suffix about equally often."""
    suffix_queue: list[str] = []
    schemas = []
    draw = Draw("suffixes")
    for name, text in texts.items():
        if not suffix_queue:
            suffix_queue = draw.shuffled(suffixes)
        schemas.append(parse_schema(name, text, suffix_queue.pop()))
    return tuple(schemas)


TRAINING_SCHEMAS = _schemas(read_blocks("training_schemas.txt"), _TRAINING_SUFFIXES)
TEST_SCHEMAS = _schemas(read_blocks("test_schemas.txt"), _TEST_SUFFIXES)
SCHEMAS: dict[str, Schema] = {s.name: s for s in TRAINING_SCHEMAS + TEST_SCHEMAS}
