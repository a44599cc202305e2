"""A file of SQLite that many threads use: one connection writes, another reads."""

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

Row = sqlite3.Row
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_HELD = "another process, such as a backup, holds the server's ledger"
_CROWDED = "many requests write to the server's ledger"


class LockedError(Exception):
    """Says that a backup or other writers hold the file; what was to be written is not."""


class FullError(Exception):
    """Says that the file cannot be written, for lack of room; what was to be written is not."""


class Database:
    """Executes statements of SQL. All methods may be called by any thread.

    Reads do not wait for writes; within a transaction, they see what it wrote.
    """

    def __init__(self, path: Path | str, tables: str, patience: float = 1.0):
        """Opens or makes the file.

        Args:
          path: the file; ":memory:" for none.
          tables: statements that make the tables.
          patience: seconds for which a write waits for others.

        Raises:
          LockedError: another process holds it.
          FullError: there is no room for it.
        """
        self._patience = patience
        self._lock, self._reading = threading.RLock(), threading.RLock()
        self._mine = threading.local()  # depth: of the transactions that a thread is in
        self._is_held = False  # True while a thread waits for other processes, or did in vain
        with ExitStack() as opened, _translated(path):
            self._writer = self._reader = opened.enter_context(closing(self._opened(path)))
            self._writer.execute("pragma journal_mode = wal")
            self._writer.execute("pragma synchronous = normal")
            self._writer.executescript(tables)
            if path == ":memory:":
                self._reading = self._lock
            else:
                self._reader = opened.enter_context(closing(self._opened(path)))
            opened.pop_all()
        self._path = path

    def _opened(self, path: Path | str) -> sqlite3.Connection:
        db = sqlite3.connect(
            path, timeout=self._patience, check_same_thread=False, isolation_level=None
        )
        db.row_factory = Row
        return db

    def close(self) -> None:
        """Closes the file."""
        with self._lock, self._reading:
            self._reader.close()
            self._writer.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commits the statements inside as one transaction; may be nested.

        Raises:
          LockedError, FullError: nothing was written.
        """
        if self._depth:
            yield
            return
        if not self._lock.acquire(timeout=self._patience):
            raise LockedError(_HELD if self._is_held else _CROWDED)
        try:
            self._is_held = True
            with _translated(self._path):
                self._writer.execute("begin immediate")
            self._is_held, self._mine.depth = False, 1
            try:
                yield
                with _translated(self._path):
                    self._writer.execute("commit")
            finally:
                self._mine.depth = 0
                if self._writer.in_transaction:
                    self._writer.execute("rollback")
        finally:
            self._lock.release()

    @property
    def _depth(self) -> int:
        return getattr(self._mine, "depth", 0)

    def all(self, sql: str, *values: object) -> list[Row]:
        """Returns the rows that a statement yields."""
        if self._depth:
            return self._executed(self._writer, sql, values)
        if sql.startswith("select "):
            with self._reading:
                return self._executed(self._reader, sql, values)
        with self.transaction():
            return self._executed(self._writer, sql, values)

    def _executed(self, db: sqlite3.Connection, sql: str, values: tuple) -> list[Row]:
        with _translated(self._path):
            return db.execute(sql, values).fetchall()

    def one(self, sql: str, *values: object) -> Row | None:
        """Returns the first row, or None."""
        return next(iter(self.all(sql, *values)), None)

    def insert(self, table: str, values: Mapping[str, object], how: str = "insert") -> None:
        """Adds a row of values by the names of columns."""
        places = ", ".join("?" * len(values))
        sql = f"{how} into {table} ({', '.join(values)}) values ({places})"
        self.all(sql, *values.values())

    def page(
        self, which: str, order: str, values: tuple, limit: int, offset: int
    ) -> tuple[list[Row], int]:
        """Returns some of the rows, and how many there are in all."""
        count = self.all(f"select count(*) from {which}", *values)[0][0]
        sql = f"select * from {which} order by {order} limit ? offset ?"
        return self.all(sql, *values, limit, offset), count


@contextmanager
def _translated(path: Path | str) -> Iterator[None]:
    """Raises LockedError or FullError for errors of SQLite that say so."""
    try:
        yield
    except sqlite3.OperationalError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary one
        if code in _BUSY:
            raise LockedError(_HELD) from error
        if code in _FULL:
            raise FullError(
                f"{path} cannot be written ({error}): the disk is full, or fails"
            ) from error
        raise
