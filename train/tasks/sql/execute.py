"""Runs untrusted queries on databases in memory.

The SQL comes from a language model, so it is not trusted. Each connection is to a new database in
memory; an authorizer permits only reading and an allow-list of functions; and work, time, the
length of values and the number of rows are limited.
"""

import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from train.tasks.sql.fill import DATABASES, fill_script
from train.tasks.sql.tables import Schema

Row = tuple[object, ...]

_STEPS = 1_000  # virtual machine instructions between two checks of the limits
_MAX_LOOKS = 300  # 300,000 instructions; a right answer needs a few thousand
_MAX_SECONDS = 2.0
_MAX_ROWS = 2_000
_MAX_COLUMNS = 20
_MAX_SQL = 4_000
_MAX_VALUE = 2_000

_FUNCTIONS = frozenset(
    "abs avg cast coalesce concat count dense_rank first_value glob group_concat ifnull iif instr "
    "last_value length like lower ltrim max min nullif rank replace round row_number rtrim sign "
    "string_agg substr substring sum total trim typeof upper".split()
)


def _authorize(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Permits what a SELECT over the tables needs, and nothing else."""
    if action == sqlite3.SQLITE_FUNCTION:
        allowed = second is not None and second.lower() in _FUNCTIONS
    elif action == sqlite3.SQLITE_READ:
        allowed = first is not None and not first.lower().startswith(("sqlite_", "pragma_"))
    else:
        allowed = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE)
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def _open(schema: Schema, database: int) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.executescript(fill_script(schema, database))
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA query_only = ON")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_VALUE)
    connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, _MAX_SQL)
    connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, _MAX_COLUMNS)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.set_authorizer(_authorize)
    return connection


@contextmanager
def open_databases(schema: Schema) -> Iterator[list[sqlite3.Connection]]:
    """Opens the schema's databases: new, in memory, and read-only."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(_open(schema, i))) for i in range(DATABASES)]


def run(connection: sqlite3.Connection, sql: str) -> list[Row] | None:
    """Returns the rows of a query; None if it fails, is not permitted, or exceeds a limit."""
    looks = 0
    end = time.monotonic() + _MAX_SECONDS

    def give_up() -> bool:
        nonlocal looks
        looks += 1
        return looks > _MAX_LOOKS or time.monotonic() > end

    connection.set_progress_handler(give_up, _STEPS)
    try:
        rows = connection.execute(sql).fetchmany(_MAX_ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
        return None  # ValueError: characters that SQLite cannot take, such as NUL
    finally:
        connection.set_progress_handler(None, 0)
    return rows if len(rows) <= _MAX_ROWS else None


def is_empty(rows: Sequence[Row]) -> bool:
    """Returns whether a result is trivial: no rows, or one row of NULLs and zeros."""
    return not rows or (len(rows) == 1 and not any(rows[0]))


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
    """Returns whether two results are equal: as lists if `ordered`, else as multisets of rows.

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
