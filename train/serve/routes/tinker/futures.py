"""Results that clients come back for: held open for a while, then asked for again."""

import asyncio
import dataclasses
import json
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial

from starlette.responses import Response

from train.serve.protocol.requests import SampleDone, SampleResult
from train.serve.routes.errors import HttpError, JsonObject, json_response
from train.serve.storage.ledger import DONE, LOGGED, Ledger
from train.serve.storage.results import error_answer
from train.serve.tenants.command_log import BusyError

_PROTOBUF, _JSON = "application/x-protobuf", "application/json"


async def _first(
    event: Awaitable[object], closed: Awaitable[object] | None, seconds: float
) -> bool:
    """Waits for an event, or for the end of a connection; returns whether that came first."""
    tasks = [
        asyncio.ensure_future(awaitable) for awaitable in (event, closed) if awaitable is not None
    ]
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return bool(done) and tasks[0] not in done
    finally:
        for task in tasks:
            task.cancel()


@dataclasses.dataclass
class _Promise:
    """A result that is kept in memory alone.

    Attributes:
      owner: who may fetch it.
      write: makes protobuf of it; None where it is JSON.
      session: the session that it ends with; None for none.
      result: None before it is there.
      end: ends the work for it.
      until: when it may be given up, by `time.monotonic`; infinite while a poll is held open.
      polls: polls for it that are held open.
      closed: whether the client closed the connection of the last poll.
    """

    owner: str
    write: Callable[[SampleResult], bytes] | None
    session: str | None
    until: float
    result: SampleResult | Exception | JsonObject | None = None
    end: Callable[[], None] | None = None
    polls: int = 0
    closed: bool = False


