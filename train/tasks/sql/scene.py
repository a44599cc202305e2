"""Draws of tables, columns and values for a query form, and the words for them in questions."""

from dataclasses import dataclass

from train.tasks.sql.draw import Draw
from train.tasks.sql.fill import FilledRow, Value
from train.tasks.sql.tables import Column, Schema, Table, plural

Words = dict[str, str]


class DoesNotFit(Exception):
    """The schema has no column of the kind that the form needs."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A schema, the rows of one of its databases, and a random stream to draw from them."""

    schema: Schema
    rows: dict[str, list[FilledRow]]
    draw: Draw

    def table(self, *kinds: str) -> Table:
        """Draws a table with columns of these kinds; mostly the child, which has more rows."""
        tables = [self.schema.child, self.schema.child, self.schema.parent]
        fit = [table for table in tables if all(table.of_kind(kind) for kind in kinds)]
        if not fit:
            raise DoesNotFit(f"{self.schema.name}: {kinds}")
        return self.draw.pick(fit)

    def column(self, table: Table, *kinds: str, summable: bool = False) -> Column:
        """Draws a column of one of these kinds; if `summable`, one whose sum makes sense."""
        fit = [c for c in table.of_kind(*kinds) if c.summable or not summable]
        if not fit:
            raise DoesNotFit(f"{table.name}: {kinds}")
        return self.draw.pick(fit)

    def number(self, table: Table) -> Column:
        """Draws a column of numbers or years."""
        return self.column(table, "number", "year")

    def values(self, column: Column, count: int = 1) -> list[Value]:
        """Draws distinct values of the column."""
        table = self.schema.table(column.table)
        index = table.columns.index(column)
        held = list(dict.fromkeys(row[index] for row in self.rows[table.name]))
        if len(held) < count:
            raise DoesNotFit(f"{column.path}: {count} values")
        return self.draw.sample(held, count)


def _title_words(table: Table, prefix: str = "") -> Words:
    wording = table.title.wording
    return {f"{prefix}name": wording, f"{prefix}names": plural(wording)}


def table_words(table: Table) -> Words:
    """Returns words for the table's rows and for the column that names them."""
    return {"thing": table.singular, "things": table.plural} | _title_words(table)


def owner_words(table: Table) -> Words:
    """Returns words for the rows of the parent table."""
    return {"owner": table.singular, "owners": table.plural} | _title_words(table, "owner_")


def category_words(column: Column, prefix: str = "") -> Words:
    """Returns words for a column of texts that several rows share."""
    return {f"{prefix}category": column.wording, f"{prefix}categories": plural(column.wording)}


_COMPARATIVES = {  # (for numbers, for years)
    "above": ("above", "after"),
    "over": ("more than", "later than"),
    "below": ("below", "before"),
    "under": ("less than", "earlier than"),
    "higher": ("higher", "later"),
    "lower": ("lower", "earlier"),
    "lowest": ("lowest", "earliest"),
    "highest": ("highest", "latest"),
}


def number_words(column: Column, *, descending: bool = False) -> Words:
    """Returns words for a column of numbers; `first` and `last` depend on the sorting order."""
    words = {key: pair[column.kind == "year"] for key, pair in _COMPARATIVES.items()}
    first, last = ("highest", "lowest") if descending else ("lowest", "highest")
    return words | {
        "number": column.wording,
        "ascending": "descending" if descending else "ascending",
        "first": words[first],
        "last": words[last],
    }
