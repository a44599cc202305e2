"""Runs untrusted queries in a process of their own, and compares results.

`guard.py` is that process: it limits what a query may do. Here, one that does not answer in time is
ended, and the next query gets a new one.
"""

import atexit
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from sqlite3 import Connection

from train.tasks.sql import guard
from train.tasks.sql.fill import DATABASES, fill_script
from train.tasks.sql.guard import Row
from train.tasks.sql.tables import Schema

# The process ends itself after a second of the processor's time; on a busy machine that is longer.
_MAX_SECONDS = 20.0


@contextmanager
def open_databases(schema: Schema) -> Iterator[list[Connection]]:
    """Opens the schema's databases in this process, for our own queries: new, and read-only."""
    scripts = [fill_script(schema, i) for i in range(DATABASES)]
    with ExitStack() as stack:
        yield [stack.enter_context(closing(guard.open_database(script))) for script in scripts]


class Guarded:
    """Runs queries that are not trusted, one at a time, in a process that is started when needed.

    It may be called from several threads.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def run(self, schema: Schema, database: int, sql: str) -> list[Row] | None:
        """Returns the rows of a query on a new copy of one of the schema's databases.

        Returns:
          None if the query fails, is not permitted, or exceeds a limit.
        """
        request = json.dumps({"script": fill_script(schema, database), "sql": sql})
        with self._lock:
            answer = self._ask(request)
        return None if answer is None else [tuple(row) for row in answer]

    def close(self) -> None:
        """Ends the process; the next query starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, request: str) -> list[list[object]] | None:
        process = self._process
        if process is None or process.poll() is not None:
            self.close()
            # Without this process's environment and packages.
            command = [sys.executable, "-I", "-S", str(Path(guard.__file__))]
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            process = self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=null, text=True, env={}
            )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            late = threading.Timer(_MAX_SECONDS, process.kill)
            late.start()
            line = process.stdout.readline()
            late.cancel()
        except BaseException:  # such as Ctrl-C: the answer must not become the next query's
            self.close()
            raise
        if not line.endswith("\n"):
            self.close()
            return None
        return json.loads(line)


GUARDED = Guarded()
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
