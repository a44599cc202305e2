"""An SQLite file that many threads use through one writing and one reading connection."""

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

Row = sqlite3.Row
_BUSY_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_FULL_CODES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_HELD_MESSAGE = "another process, such as a backup, holds the server's ledger"
_CROWDED_MESSAGE = "many requests write to the server's ledger"


class LockedError(Exception):
    """The error for a write that failed because other processes hold the file's lock."""


class FullError(Exception):
    """The error for a write that failed because the disk is full."""


class Database:
    """Executes SQL statements. Any thread may call its methods.

    Reads do not wait for writes; within a transaction, they see what it wrote.
    """

    def __init__(self, path: Path | str, tables: str, patience: float = 1.0):
        """Opens or creates the file.

        Args:
          path: the file; ":memory:" for none.
          tables: statements that make the tables.
          patience: seconds for which a write waits for others.

        Raises:
          LockedError: another process holds it.
          FullError: there is no room for it.
        """
        self._patience = patience
        self._lock = threading.RLock()  # of the writer
        self._reader_lock = threading.RLock()
        self._thread_state = threading.local()  # depth: of the transactions that a thread is in
        self._is_held = False  # True while a thread waits for other processes, or did in vain
        with ExitStack() as connections, _translate_errors(path):
            self._writer = connections.enter_context(closing(self._connect(path)))
            self._reader = self._writer
            self._writer.execute("pragma journal_mode = wal")
            self._writer.execute("pragma synchronous = normal")
            self._writer.executescript(tables)
            if path == ":memory:":
                self._reader_lock = self._lock
            else:
                self._reader = connections.enter_context(closing(self._connect(path)))
            connections.pop_all()  # they stay open
        self._path = path

    def _connect(self, path: Path | str) -> sqlite3.Connection:
        """Returns a connection that any thread may use."""
        connection = sqlite3.connect(
            path, timeout=self._patience, check_same_thread=False, isolation_level=None
        )
        connection.row_factory = Row
        return connection

    def close(self) -> None:
        """Closes the file."""
        with self._lock, self._reader_lock:
            self._reader.close()
            self._writer.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commits the statements in this context as one transaction. Contexts may be nested.

        Raises:
          LockedError, FullError: nothing was written.
        """
        is_nested = self._depth > 0
        if is_nested:
            yield
            return
        if not self._lock.acquire(timeout=self._patience):
            raise LockedError(_HELD_MESSAGE if self._is_held else _CROWDED_MESSAGE)
        try:
            self._is_held = True
            with _translate_errors(self._path):
                self._writer.execute("begin immediate")
            self._is_held = False
            self._thread_state.depth = 1
            try:
                yield
                with _translate_errors(self._path):
                    self._writer.execute("commit")
            finally:
                self._thread_state.depth = 0
                if self._writer.in_transaction:
                    self._writer.execute("rollback")
        finally:
            self._lock.release()

    @property
    def _depth(self) -> int:
        return getattr(self._thread_state, "depth", 0)

    def execute(self, sql: str, *values: object) -> list[Row]:
        """Returns the rows of a statement."""
        if self._depth:
            return self._execute_on(self._writer, sql, values)
        if sql.startswith("select "):
            with self._reader_lock:
                return self._execute_on(self._reader, sql, values)
        with self.transaction():
            return self._execute_on(self._writer, sql, values)

    def _execute_on(self, connection: sqlite3.Connection, sql: str, values: tuple) -> list[Row]:
        with _translate_errors(self._path):
            return connection.execute(sql, values).fetchall()

    def execute_one(self, sql: str, *values: object) -> Row | None:
        """Returns the first row, or None."""
        rows = self.execute(sql, *values)
        return rows[0] if rows else None

    def insert(self, table: str, values: Mapping[str, object], verb: str = "insert") -> None:
        """Inserts a row from values by column names."""
        placeholders = ", ".join("?" * len(values))
        sql = f"{verb} into {table} ({', '.join(values)}) values ({placeholders})"
        self.execute(sql, *values.values())

    def page(
        self, matching_rows: str, order: str, values: tuple, limit: int, offset: int
    ) -> tuple[list[Row], int]:
        """Returns a page of rows, and the number of all rows."""
        (count_row,) = self.execute(f"select count(*) from {matching_rows}", *values)
        sql = f"select * from {matching_rows} order by {order} limit ? offset ?"
        rows = self.execute(sql, *values, limit, offset)
        return rows, count_row[0]


@contextmanager
def _translate_errors(path: Path | str) -> Iterator[None]:
    """Turns SQLite's errors about locks and full disks into LockedError and FullError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary one
        if code in _BUSY_CODES:
            raise LockedError(_HELD_MESSAGE) from error
        if code in _FULL_CODES:
            raise FullError(
                f"{path} cannot be written ({error}). The disk is full, or it fails. Free some "
                "space on the disk."
            ) from error
        raise