class Futures:
    """Finds results by the ids of requests: of commands in the ledger, of samples in memory."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        hold: float = 25.0,
        keep: float = 300.0,
        most: int = 4096,
        patience: float = 60.0,
        gone: float = 10.0,
    ):
        """Starts with nothing.

        Args:
          ledger: has the answers of commands.
          hold: seconds for which a client waits for a result before it asks again.
          keep: seconds for which the result of a sample may be fetched.
          most: samples of an owner without a result.
          patience: seconds after which a sample ends that nobody asks for, unless the client of its
            session is heard.
          gone: seconds after which it ends in any case, once the client closed the connection of
            the last poll.
        """
        self._patience, self._gone = patience, gone
        self._ledger, self._hold, self._keep, self._most = ledger, hold, keep, most
        self._promises: dict[str, _Promise] = {}
        self._results: deque[tuple[float, str]] = deque()  # when each came, and its request
        self._reasons: dict[str, str] = {}  # why answers wait for the ledger
        self._pending: Counter[str] = Counter()
        self._waiters: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._lock = threading.Lock()

    def open(self, request: str, owner: str) -> bool:
        """Promises a result in JSON; returns whether it is new, or was promised before."""
        return self._promise(request, _Promise(owner, None, None, math.inf))

    def start(
        self,
        request: str,
        owner: str,
        work: Callable[[SampleDone], Callable[[], None]],
        write: Callable[[SampleResult], bytes],
        session: str | None = None,
    ) -> None:
        """Promises the result of a sample, and starts it, unless it was promised before.

        Args:
          request: its id.
          owner: who may fetch it.
          work: starts; is called with a function that takes the result, and returns one that ends
            the work early.
          write: makes the body of the result, in protobuf.
          session: the session that it ends with.

        Raises:
          BusyError: The owner has too many without a result.
        """
        promise = _Promise(owner, write, session, time.monotonic() + self._patience)
        if not self._promise(request, promise):
            return
        end = work(partial(self._resolve, request, promise))
        with self._lock:
            promise.end = end
            is_wanted = self._promises.get(request) is promise
        if not is_wanted:
            end()

    def _promise(self, request: str, promise: _Promise) -> bool:
        with self._lock:
            while self._results and self._results[0][0] < time.monotonic() - self._keep:
                del self._promises[self._results.popleft()[1]]
            if request in self._promises:
                return False
            if self._pending[promise.owner] >= self._most:
                raise BusyError(f"{self._most} of your samples wait for a result: wait for some")
            self._promises[request] = promise
            self._pending[promise.owner] += 1
            return True

    def end_session(self, session: str) -> None:
        """Ends the samples of a session; requests for their results are told that there are none.

        A client that lives asks for such a sample anew.
        """
        self._drop(lambda promise: promise.session == session)

    def busy_sessions(self) -> set[str]:
        """Returns the sessions that wait for a sample."""
        with self._lock:
            pending = [promise for promise in self._promises.values() if promise.result is None]
        return {promise.session for promise in pending if promise.session}

    def sweep(self, silent: Container[str] = ()) -> None:
        """Ends the samples that nobody will fetch; call it every few seconds.

        Args:
          silent: sessions whose heartbeats are missing.
        """
        now = time.monotonic()

        def is_left(promise: _Promise) -> bool:
            if promise.polls or promise.until >= now:
                return False
            return promise.closed or not promise.session or promise.session in silent

        self._drop(is_left)

    def _drop(self, is_over: Callable[[_Promise], bool]) -> None:
        """Ends and forgets the samples without a result for which a condition is true."""
        with self._lock:
            over = {
                request: promise
                for request, promise in self._promises.items()
                if promise.result is None and is_over(promise)
            }
            for request, promise in over.items():
                del self._promises[request]
                self._pending[promise.owner] -= 1
        for request, promise in over.items():
            if promise.end is not None:
                promise.end()
            self.wake(request)

    def resolve(self, request: str, result: JsonObject) -> None:
        """Keeps a result that was promised by `open`."""
        self._resolve(request, self._promises[request], result)

    def _resolve(
        self, request: str, promise: _Promise, result: SampleResult | Exception | JsonObject
    ) -> None:
        """Keeps the result of a sample, or what went wrong; may be called by any thread."""
        with self._lock:
            if self._promises.get(request) is not promise:
                return  # it was given up
            promise.result = result
            self._results.append((time.monotonic(), request))
            self._pending[promise.owner] -= 1
        self.wake(request)

    def wake(self, request: str, reason: str | None = None) -> None:
        """Wakes the requests that wait for an answer; may be called by any thread.

        Args:
          request: the id.
          reason: why the ledger does not have the answer yet; None if it has.
        """
        with self._lock:
            self._reasons.pop(request, None)
            if reason is not None:
                self._reasons[request] = reason
            waiters = list(self._waiters.get(request, ()))
        for loop, event in waiters:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop is closed, and its client gone
                pass

    async def poll(
        self, request: str, owner: str, closed: Callable[[], Awaitable[object]] | None = None
    ) -> Response:
        """Returns the answer to a request, or, after `hold` seconds, that there is none yet.

        Args:
          request: its id.
          owner: who asks.
          closed: returns once the client closed the connection.

        Raises:
          HttpError: There is no such request, or its answer is no longer kept.
        """
        with self._waiting(request) as event, self._count_poll(request, owner) as promise:
            answer = await asyncio.to_thread(self._find, request, owner)
            if answer is None:
                is_closed = await _first(event.wait(), closed and closed(), self._hold)
                if promise is not None and is_closed:
                    promise.closed, promise.until = True, time.monotonic() + self._gone
                answer = await asyncio.to_thread(self._find, request, owner)
        if answer is None:
            again = {"type": "try_again", "request_id": request, "queue_state": "active"}
            if (reason := self._reasons.get(request)) is not None:
                again |= {"queue_state": "paused_capacity", "queue_state_reason": reason}
            return json_response(again, 408)
        body, is_protobuf = answer
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

    @contextmanager
    def _count_poll(self, request: str, owner: str) -> Iterator[_Promise | None]:
        """Counts a poll while it is held open: the sample is not given up meanwhile."""
        with self._lock:
            promise = self._promises.get(request)
            if promise is not None and promise.owner != owner:
                promise = None
            if promise is not None:
                promise.polls += 1
                promise.closed, promise.until = False, math.inf
        try:
            yield promise
        finally:
            with self._lock:
                if promise is not None:
                    promise.polls -= 1
                    promise.until = min(promise.until, time.monotonic() + self._patience)

    def _find(self, request: str, owner: str) -> tuple[bytes, bool] | None:
        """Returns a body, and whether it is protobuf; None if it is not there yet."""
        gone = HttpError(410, f"there is no request {request[:200]}, or its result was dropped")
        if (promise := self._promises.get(request)) is not None:
            if promise.owner != owner:
                raise gone
            if promise.result is None:
                return None
            if isinstance(promise.result, Exception):
                return error_answer(promise.result), False
            if promise.write is not None and isinstance(promise.result, SampleResult):
                return promise.write(promise.result), True
            return json.dumps(promise.result).encode(), False
        model, _, number = request.rpartition(":")
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            raise gone
        known, row = self._ledger.model(model), self._ledger.command(model, int(number))
        if known is None or known["owner"] != owner or row is None:
            raise gone
        if row["state"] == LOGGED:
            return None
        if row["answer"] is None:
            raise gone
        return row["answer"], row["kind"] == "forward_backward" and row["state"] == DONE
