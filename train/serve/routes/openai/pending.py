"""Passes the tokens and results of samples from the engine's thread to the event loop."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse

from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import DrawnToken, SampleRequest, SampleResult
from train.serve.routes.errors import HttpError, wait_disconnect

Value = TypeVar("Value")


def loop_callback(done: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns a thread-safe function that calls another function in the running event loop."""
    loop = asyncio.get_running_loop()

    def post(item: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(done, item)

    return post


async def wait_for_result(call: Callable[[Callable[[Any], None]], Any]) -> Any:
    """Calls the engine, and waits for the result or raises the error that it reports."""
    future = asyncio.get_running_loop().create_future()

    def set_result(result: Any) -> None:
        if not future.done():  # the client may have gone
            future.set_result(result)

    call(loop_callback(set_result))
    result = await future
    if isinstance(result, BaseException):
        raise result
    return result


class PendingSamples:
    """The samples of one request, whose tokens and results it passes on."""

    def __init__(
        self, engine: EngineProtocol, samples: Sequence[SampleRequest], *, streams: bool
    ) -> None:
        """Submits samples. With `streams`, each token is reported when it is drawn."""
        self._queue: asyncio.Queue[tuple[int, DrawnToken | SampleResult | BaseException]] = (
            asyncio.Queue()
        )
        self.n_left = len(samples)
        post = loop_callback(self._queue.put_nowait)
        self._cancels: list[Callable[[], None]] = []
        for index, sample in enumerate(samples):
            post_item = partial(_post_with_index, post, index)
            on_token = post_item if streams else None
            self._cancels.append(engine.sample(sample, post_item, on_token))

    async def next(self) -> tuple[int, DrawnToken | SampleResult]:
        """Returns the index of a sample, with its next token or its final result.

        Raises:
          Exception: what went wrong with one of them.
        """
        index, item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, SampleResult):
            self.n_left -= 1
        return index, item

    async def all(self) -> list[SampleResult]:
        """Waits for all samples, and returns their results."""
        results: dict[int, SampleResult] = {}
        while self.n_left:
            index, item = await self.next()
            if isinstance(item, SampleResult):
                results[index] = item
        return [results[index] for index in sorted(results)]

    def close(self) -> None:
        """Cancels the samples that are still running."""
        if self.n_left:
            for cancel in self._cancels:
                cancel()


def _post_with_index(post: Callable[[Any], None], index: int, item: Any) -> None:
    post((index, item))


async def unless_gone(request: Request, result: Awaitable[Value]) -> Value:
    """Awaits a result, or raises HttpError when the client disconnects first."""
    result_task = asyncio.ensure_future(result)
    disconnect_task = asyncio.create_task(wait_disconnect(request))
    tasks: list[asyncio.Future[Any]] = [result_task, disconnect_task]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not result_task.done():
            raise HttpError(499, "the client has gone")
        return result_task.result()
    finally:
        for task in tasks:
            task.cancel()


class Events(StreamingResponse):
    """A response of server-sent events that calls `close` when it ends for any reason."""

    def __init__(self, events: Any, close: Callable[[], None]) -> None:
        """Creates a response from an asynchronous iterator of texts."""
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, *args: Any) -> None:
        """Sends the events."""
        try:
            await super().__call__(*args)
        finally:
            self._close()
