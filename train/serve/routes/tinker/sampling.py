"""The sampling routes of Tinker's API, for the base, snapshots and checkpoints."""

import dataclasses
import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from starlette.responses import Response

from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import (
    Client,
    CommandResult,
    DrawnToken,
    RequestError,
    SampleDone,
    SampleRequest,
    SampleResult,
)
from train.serve.routes.errors import json_response, wait_disconnect
from train.serve.routes.tinker import commands
from train.serve.routes.tinker.bodies import Endpoint, OwnerRequest
from train.serve.routes.tinker.owner_rows import TinkerParts


class Adoption:
    """Has the engine load each adapter once, even if several samples request it together."""

    def __init__(self, engine: EngineProtocol):
        self._engine = engine
        self._lock = threading.Lock()
        self._waiting: dict[str, list[Callable[[Exception | None], None]]] = {}

    def wait_for(
        self,
        name: str | None,
        folder: Path | str | None,
        callback: Callable[[Exception | None], None],
    ) -> None:
        """Calls a function with None when an adapter is loaded, or with an error.

        Args:
          name: the adapter; None for the base.
          folder: where it lies; None if the engine has it from elsewhere.
          callback: the function; it may be called at once, or by the engine's thread.
        """
        if name is None or folder is None or self._engine.knows(name):  # it is ready
            callback(None)
            return
        with self._lock:
            callbacks = self._waiting.setdefault(name, [])
            callbacks.append(callback)
            is_being_read = len(callbacks) > 1
        if is_being_read:
            return
        self._engine.adopt(name, Path(folder), partial(self._finish, name))

    def sample(
        self,
        request: SampleRequest,
        folder: Path | str | None,
        done: SampleDone,
        on_token: Callable[[DrawnToken], None] | None = None,
    ) -> Callable[[], None]:
        """Queues a sample when its adapter is loaded.

        Args:
          request: what to draw.
          folder: where its adapter lies.
          done: gets the result, or what went wrong.
          on_token: gets each token.

        Returns:
          A function that ends it early; see `EngineProtocol.sample`.
        """
        lock = threading.Lock()
        is_ended = threading.Event()
        end_functions: list[Callable[[], None]] = []  # of the engine's sample, once it is queued

        def draw(error: Exception | None) -> None:
            """Queues the sample unless loading its adapter failed or the sample was cancelled."""
            if error is not None:
                done(error)
                return
            with lock:
                if not is_ended.is_set():
                    end_functions.append(self._engine.sample(request, done, on_token))
                    return
            done(SampleResult([]))

        def end() -> None:
            with lock:
                is_ended.set()
            for end_sample in end_functions:
                end_sample()

        self.wait_for(request.adapter, folder, draw)
        return end

    def _finish(self, name: str, result: CommandResult) -> None:
        """Calls the functions that wait for an adapter, with None or an error."""
        with self._lock:
            callbacks = self._waiting.pop(name)
        error = result if isinstance(result, Exception) else None
        for callback in callbacks:
            callback(error)


class SamplingRoutes:
    """The routes that start samples and return their results."""

    def __init__(self, parts: TinkerParts) -> None:
        """Stores the server's parts."""
        self._engine = parts.engine
        self._ledger = parts.ledger
        self._rows = parts.rows
        self._log = parts.log
        self._futures = parts.futures
        self._adoption = Adoption(parts.engine)

    def endpoints(self) -> list[tuple[str, str, Endpoint]]:
        """Returns the path, the method and the handler of each route."""
        return [
            ("create_sampling_session", "POST", self._create_sampling_session),
            ("asample", "POST", self._sample),
            ("retrieve_future", "POST", self._retrieve),
        ]

    def _create_sampling_session(self, request: OwnerRequest) -> Response:
        """Records a sampler of the base or of a checkpoint, and answers with its id."""
        fields = request.fields
        session = self._rows.open_session(fields.get("session_id", str), request.owner)
        seq = fields.get("sampling_session_seq_id", int, least=0)
        sampler = f"{session}:sample:{seq}"
        base, path, folder = self._read_source(request)
        self._ledger.add_sampler(
            sampler, session=session, owner=request.owner, base=base, path=path, folder=folder
        )
        return json_response({"type": "create_sampling_session", "sampling_session_id": sampler})

    def _read_source(self, request: OwnerRequest) -> tuple[str, str | None, str | None]:
        """Returns the base, the path and the folder of the model to sample from."""
        fields = request.fields
        path = fields.get("model_path", str, None)
        if path is None:
            base = self._rows.base_name(fields.get("base_model", str))
            return base, None, None
        checkpoint = self._rows.weights(path, request.owner)
        base = self._rows.base_of(checkpoint, fields.get("base_model", str, None))
        return base, path, checkpoint["folder"]

    def _sample(self, request: OwnerRequest) -> Response:
        """Starts a sample with a sampling session, or with the weights that the request names."""
        fields = request.fields
        sampler_id = fields.get("sampling_session_id", str, None)
        if sampler_id is not None:
            sampler = self._rows.sampler(sampler_id, request.owner)
            request_id = f"{sampler_id}:{fields.get('seq_id', int, least=0)}"
            folder = sampler["folder"]
            client = Client(request.owner, sampler["session"])
            path = sampler["path"]
            if path is not None and not Path(folder).exists():
                raise RequestError(
                    f"{path} was deleted or overwritten. Sample from another checkpoint."
                )
        else:
            _, _, folder = self._read_source(request)
            request_id = f"{uuid.uuid4()}:sample"
            client = Client(request.owner)
        self._ledger.hear(client.session)
        adapter = None if folder is None else self._log.name(folder)
        sample, encode = commands.sample_of(fields, self._engine.facts, adapter)
        sample = dataclasses.replace(sample, client=client)
        work = partial(self._adoption.sample, sample, folder)
        self._futures.start(request_id, request.owner, work, encode, client.session)
        sequence_ids = [f"{request_id}:{index}" for index in range(sample.n)]
        return json_response({"request_id": request_id, "sample_sequence_ids": sequence_ids})

    async def _retrieve(self, request: OwnerRequest) -> Response:
        request_id = request.fields.get("request_id", str)
        closed = partial(wait_disconnect, request.http)
        return await self._futures.poll(request_id, request.owner, closed)
