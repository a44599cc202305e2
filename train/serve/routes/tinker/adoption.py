"""Has the engine read adapters in folders once the first sample asks for them."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import (
    CommandResult,
    DrawnToken,
    SampleDone,
    SampleRequest,
    SampleResult,
)


class Adoption:
    """Lets the engine adopt each adapter once, however many samples ask for it together."""

    def __init__(self, engine: EngineProtocol):
        self._engine = engine
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Callable[[Exception | None], None]]] = {}

    def wait_for(
        self, name: str | None, folder: Path | str | None, then: Callable[[Exception | None], None]
    ) -> None:
        """Calls a function once an adapter may be chosen: with None, or with what went wrong.

        Args:
          name: the adapter; None for the base.
          folder: where it lies; None if the engine has it from elsewhere.
          then: the function; it may be called at once, or by the engine's thread.
        """
        if name is None or folder is None or self._engine.knows(name):
            then(None)
            return
        with self._lock:
            waiting = self._waiting.setdefault(name, [])
            waiting.append(then)
            if len(waiting) > 1:
                return
        self._engine.adopt(name, Path(folder), partial(self._finish, name))

    def sample(
        self,
        request: SampleRequest,
        folder: Path | str | None,
        done: SampleDone,
        seen: Callable[[DrawnToken], None] | None = None,
    ) -> Callable[[], None]:
        """Queues a sample as soon as its adapter is ready.

        Args:
          request: what to draw.
          folder: where its adapter lies.
          done: gets the result, or what went wrong.
          seen: gets each token.

        Returns:
          A function that ends it early; see `EngineProtocol.sample`.
        """
        lock, ended, ends = threading.Lock(), threading.Event(), list[Callable[[], None]]()

        def draw(error: Exception | None) -> None:
            if error is not None:
                done(error)
                return
            with lock:
                if not ended.is_set():
                    ends.append(self._engine.sample(request, done, seen))
                    return
            done(SampleResult([]))

        def end() -> None:
            with lock:
                ended.set()
            for end_sample in ends:
                end_sample()

        self.wait_for(request.adapter, folder, draw)
        return end

    def _finish(self, name: str, result: CommandResult) -> None:
        with self._lock:
            waiting = self._waiting.pop(name)
        for then in waiting:
            then(result if isinstance(result, Exception) else None)
