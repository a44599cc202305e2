"""Results that clients poll for. A poll waits for a while before it must be repeated."""

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


async def _is_closed_first(
    event: Awaitable[object], closed: Awaitable[object] | None, seconds: float
) -> bool:
    """Waits for an event or the end of a connection; returns True if the connection ended first."""
    event_task = asyncio.ensure_future(event)
    tasks = [event_task]
    if closed is not None:
        tasks.append(asyncio.ensure_future(closed))
    try:
        done_tasks, _ = await asyncio.wait(
            tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        return bool(done_tasks) and event_task not in done_tasks
    finally:
        for task in tasks:
            task.cancel()


@dataclasses.dataclass
class _Promise:
    """A promised result that is kept in memory only.

    Attributes:
      owner: who may fetch it.
      write: makes protobuf of it; None where it is JSON.
      session: the session that it ends with; None for none.
      result: None before it is there.
      end: ends the work for it.
      deadline: when it may be given up, by `time.monotonic`; infinite while a poll is held open.
      polls: polls for it that are held open.
      is_closed: whether the client closed the connection of the last poll.
    """

    owner: str
    write: Callable[[SampleResult], bytes] | None
    session: str | None
    deadline: float
    result: SampleResult | Exception | JsonObject | None = None
    end: Callable[[], None] | None = None
    polls: int = 0
    is_closed: bool = False


class Futures:
    """Finds results by request ids: commands' results in the ledger, and samples' in memory."""

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
        self._ledger = ledger
        self._hold_seconds = hold
        self._keep_seconds = keep
        self._max_pending = most
        self._patience_seconds = patience
        self._closed_seconds = gone
        self._promises: dict[str, _Promise] = {}
        self._results: deque[tuple[float, str]] = deque()  # when each came, and its request
        self._reasons: dict[str, str] = {}  # why answers wait for the ledger
        self._pending: Counter[str] = Counter()
        self._waiters: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._lock = threading.Lock()

    def open(self, request_id: str, owner: str) -> bool:
        """Promises a result in JSON; returns False if this request already has a promise."""
        promise = _Promise(owner=owner, write=None, session=None, deadline=math.inf)
        return self._add_promise(request_id, promise)

    def start(
        self,
        request_id: str,
        owner: str,
        work: Callable[[SampleDone], Callable[[], None]],
        write: Callable[[SampleResult], bytes],
        session: str | None = None,
    ) -> None:
        """Promises the result of a sample and starts it, unless the request has a promise.

        Args:
          request_id: its id.
          owner: who may fetch it.
          work: starts; is called with a function that takes the result, and returns one that ends
            the work early.
          write: makes the body of the result, in protobuf.
          session: the session that it ends with.

        Raises:
          BusyError: The owner has too many without a result.
        """
        promise = _Promise(
            owner=owner,
            write=write,
            session=session,
            deadline=time.monotonic() + self._patience_seconds,
        )
        if not self._add_promise(request_id, promise):
            return
        end = work(partial(self._resolve, request_id, promise))
        with self._lock:
            promise.end = end
            is_dropped = self._promises.get(request_id) is not promise
        if is_dropped:
            end()

    def _add_promise(self, request_id: str, promise: _Promise) -> bool:
        """Adds a promise; returns False if this request already has one."""
        with self._lock:
            self._forget_old_results()
            if request_id in self._promises:
                return False
            if self._pending[promise.owner] >= self._max_pending:
                raise BusyError(
                    f"{self._max_pending} of your samples wait for a result, which is the maximum. "
                    "Wait until some have finished."
                )
            self._promises[request_id] = promise
            self._pending[promise.owner] += 1
            return True

    def _forget_old_results(self) -> None:
        """Removes results that were kept for the full time. The caller holds the lock."""
        latest_time = time.monotonic() - self._keep_seconds
        while self._results:
            result_time, request_id = self._results[0]
            if result_time >= latest_time:
                return
            self._results.popleft()
            del self._promises[request_id]

    def end_session(self, session: str) -> None:
        """Ends the samples of a session. Polls for their results then fail.

        A client that lives asks for such a sample anew.
        """
        self._drop_samples(lambda promise: promise.session == session)

    def busy_sessions(self) -> set[str]:
        """Returns the sessions that have unfinished samples."""
        with self._lock:
            pending = [promise for promise in self._promises.values() if promise.result is None]
        return {promise.session for promise in pending if promise.session}

    def sweep(self, silent: Container[str] = ()) -> None:
        """Ends the samples that no client will fetch. It is called every few seconds.

        Args:
          silent: sessions whose heartbeats are missing.
        """
        now = time.monotonic()

        def is_abandoned(promise: _Promise) -> bool:
            if promise.polls or promise.deadline >= now:
                return False
            return promise.is_closed or not promise.session or promise.session in silent

        self._drop_samples(is_abandoned)

    def _drop_samples(self, should_drop: Callable[[_Promise], bool]) -> None:
        """Ends and removes the unfinished samples that satisfy a condition."""
        with self._lock:
            dropped_promises = {
                request_id: promise
                for request_id, promise in self._promises.items()
                if promise.result is None and should_drop(promise)
            }
            for request_id, promise in dropped_promises.items():
                del self._promises[request_id]
                self._pending[promise.owner] -= 1
        for request_id, promise in dropped_promises.items():
            if promise.end is not None:
                promise.end()
            self.wake(request_id)

    def resolve(self, request_id: str, result: JsonObject) -> None:
        """Stores a result that `open` promised."""
        self._resolve(request_id, self._promises[request_id], result)

    def _resolve(
        self, request_id: str, promise: _Promise, result: SampleResult | Exception | JsonObject
    ) -> None:
        """Stores the result or the error of a promise. Any thread may call it."""
        with self._lock:
            if self._promises.get(request_id) is not promise:
                return  # it was given up
            promise.result = result
            self._results.append((time.monotonic(), request_id))
            self._pending[promise.owner] -= 1
        self.wake(request_id)

    def wake(self, request_id: str, reason: str | None = None) -> None:
        """Wakes the polls that wait for an answer. Any thread may call it.

        Args:
          request_id: the id.
          reason: why the ledger does not have the answer yet; None if it has.
        """
        with self._lock:
            self._reasons.pop(request_id, None)
            if reason is not None:
                self._reasons[request_id] = reason
            waiters = list(self._waiters.get(request_id, ()))
        for loop, event in waiters:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # the loop is closed, and its client gone
                pass

    async def poll(
        self, request_id: str, owner: str, closed: Callable[[], Awaitable[object]] | None = None
    ) -> Response:
        """Returns the answer to a request, or a try_again answer after `hold` seconds.

        Args:
          request_id: its id.
          owner: who asks.
          closed: returns once the client closed the connection.

        Raises:
          HttpError: There is no such request, or its answer is no longer kept.
        """
        with (
            self._waiting_event(request_id) as event,
            self._count_poll(request_id, owner) as promise,
        ):
            answer = await asyncio.to_thread(self._find_body, request_id, owner)
            if answer is None:
                connection_end = None if closed is None else closed()
                is_closed = await _is_closed_first(event.wait(), connection_end, self._hold_seconds)
                if promise is not None and is_closed:
                    promise.is_closed = True
                    promise.deadline = time.monotonic() + self._closed_seconds
                answer = await asyncio.to_thread(self._find_body, request_id, owner)
        if answer is None:
            return json_response(self._try_again(request_id), 408)
        body, is_protobuf = answer
        return Response(body, media_type=_PROTOBUF if is_protobuf else _JSON)

    def _try_again(self, request_id: str) -> JsonObject:
        """Returns the answer to a poll whose result is not known yet."""
        answer: JsonObject = {
            "type": "try_again",
            "request_id": request_id,
            "queue_state": "active",
        }
        reason = self._reasons.get(request_id)
        if reason is not None:
            answer["queue_state"] = "paused_capacity"
            answer["queue_state_reason"] = reason
        return answer

    @contextmanager
    def _waiting_event(self, request_id: str) -> Iterator[asyncio.Event]:
        """Yields an event that `wake` sets when the request may have an answer."""
        event = asyncio.Event()
        waiter = (asyncio.get_running_loop(), event)
        with self._lock:
            self._waiters.setdefault(request_id, set()).add(waiter)
        try:
            yield event
        finally:
            with self._lock:
                self._waiters[request_id].discard(waiter)
                if not self._waiters[request_id]:
                    del self._waiters[request_id]

    @contextmanager
    def _count_poll(self, request_id: str, owner: str) -> Iterator[_Promise | None]:
        """Counts a poll while it is open, so that the sample is not ended meanwhile."""
        with self._lock:
            promise = self._promises.get(request_id)
            if promise is not None and promise.owner != owner:
                promise = None
            if promise is not None:
                promise.polls += 1
                promise.is_closed = False
                promise.deadline = math.inf
        try:
            yield promise
        finally:
            with self._lock:
                if promise is not None:
                    promise.polls -= 1
                    patience_end = time.monotonic() + self._patience_seconds
                    promise.deadline = min(promise.deadline, patience_end)

    def _find_body(self, request_id: str, owner: str) -> tuple[bytes, bool] | None:
        """Returns the body of a result and whether it is protobuf; None before the result."""
        not_found = HttpError(
            410,
            f"there is no request {request_id[:200]}, or its result was dropped. Send the request "
            "again.",
        )
        promise = self._promises.get(request_id)
        if promise is not None:
            if promise.owner != owner:
                raise not_found
            return _promise_body(promise)
        model_id, _, seq = request_id.rpartition(":")
        is_number = seq.isascii() and seq.isdigit() and len(seq) < 10
        if not is_number:
            raise not_found
        model = self._ledger.model(model_id)
        command = self._ledger.command(model_id, int(seq))
        if model is None or model["owner"] != owner or command is None:
            raise not_found
        if command["state"] == LOGGED:
            return None
        if command["answer"] is None:
            raise not_found
        is_protobuf = command["kind"] == "forward_backward" and command["state"] == DONE
        return command["answer"], is_protobuf


def _promise_body(promise: _Promise) -> tuple[bytes, bool] | None:
    """Returns the body of a promise's result and whether it is protobuf; None before it."""
    if promise.result is None:
        return None
    if isinstance(promise.result, Exception):
        return error_answer(promise.result), False
    if promise.write is not None and isinstance(promise.result, SampleResult):
        return promise.write(promise.result), True
    return json.dumps(promise.result).encode(), False
