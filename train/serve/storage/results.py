"""Results of commands on their way into the ledger, which others may hold, or have filled."""

import dataclasses
import json
import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from train.console.errors import no_room
from train.serve.protocol.requests import AdapterSpec, RequestError, SaveResult
from train.serve.storage.database import LockedError
from train.serve.storage.ledger import LOGGED, Ledger, Row

_log = logging.getLogger(__name__)
NO_ROOM = (
    "the disk of the server is full, and what you sent or asked for could not be kept: ask again "
    "once there is room, from the last checkpoint"
)


def error_answer(error: Exception) -> bytes:
    """Returns what a client gets in place of a result."""
    category = "user" if isinstance(error, RequestError) else "server"
    said = str(error) if category == "user" else f"{type(error).__name__}: {error}"
    if category == "server" and no_room(error):
        said = NO_ROOM
    return json.dumps({"error": said, "category": category}).encode()


class ResultWriter:
    """Notes results in a thread of its own, in the order in which they come."""

    def __init__(
        self,
        ledger: Ledger,
        write: Callable[[Row, Any], bytes],
        wake: Callable[[str, bytes | None], None],
        remove: Callable[[str], None],
    ):
        """Starts the thread.

        Args:
          ledger: the ledger.
          write: makes the answer of a row and its result.
          wake: is told the id of a request once it is answered, and its answer if the ledger does
            not take it.
          remove: removes a folder that another has replaced.
        """
        self._ledger, self._write, self._wake, self._remove = ledger, write, wake, remove
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._closing = threading.Event()
        self._backlog: list[tuple[Row, Any]] = []  # what the ledger did not take; for the thread

    def close(self) -> None:
        """Notes what there is, and stops; after a restart, the rest is executed again."""
        self._closing.set()
        self._thread.shutdown()

    def later(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Has the thread call a function; again and again, while others hold the ledger."""
        try:
            self._thread.submit(self._call, function, *arguments)
        except RuntimeError:  # it is closed: what is not noted now is executed again
            pass

    def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
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

    def note(self, row: Row, result: Any) -> bool:
        """Notes the result of a command, and tells those who wait; returns whether it is noted.

        What the ledger does not take, such as for lack of room, is answered by an error, and noted
        once it can be.

        Raises:
          LockedError: others hold the ledger.
        """
        request, noted, answer = f"{row['model']}:{row['seq']}", True, None
        try:
            self._note(row, result)
        except LockedError:
            raise
        except Exception as error:
            _log.exception("the result of %s was not noted", request)
            noted, answer = False, error_answer(error)
            is_ledger = no_room(error) or isinstance(error, sqlite3.Error)
            if not is_ledger and self._fail(row, answer):
                answer = None
            else:
                self._backlog.append((row, result))
        self._wake(request, answer)
        return noted

    def _fail(self, row: Row, answer: bytes) -> bool:
        """Notes an error for an answer; returns whether the ledger took it."""
        try:
            self._ledger.finish(row["model"], row["seq"], answer, True)
        except LockedError:
            raise
        except Exception:
            _log.exception("the error of %s %s was not noted", row["model"], row["seq"])
            return False
        return True

    def again(self) -> None:
        """Notes what the ledger did not take."""
        self.later(self._again)

    def _again(self) -> None:
        backlog, self._backlog = self._backlog, []
        for row, result in backlog:
            self.later(self.note, row, result)

    def _note(self, row: Row, result: Any) -> None:
        model = self._ledger.model(row["model"])
        if model is None or row["state"] != LOGGED:
            return  # it has its answer, and was executed again
        failed = isinstance(result, Exception)
        if failed and not isinstance(result, RequestError):
            _log.error("%s %s failed", row["model"], row["seq"], exc_info=result)
        answer = error_answer(result) if failed else self._write(row, result)
        made = isinstance(result, AdapterSpec)
        spec = json.dumps(dataclasses.asdict(result)) if made else None
        stale: list[Row | None] = []
        target = row["target"]
        with self._ledger.transaction():
            first = self._ledger.finish(row["model"], row["seq"], answer, failed, spec)
            if not first or failed or not isinstance(result, SaveResult):
                return
            if target.startswith("tinker://"):
                stale.append(self._ledger.checkpoint(target))
                facts = json.loads(row["payload"])
                self._ledger.add_checkpoint(row, model["owner"], result.size, facts)
            else:
                facts = {name: model[name] for name in ("session", "owner", "base")}
                self._ledger.add_sampler(target, folder=row["folder"], **facts)
                session = self._ledger.session(model["session"])
                if session is None or session["ended"]:
                    stale.extend(self._ledger.end_session(model["session"]))
        for one in filter(None, stale):
            self._remove(one["folder"])
