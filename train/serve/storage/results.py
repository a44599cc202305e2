"""Writes results of commands into the ledger, and waits if it is locked or full."""

import dataclasses
import json
import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from train.console.errors import disk_full_text
from train.serve.protocol.requests import AdapterSpec, CommandResult, RequestError, SaveResult
from train.serve.storage.database import LockedError
from train.serve.storage.ledger import LOGGED, Ledger, Row

_log = logging.getLogger(__name__)
NO_ROOM = (
    "the disk of the server is full, so the server could not keep the request or its result. "
    "Continue from the last checkpoint when there is room again."
)
_PENDING = (
    "the server has the result, but cannot record it, since its disk is full or its ledger cannot "
    "be written. The result follows when it is recorded."
)


def error_answer(error: Exception) -> bytes:
    """Returns the JSON answer for a failed command."""
    if isinstance(error, RequestError):
        category = "user"
        message = str(error)
    else:
        category = "server"
        message = NO_ROOM if disk_full_text(error) else f"{type(error).__name__}: {error}"
    return json.dumps({"error": message, "category": category}).encode()


class ResultWriter:
    """Writes results into a ledger in order, in a separate thread.

    Attributes:
      ledger: the ledger.
    """

    def __init__(
        self,
        ledger: Ledger,
        write: Callable[[Row, CommandResult], bytes],
        wake: Callable[[str, str | None], None],
        remove: Callable[[str], None],
    ):
        """Starts the thread.

        Args:
          ledger: the ledger.
          write: makes the answer of a row and its result.
          wake: is told the id of a request once it is answered; or why it waits, if the ledger
            does not take its answer.
          remove: removes a folder that another has replaced.
        """
        self.ledger = ledger
        self._write = write
        self._wake = wake
        self._remove = remove
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._closing = threading.Event()
        # The results that the ledger did not take. The thread alone has the list.
        self._backlog: list[tuple[Row, CommandResult]] = []

    def close(self) -> None:
        """Writes the pending results, and stops. A restart computes lost results again."""
        self._closing.set()
        self._thread.shutdown()

    def submit(self, function: Callable[..., object], *arguments: object) -> None:
        """Calls a function in the thread, and repeats the call while the ledger is locked."""
        try:
            self._thread.submit(self._call, function, *arguments)
        except RuntimeError:  # it is closed: what is not noted now is executed again
            pass

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        """Calls a function until the ledger is not locked, or the writer is closed."""
        while True:
            try:
                function(*arguments)
            except LockedError:
                if not self._closing.is_set():
                    continue  # the ledger itself waited for a while
                _log.warning("the ledger is held by others: a result is not noted")
            except Exception:
                _log.exception("a result was not noted")
            return

    def write(self, row: Row, result: CommandResult) -> bool:
        """Stores the result of a command, and wakes its polls; returns True if it is stored.

        A result that the ledger does not take, such as for lack of room, stays pending until
        `retry` has noted it: the command was executed, and nobody may be told that it failed.

        Raises:
          LockedError: others hold the ledger.
        """
        request = f"{row['model']}:{row['seq']}"
        is_noted = True
        reason = None
        try:
            self._commit(row, result)
        except LockedError:
            raise
        except Exception as error:
            _log.exception("the result of %s was not noted", request)
            is_noted = False
            is_ledger_error = disk_full_text(error) or isinstance(error, sqlite3.Error)
            if is_ledger_error or not self._fail(row, error_answer(error)):
                reason = _PENDING
                self._backlog.append((row, result))
        self._wake(request, reason)
        return is_noted

    def _fail(self, row: Row, answer: bytes) -> bool:
        """Stores an error as a command's answer; returns False if the ledger fails."""
        try:
            self.ledger.finish(row["model"], row["seq"], answer, True)
        except LockedError:
            raise
        except Exception:
            _log.exception("the error of %s %s was not noted", row["model"], row["seq"])
            return False
        return True

    def retry(self) -> None:
        """Stores the results that the ledger did not accept earlier."""
        self.submit(self._retry)

    def _retry(self) -> None:
        backlog = self._backlog
        self._backlog = []
        for row, result in backlog:
            self.submit(self.write, row, result)

    def _commit(self, row: Row, result: CommandResult) -> None:
        """Stores the result of a command, and the adapter that it saved, in the ledger."""
        model = self.ledger.model(row["model"])
        had_answer = row["state"] != LOGGED  # it was executed again
        if model is None or had_answer:
            return
        has_failed = isinstance(result, Exception)
        if isinstance(result, Exception):
            if not isinstance(result, RequestError):
                _log.error("%s %s failed", row["model"], row["seq"], exc_info=result)
            answer = error_answer(result)
        else:
            answer = self._write(row, result)
        spec = json.dumps(dataclasses.asdict(result)) if isinstance(result, AdapterSpec) else None
        replaced_rows: list[Row] = []
        with self.ledger.transaction():
            is_first_answer = self.ledger.finish(row["model"], row["seq"], answer, has_failed, spec)
            if is_first_answer and isinstance(result, SaveResult):
                replaced_rows = self._add_saved(row, model, result)
        for replaced_row in replaced_rows:
            self._remove(replaced_row["folder"])

    def _add_saved(self, row: Row, model: Row, result: SaveResult) -> list[Row]:
        """Records a command's checkpoint or sampler; returns the rows with obsolete files."""
        target = row["target"]
        if target.startswith("tinker://"):
            replaced_checkpoint = self.ledger.checkpoint(target)
            facts = json.loads(row["payload"])
            self.ledger.add_checkpoint(row, model["owner"], result.size, facts)
            return [] if replaced_checkpoint is None else [replaced_checkpoint]
        facts = {name: model[name] for name in ("session", "owner", "base")}
        self.ledger.add_sampler(target, folder=row["folder"], **facts)
        session = self.ledger.session(model["session"])
        has_ended = session is None or session["ended"]
        return self.ledger.end_session(model["session"]) if has_ended else []
