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
_N_CHILDREN = (20, 24)  # the number of rows, from and to
_N_PARENTS = (7, 8)


def _column_values(column: Column, n_rows: int, schema: Schema, draw: Draw) -> list[Value]:
    """Draws the values of a column, distinct if the range allows, so that few rows tie."""
    if column.kind == "name":
        # A pool hardly larger than the table, shared by all databases, so that names recur in them.
        pool = Draw("names", schema.name, column.path).shuffled(column.values)
        return list(draw.sample(pool[: n_rows + 3], n_rows))
    if column.kind == "text":
        # Each of at most five texts occurs; some occur more often than others.
        pool = Draw("texts", schema.name, column.path).shuffled(column.values)[:5]
        favourites = draw.sample(pool, 2)
        n_repeats = n_rows - len(pool)
        repeats = [draw.pick(draw.pick((pool, favourites))) for _ in range(n_repeats)]
        return list(draw.shuffled([*pool, *repeats]))
    integers = range(column.low, column.high + 1)
    if len(integers) >= n_rows:
        drawn = draw.sample(integers, n_rows)
    else:
        drawn = [draw.pick(integers) for _ in range(n_rows)]
    if column.scale == 1:
        return list(drawn)
    return [integer / column.scale for integer in drawn]


def _table_rows(
    schema: Schema, table: Table, n_parents: int, n_rows: int, draw: Draw
) -> list[FilledRow]:
    """Draws the rows of a table.

    Args:
      schema: the schema of the table.
      table: the table.
      n_parents: the number of rows of the parent table.
      n_rows: the number of rows of this table.
      draw: the random stream.
    """
    columns: list[Sequence[Value]] = []
    for column in table.columns:
        if column.kind == "key":
            columns.append(range(1, n_rows + 1))
        elif column.kind == "link":
            # Two parents have no children, and two have many.
            parents = draw.sample(range(1, n_parents + 1), n_parents - 2)
            columns.append([draw.pick(draw.pick((parents, parents[:2]))) for _ in range(n_rows)])
        else:
            columns.append(_column_values(column, n_rows, schema, draw))
    return list(zip(*columns, strict=True))


@cache
def filled_tables(schema: Schema, database: int) -> dict[str, list[FilledRow]]:
    """Returns the rows of each table of one of the schema's databases; the same on every call."""
    draw = Draw("rows", schema.name, database)
    n_parents = draw.integer(*_N_PARENTS)
    n_children = draw.integer(*_N_CHILDREN)
    rows = {}
    for table in schema.tables:
        n_rows = n_parents if table == schema.parent else n_children
        rows[table.name] = _table_rows(schema, table, n_parents, n_rows, draw)
    return rows


@cache
def fill_script(schema: Schema, database: int) -> str:
    """Returns the SQL that creates and fills one of the schema's databases."""
    lines = []
    for table in schema.tables:
        columns = ", ".join(f"{column.name} {_sql_type(column)}" for column in table.columns)
        rows = []
        for row in filled_tables(schema, database)[table.name]:
            rows.append(f"({', '.join(map(literal, row))})")
        lines.append(f"CREATE TABLE {table.name} ({columns});")
        lines.append(f"INSERT INTO {table.name} VALUES {', '.join(rows)};")
    return "\n".join(lines)


def _sql_type(column: Column) -> str:
    """Returns the type of a column in SQL."""
    if column.values:
        return "TEXT"
    return "REAL" if column.scale > 1 else "INTEGER"


# The process ends itself after a second of the processor's time; on a busy machine that is longer.
_MAX_SECONDS = 20.0


@contextmanager
def open_databases(schema: Schema) -> Iterator[list[Connection]]:
    """Opens the schema's databases in this process, read-only, for trusted queries."""
    scripts = [fill_script(schema, i) for i in range(DATABASES)]
    with ExitStack() as stack:
        yield [stack.enter_context(closing(guard.open_database(script))) for script in scripts]


class GuardedDatabase:
    """Runs untrusted queries in separate processes, which are started when needed.

    It may be called from several threads, which share the machine's cores.
    """

    def __init__(self) -> None:
        """Creates a pool without processes."""
        # Without this process's environment and packages.
        command = [sys.executable, "-I", "-S", guard.__file__]
        self._pool = ProgramPool(command, {}, copies=os.cpu_count() or 1, quiet=True)

    def run(self, schema: Schema, sql: str) -> list[list[Row]] | str:
        """Returns the rows of a query on a new copy of each of the schema's databases.

        Where it has none on one of them, returns the reason; see `guard.run`.
        """
        if len(sql) > guard.MAX_SQL:
            return guard.TIMEOUT
        scripts = [fill_script(schema, database) for database in range(DATABASES)]
        try:
            answer = self._pool.ask(json.dumps({"scripts": scripts, "sql": sql}), _MAX_SECONDS)
        except NoAnswer:
            return guard.TIMEOUT
        results = json.loads(answer)
        if isinstance(results[-1], str):  # the reason, after which no database was tried
            return results[-1]
        return [[*map(tuple, rows)] for rows in results]

    def close(self) -> None:
        """Ends the processes. The next query starts new ones."""
        self._pool.close()


GUARDED = GuardedDatabase()
atexit.register(GUARDED.close)


def _sort_key(row: Row) -> list[tuple[str, object]]:
    """Returns a key that orders rows of values of any type."""
    key: list[tuple[str, object]] = []
    for value in row:
        if isinstance(value, int | float):
            key.append(("number", round(float(value), 6)))
        else:
            key.append((type(value).__name__, str(value)))
    return key


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
        gold = sorted(gold, key=_sort_key)
        other = sorted(other, key=_sort_key)
    for gold_row, other_row in zip(gold, other, strict=True):
        if len(gold_row) != len(other_row):
            return False
        if not all(map(_same_value, gold_row, other_row)):
            return False
    return True
