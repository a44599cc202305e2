"""The databases of a schema: their seeded rows, and results of queries on them.

Each schema has three databases, filled differently. Gold queries run in this process, a model's
in guarded ones."""

import atexit
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from sqlite3 import Connection

from train.environments.sql import guard
from train.environments.sql.guard import Row
from train.environments.sql.query import literal
from train.environments.sql.schemas import Column, Draw, Schema, Table
from train.processes.pool import NoAnswer, ProgramPool

Value = str | int | float
FilledRow = tuple[Value, ...]

DATABASES = 3  # differently filled databases for each schema
_CHILDREN = (20, 24)  # the number of rows, from and to
_PARENTS = (7, 8)


def _column_values(column: Column, rows: int, schema: Schema, draw: Draw) -> list[Value]:
    """Draws the values of a column, distinct if the range allows, so that few rows tie."""
    if column.kind == "name":
        # A pool hardly larger than the table, shared by all databases, so that names recur in them.
        pool = Draw("names", schema.name, column.path).shuffled(column.values)
        return list(draw.sample(pool[: rows + 3], rows))
    if column.kind == "text":
        # Each of at most five texts occurs; some occur more often than others.
        pool = Draw("texts", schema.name, column.path).shuffled(column.values)[:5]
        favourites = draw.sample(pool, 2)
        some = [draw.pick(draw.pick((pool, favourites))) for _ in range(rows - len(pool))]
        return list(draw.shuffled([*pool, *some]))
    span = range(column.low, column.high + 1)
    if len(span) >= rows:
        numbers = draw.sample(span, rows)
    else:
        numbers = [draw.pick(span) for _ in range(rows)]
    return [number if column.scale == 1 else number / column.scale for number in numbers]


def _table_rows(
    schema: Schema, table: Table, parents: int, rows: int, draw: Draw
) -> list[FilledRow]:
    columns: list[Sequence[Value]] = []
    for column in table.columns:
        if column.kind == "key":
            columns.append(range(1, rows + 1))
        elif column.kind == "link":
            # Two parents have no children, and two have many.
            used = draw.sample(range(1, parents + 1), parents - 2)
            columns.append([draw.pick(draw.pick((used, used[:2]))) for _ in range(rows)])
        else:
            columns.append(_column_values(column, rows, schema, draw))
    return list(zip(*columns, strict=True))


@cache
def filled_tables(schema: Schema, database: int) -> dict[str, list[FilledRow]]:
    """Returns the rows of each table of one of the schema's databases; the same on every call."""
    draw = Draw("rows", schema.name, database)
    parents = draw.integer(*_PARENTS)
    counts = {schema.parent.name: parents, schema.child.name: draw.integer(*_CHILDREN)}
    return {
        table.name: _table_rows(schema, table, parents, counts[table.name], draw)
        for table in schema.tables
    }


@cache
def fill_script(schema: Schema, database: int) -> str:
    """Returns the SQL that creates and fills one of the schema's databases."""
    lines = []
    for table in schema.tables:
        names = ", ".join(
            f"{c.name} {'TEXT' if c.values else 'REAL' if c.scale > 1 else 'INTEGER'}"
            for c in table.columns
        )
        rows = filled_tables(schema, database)[table.name]
        values = ", ".join(f"({', '.join(map(literal, row))})" for row in rows)
        lines.append(f"CREATE TABLE {table.name} ({names});")
        lines.append(f"INSERT INTO {table.name} VALUES {values};")
    return "\n".join(lines)


# The process ends itself after a second of the processor's time; on a busy machine that is longer.
_MAX_SECONDS = 20.0


@contextmanager
def open_databases(schema: Schema) -> Iterator[list[Connection]]:
    """Opens the schema's databases in this process, for our own queries: new, and read-only."""
    scripts = [fill_script(schema, i) for i in range(DATABASES)]
    with ExitStack() as stack:
        yield [stack.enter_context(closing(guard.open_database(script))) for script in scripts]


class GuardedDatabase:
    """Runs queries that are not trusted, in processes that are started when needed.

    It may be called from several threads, which share the machine's cores.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        # Without this process's environment and packages.
        command = [sys.executable, "-I", "-S", guard.__file__]
        self._served = ProgramPool(command, {}, copies=os.cpu_count() or 1, quiet=True)

    def run(self, schema: Schema, sql: str) -> list[list[Row]] | str:
        """Returns the rows of a query on a new copy of each of the schema's databases.

        Where it has none on one of them, returns the reason; see `guard.run`.
        """
        if len(sql) > guard.MAX_SQL:
            return guard.TIMEOUT
        scripts = [fill_script(schema, i) for i in range(DATABASES)]
        try:
            answer = self._served.ask(json.dumps({"scripts": scripts, "sql": sql}), _MAX_SECONDS)
        except NoAnswer:
            return guard.TIMEOUT
        sets = json.loads(answer)
        return sets[-1] if isinstance(sets[-1], str) else [[*map(tuple, rows)] for rows in sets]

    def close(self) -> None:
        """Ends the processes; the next query starts another."""
        self._served.close()


GUARDED = GuardedDatabase()
atexit.register(GUARDED.close)


def _sort_key(row: Row) -> list[tuple[str, object]]:
    return [
        ("number", round(float(v), 6)) if isinstance(v, int | float) else (type(v).__name__, str(v))
        for v in row
    ]


def _same_value(a: object, b: object) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6)
    return type(a) is type(b) and a == b


def same_rows(gold: Sequence[Row], other: Sequence[Row], *, ordered: bool) -> bool:
    """Returns True if two results are equal: as lists if `ordered`, else as multisets of rows.

    Numbers are equal within 1e-6, because sums may be taken in another order; texts are equal
    exactly. Columns are compared in order, regardless of their names.
    """
    if len(gold) != len(other):
        return False
    if not ordered:
        gold, other = sorted(gold, key=_sort_key), sorted(other, key=_sort_key)
    return all(
        len(a) == len(b) and all(map(_same_value, a, b)) for a, b in zip(gold, other, strict=True)
    )
