"""Runs untrusted queries on databases in memory, with limits and permissions.

Started as a program, it answers requests on its input, a line each: ``{"scripts": …, "sql": …}``
is a query on new databases that the scripts fill, and the answer a list of its rows on each, which
ends with the reason where it has none. `databases.py` starts it. It imports the standard library
alone, so that it starts in a moment.

The SQL comes from a language model, so it is not trusted. An authorizer permits only reading and an
allow-list of functions. Instructions, lengths, depths and rows are limited. What a query does
before its first instruction, while SQLite prepares it, counts as well: SQLite then asks the
authorizer often, and memory and processor time are limited for the process.
"""

import contextlib
import json
import signal
import sqlite3
import sys
from collections.abc import Iterator
from functools import lru_cache

if sys.platform != "win32":  # it has no such limits; `databases.py` still ends what takes too long
    import resource

Row = tuple[object, ...]
Rows = list[Row] | str  # or why a query has none: one of these
REFUSED, ERROR, TIMEOUT = "refused", "error", "timeout"  # the last for any limit of work

MAX_SQL = 4_000  # characters of a query
_INSTRUCTIONS_PER_CHECK = 1_000  # virtual machine instructions between two checks of the limit
_MAX_CHECKS = 300  # 300,000 instructions; a right answer needs a few thousand
_MAX_QUESTIONS = 20_000  # of SQLite to the authorizer; a right answer makes some tens
_MAX_SECONDS = 0.8  # of processor time, whatever else the machine does
_MAX_MEMORY = 2**28  # bytes of the process's address space, of which Python takes some 30 MB
_MAX_HEAP = 2**25  # bytes of SQLite's own
_MAX_ROWS = 2_000
_MAX_ANSWER = 2**20  # characters of all rows, written as JSON
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 2_000,  # of a value, in bytes
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_SQL,
    sqlite3.SQLITE_LIMIT_COLUMN: 20,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 60,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 10,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 8,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 100,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
_FUNCTIONS = frozenset(
    "abs avg cast coalesce concat count dense_rank first_value glob group_concat ifnull iif instr "
    "last_value length like lower ltrim max min nullif rank replace round row_number rtrim sign "
    "string_agg substr substring sum total trim typeof upper".split()
)


def open_database(script: str) -> sqlite3.Connection:
    """Opens a read-only database in memory that a script has filled."""
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(_fill_database(script))
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.execute("PRAGMA query_only = ON")
    for limit, value in _LIMITS.items():
        connection.setlimit(limit, value)
    return connection


@lru_cache(maxsize=256)
def _fill_database(script: str) -> bytes:
    """Returns the serialized database that a script has filled."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.executescript(script)
        return connection.serialize()


def run(connection: sqlite3.Connection, sql: str, errors: list[str] | None = None) -> Rows:
    """Returns the rows of a query, or the reason for refusing it: `REFUSED` or another constant.

    Its time is not limited here, but its instructions are: so a result does not depend on how busy
    the machine is.

    Args:
      connection: the database.
      sql: the query.
      errors: gets what SQLite says of a query with an error.
    """
    reasons: list[str] = []  # why the query was ended, the first one first
    n_questions = 0
    n_checks = 0

    def authorize(action: int, argument: str | None, function: str | None, *_: str | None) -> int:
        """Permits the actions that a SELECT over the tables needs."""
        nonlocal n_questions
        n_questions += 1
        is_allowed = _is_allowed(action, argument, function)
        if is_allowed and n_questions <= _MAX_QUESTIONS:
            return sqlite3.SQLITE_OK
        reasons.append(TIMEOUT if is_allowed else REFUSED)
        return sqlite3.SQLITE_DENY

    def is_over_limit() -> bool:
        """Counts the checks; ends the query once it took too many instructions."""
        nonlocal n_checks
        n_checks += 1
        if n_checks <= _MAX_CHECKS:
            return False
        reasons.append(TIMEOUT)
        return True

    connection.set_authorizer(authorize)
    connection.set_progress_handler(is_over_limit, _INSTRUCTIONS_PER_CHECK)
    try:
        rows = connection.execute(sql).fetchmany(_MAX_ROWS + 1)
    except MemoryError:
        return TIMEOUT
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        if errors is not None:
            errors.append(str(error))
        return reasons[0] if reasons else ERROR  # ValueError: such as NUL, which SQLite cannot take
    finally:
        connection.set_progress_handler(None, 0)
    return rows if len(rows) <= _MAX_ROWS else TIMEOUT


def _is_allowed(action: int, argument: str | None, function: str | None) -> bool:
    """Returns True for an action of SQLite's authorizer that a SELECT over the tables needs."""
    if action == sqlite3.SQLITE_FUNCTION:
        return function is not None and function.lower() in _FUNCTIONS
    if action == sqlite3.SQLITE_READ:  # of a table
        return argument is not None and not argument.lower().startswith(("sqlite_", "pragma_"))
    return action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE)


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    """Ends this process if the code in this context uses too much CPU time."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, _MAX_SECONDS)
    yield
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answers requests until the input ends."""
    if sys.platform != "win32":
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
        resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        request = json.loads(line)
        results: list[str] = []  # as JSON
        for script in request["scripts"]:
            rows, result = _rows_as_json(script, request["sql"])
            results.append(result)
            if isinstance(rows, str):
                break
        print(f"[{', '.join(results)}]", flush=True)


def _rows_as_json(script: str, sql: str) -> tuple[Rows, str]:
    """Returns the rows of a query on the database that a script fills, and their JSON."""
    with contextlib.closing(open_database(script)) as connection:
        connection.execute(f"PRAGMA hard_heap_limit = {_MAX_HEAP}")
        with _limited_time():
            rows = run(connection, sql)
            # No question asks for bytes, and JSON has none.
            result = json.dumps(rows, default=lambda value: {"bytes": value.hex()})
    if len(result) > _MAX_ANSWER:
        return TIMEOUT, json.dumps(TIMEOUT)
    return rows, result


if __name__ == "__main__":
    main()
