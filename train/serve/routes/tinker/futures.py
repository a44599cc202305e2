"""Results that clients come back for: held open for a while, then asked for again."""

import asyncio
import dataclasses
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response

from train.serve.ledger import DONE, LOGGED, Ledger
from train.serve.notes import error_answer
from train.serve.routes.tinker.bodies import Refused, say
from train.serve.turns import Busy

_PROTOBUF, _JSON = "application/x-protobuf", "application/json"


@dataclasses.dataclass
class _Promise:
    """A result that is kept in memory alone; `write` makes protobuf of it, else it is JSON."""

    owner: str
    write: Callable[[Any], bytes] | None
    result: Any = None


class Futures:
    """Finds results by the ids of requests: of commands in the ledger, of samples in memory."""

    def __init__(
        self, ledger: Ledger, *, hold: float = 25.0, keep: float = 300.0, most: int = 4096
    ):
        """Starts with nothing.

        Args:
          ledger: has the answers of commands.
          hold: seconds for which a client waits for a result before it asks again.
          keep: seconds for which the result of a sample may be fetched.
          most: samples of an owner without a result.
        """
        self._ledger, self._hold, self._keep, self._most = ledger, hold, keep, most
        self._promises: dict[str, _Promise] = {}
        self._kept: deque[tuple[float, str]] = deque()
        self._answers: dict[str, bytes] = {}  # that the ledger does not have
        self._pending: Counter[str] = Counter()
        self._waiters: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._lock = threading.Lock()

    def open(self, request: str, owner: str, write: Callable[[Any], bytes] | None = None) -> bool:
        """Promises a result, such as that of a sample.

        Args:
          request: its id.
          owner: who may fetch it.
          write: makes the body of the result, in protobuf; None for one in JSON.

        Returns:
          Whether it is new; else it was promised before.

        Raises:
          Busy: The owner has too many without a result.
        """
        with self._lock:
            while self._kept and self._kept[0][0] < time.monotonic() - self._keep:
                del self._promises[self._kept.popleft()[1]]
            if request in self._promises:
                return False
            if self._pending[owner] >= self._most:
                raise Busy(f"{self._most} of your samples wait for a result: wait for some")
            self._promises[request] = _Promise(owner, write)
            self._pending[owner] += 1
            return True

    def resolve(self, request: str, result: Any) -> None:
        """Keeps the result of a sample, or what went wrong; may be called by any thread."""
        with self._lock:
            promise = self._promises[request]
            promise.result = result
            self._kept.append((time.monotonic(), request))
            self._pending[promise.owner] -= 1
        self.wake(request)

    def wake(self, request: str, answer: bytes | None = None) -> None:
        """Tells those who wait that there is an answer; may be called by any thread.

        Args:
          request: the id.
          answer: the answer to a command, if the ledger does not have it.
        """
        with self._lock:
            self._answers.pop(request, None)
            if answer is not None:
                self._answers[request] = answer
            waiters = list(self._waiters.get(request, ()))
        for loop, event in waiters:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop is closed, and its client gone
                pass

    async def poll(self, request: str, owner: str) -> Response:
        """Returns the answer to a request, or, after `hold` seconds, that there is none yet.

        Raises:
          Refused: There is no such request, or its answer is no longer kept.
        """
        with self._waiting(request) as event:
            found = await asyncio.to_thread(self._find, request, owner)
            if found is None:
                try:
                    await asyncio.wait_for(event.wait(), self._hold)
                except TimeoutError:
                    pass
                found = await asyncio.to_thread(self._find, request, owner)
        if found is None:
            again = {"type": "try_again", "request_id": request, "queue_state": "active"}
            return say(again, 408)
        body, is_protobuf = found
        return Response(body, media_type=_PROTOBUF if is_protobuf else _JSON)

    @contextmanager
    def _waiting(self, request: str) -> Iterator[asyncio.Event]:
        me = (asyncio.get_running_loop(), asyncio.Event())
        with self._lock:
            self._waiters.setdefault(request, set()).add(me)
        try:
            yield me[1]
        finally:
            with self._lock:
                self._waiters[request].discard(me)
                if not self._waiters[request]:
                    del self._waiters[request]

    def _find(self, request: str, owner: str) -> tuple[bytes, bool] | None:
        """Returns a body, and whether it is protobuf; None if it is not there yet."""
        gone = Refused(410, f"there is no request {request[:200]}, or its result was dropped")
        if (promise := self._promises.get(request)) is not None:
            if promise.owner != owner:
                raise gone
            if promise.result is None:
                return None
            if isinstance(promise.result, Exception):
                return error_answer(promise.result), False
            if promise.write is None:
                return json.dumps(promise.result).encode(), False
            return promise.write(promise.result), True
        model, _, number = request.rpartition(":")
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            raise gone
        known, row = self._ledger.model(model), self._ledger.command(model, int(number))
        if known is None or known["owner"] != owner or row is None:
            raise gone
        if row["state"] == LOGGED:
            answer = self._answers.get(request)
            return None if answer is None else (answer, False)
        if row["answer"] is None:
            raise gone
        return row["answer"], row["kind"] == "forward_backward" and row["state"] == DONE
