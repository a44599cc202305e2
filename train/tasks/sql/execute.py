"""Runs untrusted queries in a process of their own, and compares results.

`guard.py` is that process: it limits what a query may do. Here, one that does not answer in time is
ended, and the next query gets a new one.
"""

import atexit
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from sqlite3 import Connection

from train.processes.pool import NoAnswer, ProgramPool
from train.tasks.sql import guard
from train.tasks.sql.guard import Row
from train.tasks.sql.questions.fill import DATABASES, fill_script
from train.tasks.sql.questions.tables import Schema

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
        found = json.loads(answer)
        return found[-1] if isinstance(found[-1], str) else [[*map(tuple, rows)] for rows in found]

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
