"""Adapters in folders, made ready for samples when the first one asks."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import Done, DrawnToken, SampleRequest, SampleResult


class Adoption:
    """Lets the engine adopt each adapter once, however many samples ask for it together."""

    def __init__(self, engine: EngineProtocol):
        self._engine = engine
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Callable[[Any], None]]] = {}

    def ready(
        self, name: str | None, folder: Path | str | None, then: Callable[[Any], None]
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
        self._engine.adopt(name, Path(folder), partial(self._adopted, name))

    def sample(
        self,
        request: SampleRequest,
        folder: Path | str | None,
        done: Done,
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

        def draw(error: Any) -> None:
            if isinstance(error, Exception):
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
            for each in ends:
                each()

        self.ready(request.adapter, folder, draw)
        return end

    def _adopted(self, name: str, result: Any) -> None:
        with self._lock:
            waiting = self._waiting.pop(name)
        for then in waiting:
            then(result)
