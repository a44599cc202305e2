"""Tinker's API: sessions, training and samples, as its SDK speaks it."""

import dataclasses
import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import Client, Command, RequestError, Update
from train.serve.routes.tinker import commands, wire
from train.serve.routes.tinker.adoption import Adoption
from train.serve.routes.tinker.bodies import Endpoint, JsonFields, Owner, Refused, guarded, say
from train.serve.routes.tinker.futures import Futures
from train.serve.routes.tinker.owner_rows import OwnerRows, spec_of
from train.serve.routes.tinker.runs import Runs
from train.serve.storage.folders import link_beside
from train.serve.storage.ledger import Ledger, Row
from train.serve.tenants.command_log import CommandLog

_log = logging.getLogger(__name__)
API = "/api/v1"
_BEATS = 40.0  # seconds without a heartbeat, of which clients send one every 10
# What clients are told to do; what is not named keeps the SDK's default.
_CONFIG = {
    "create_model_via_load_weights": True,
    "fwdbwd_max_chunk_len": 1024,
    "fwdbwd_max_chunk_bytes_count": 5_000_000,
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": False,
    "sample_max_concurrent_requests": 512,
}
_DYNAMIC = {"refresh_interval_sec": 300, "sample_cancel_enabled": False}


class Tinker:
    """Serves Tinker's API from one folder.

    Attributes:
      ledger, owned, turns, futures, adoption: its parts, which other routes may use.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        folder: Path,
        owner: Owner,
        names: Sequence[str] = (),
        *,
        hold: float = 25.0,
        every: int = 32,
        room: int | None = None,
        tenants: int | None = None,
        idle: float | None = None,
    ):
        """Opens the folder.

        Args:
          engine: trains and draws.
          folder: where all that lasts is kept.
          owner: says whose key a request has; None for no valid one.
          names: more names of the base, by which clients may ask for it.
          hold: seconds for which a request for a result is held open.
          every: a tenant's state is saved after so many commands.
          room: models in the engine at once, others lie on disk; None for any number.
          tenants: the same, of an owner.
          idle: seconds of silence that end a session; None for any number.
        """
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        self.engine, self._owner, self._idle = engine, owner, idle
        self.names = tuple(dict.fromkeys([engine.facts.model, *names]))
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.futures = Futures(self.ledger, hold=hold)
        self.owned = OwnerRows(self.ledger)
        self.adoption = Adoption(engine)

        def read(row: Any) -> Command:
            return commands.command_of(row, engine.facts, self.turns.name)

        self.turns = CommandLog(
            *(engine, self.ledger, folder, read, commands.answer_of, self.futures.wake),
            every=every,
            room=room,
            own_room=tenants,
        )
        self._runs = Runs(self.ledger, self.turns, self.owned, API)

    def start(self, silent: float = math.inf) -> None:
        """Brings back the tenants that were there; call it before the first request.

        Args:
          silent: seconds; those without a command for longer stay on disk.
        """
        self.turns.replay(silent)

    def close(self) -> None:
        """Notes what is done, and closes the ledger."""
        self.turns.close()
        self.ledger.close()

    def end_session(self, session: str) -> None:
        """Ends a session: its models, snapshots and samples."""
        self.turns.end_session(session)
        self.futures.end_session(session)

    def sweep(self, silent: float) -> None:
        """Removes what is over, and parks tenants; call it every minute or so.

        Args:
          silent: seconds of silence of a session after which its tenants lie on disk.
        """
        if self._idle is not None:
            idle = set(self.ledger.idle_sessions(self._idle))
            for session in idle - self.turns.busy_sessions() - self.futures.busy_sessions():
                _try(f"the end of the idle session {session}", self.end_session, session)
        _try("the parking of tenants", self.turns.park_silent, silent)
        _try("the removal of what is over", self.turns.sweep)

    def sweep_samples(self) -> None:
        """Ends the samples of clients that are gone; call it every few seconds."""
        self.futures.sweep(set(self.ledger.idle_sessions(_BEATS)))

    def routes(self) -> list[Route]:
        """Returns the routes below /api/v1."""
        posts: dict[str, Endpoint] = {
            "client/config": self._fixed(_CONFIG),
            "client/dynamic_config": self._fixed(_DYNAMIC),
            "telemetry": self._fixed({"status": "accepted"}),
            "create_session": self._create_session,
            "session_heartbeat": self._heartbeat,
            "sessions/{session}/finish": self._finish,
            "create_model": self._create_model,
            "get_info": self._get_info,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "load_weights": self._load_weights,
            "unload_model": self._unload_model,
            "create_sampling_session": self._create_sampling_session,
            "asample": self._sample,
            "retrieve_future": self._retrieve,
            "save_weights": partial(self._save, "save_weights"),
            "save_weights_for_sampler": partial(self._save, "save_weights_for_sampler"),
            "save_weights_external": partial(self._save, "save_weights_external"),
        }
        found = [
            *((path, "POST", endpoint) for path, endpoint in posts.items()),
            ("get_server_capabilities", "GET", self._capabilities),
            *self._runs.endpoints(),
        ]
        free = [
            ("healthz", ["GET"], self._fixed({"status": "ok"})),
            ("files/{expires:int}/{signature}", ["GET"], self._runs.download),
            ("{path:path}", ["GET", "POST", "PUT", "DELETE", "PATCH"], _unknown),
        ]
        return [
            *(
                Route(f"{API}/{path}", guarded(end, self._owner), methods=[method])
                for path, method, end in found
            ),
            *(
                Route(f"{API}/{path}", guarded(end, _anyone), methods=methods)
                for path, methods, end in free
            ),
        ]

    # Sessions

    def _fixed(self, content: Mapping[str, Any]) -> Endpoint:
        async def answer(request: Request, owner: str, body: bytes) -> Response:
            return say(content)

        return answer

    def _capabilities(self, request: Request, owner: str, body: bytes) -> Response:
        length = self.engine.facts.max_length
        facts = {"max_context_length": length, "trainable": True, "sampleable": True}
        return say({"supported_models": [{"model_name": name} | facts for name in self.names]})

    def _create_session(self, request: Request, owner: str, body: bytes) -> Response:
        fields = JsonFields.parsed(body)
        session = str(uuid.uuid4())
        name = fields.get("display_name", str, None)
        attached = {"display_name": name} if name else {}
        self.ledger.open_session(session, owner, (fields.metadata() or {}) | attached)
        return say({"type": "create_session", "session_id": session})

    def _open_session(self, fields: JsonFields, owner: str) -> str:
        row = self.owned.session(fields.get("session_id", str), owner)
        if row["ended"]:
            raise Refused(410, f"the session {row['id']} has ended: open another")
        return row["id"]

    def _heartbeat(self, request: Request, owner: str, body: bytes) -> Response:
        fields = JsonFields.parsed(body)
        self.ledger.touch(self._open_session(fields, owner))
        return say({"type": "session_heartbeat"})

    def _finish(self, request: Request, owner: str, body: bytes) -> Response:
        row = self.owned.session(request.path_params["session"], owner)
        self.end_session(row["id"])
        return say({})

    # Training

    def _base(self, name: str) -> str:
        if name not in self.names:
            raise RequestError(
                f"the base model {name[:200]!r} is not served; there is {', '.join(self.names)}"
            )
        return name

    def _base_of(self, checkpoint: Row, fields: JsonFields) -> str:
        """Returns the base that a client names, or the one of the model that was saved."""
        model = self.ledger.model(checkpoint["model"])
        return self._base(fields.get("base_model", str, model["base"] if model else ""))

    def _submit(self, place: tuple[str, int], *rest: Any, **more: Any) -> Response:
        """Takes a command in: see `CommandLog.accept`."""
        request = self.turns.accept(*place, *rest, **more)
        return say({"request_id": request, "model_id": place[0]})

    def _place(self, fields: JsonFields, owner: str) -> tuple[str, int]:
        model = self.owned.model(fields.get("model_id", str), owner)
        return model["id"], fields.get("seq_id", int, least=1)

    def _create_model(self, request: Request, owner: str, body: bytes) -> Response:
        fields = JsonFields.parsed(body)
        session = self._open_session(fields, owner)
        model = f"{session}:train:{fields.get('model_seq_id', int, least=0)}"
        base, metadata = self._base(fields.get("base_model", str)), fields.metadata()

        def prepare() -> tuple[None, None]:
            self.ledger.add_model(model, session, owner, base, metadata)
            return None, None

        return self._submit((model, 0), "create_model", body, prepare)

    def _get_info(self, request: Request, owner: str, body: bytes) -> Response:
        fields = JsonFields.parsed(body)
        row = self.owned.model(fields.get("model_id", str), owner)
        data = {"model_name": row["base"], "arch": "lora_jax"}
        rank = spec_of(row).get("rank")
        told = {"type": "get_info", "model_id": row["id"], "model_name": row["base"]}
        return say({**told, "model_data": data, "is_lora": True, "lora_rank": rank})

    def _forward_backward(self, request: Request, owner: str, body: bytes) -> Response:
        body, message = wire.parse(body, request.headers.get("content-encoding", ""))
        model, seq = self.owned.model(message.model_id, owner)["id"], message.seq_id
        if seq < 1:
            raise RequestError(f"seq_id is {seq}; a model's commands count from 1")

        try:
            found = wire.gradient_of(message, self.engine.facts)
        except RequestError as error:
            return self._submit((model, seq), "forward_backward", b"", _raiser(error))
        return self._submit((model, seq), "forward_backward", body, command=found)

    def _optim_step(self, request: Request, owner: str, body: bytes) -> Response:
        fields = JsonFields.parsed(body)

        def prepare() -> tuple[None, None]:
            given = fields.object("adam_params", {})
            commands.check_numbers(given, *(one.name for one in dataclasses.fields(Update)))
            return None, None

        return self._submit(self._place(fields, owner), "optim_step", body, prepare)

    def _load_weights(self, request: Request, owner: str, body: bytes) -> Response:
        fields = JsonFields.parsed(body)
        path, session = fields.get("path", str), None
        if fields.get("session_id", str, None) is not None:
            session = self._open_session(fields, owner)
            place = f"{session}:train:{fields.get('model_seq_id', int, least=0)}", 0
        else:
            place = self._place(fields, owner)

        def source() -> Row:
            found = self.owned.weights(path, owner)
            if fields.get("optimizer", bool, False) and found["kind"] != "weights":
                raise RequestError(f"{path} has no optimiser's state: load weights/…, or without")
            return found

        def prepare(files: Path) -> tuple[Path, None]:
            if session is not None:
                base = self._base_of(source(), fields)
                self.ledger.add_model(place[0], session, owner, base, fields.metadata())
            if not folder.exists():
                os.rename(files, folder)
            return folder, None

        folder = self.turns.states.place(place[0]) / f"load-{place[1]}"
        if self.ledger.command(*place) is not None:  # it came before
            return self._submit(place, "load_weights", body)
        try:
            checkpoint = Path(source()["folder"])
        except RequestError as error:
            return self._submit(place, "load_weights", body, _raiser(error))
        # So that the checkpoint may be deleted before a replay. A copy takes long, and nobody else
        # is to wait for it.
        with link_beside(checkpoint, folder) as files:
            return self._submit(place, "load_weights", body, partial(prepare, files))

    def _save(self, kind: str, request: Request, owner: str, body: bytes) -> Response:
        fields = JsonFields.parsed(body)
        model, seq = self._place(fields, owner)
        number = fields.get("sampling_session_seq_id", int, None, least=0)
        is_snapshot = kind == "save_weights_for_sampler" and number is not None

        def prepare() -> tuple[Path, str]:
            commands.recipients_of(fields, kind)
            if is_snapshot and fields.get("path", str, None) is None:
                target = f"{model.split(':')[0]}:sample:{number}"
                folder = self.turns.place("snapshots", target)
                exists = self.ledger.sampler(target) is not None
            else:
                target = commands.path_of(fields, kind, model, seq)
                segment, name = target.split("/")[-2:]
                folder = self.turns.place("checkpoints", model) / segment / f"{name}@{seq}"
                may = kind == "save_weights" and fields.get("overwrite", bool, False)
                exists = self.ledger.checkpoint(target) is not None and not may
            if exists or self.ledger.promised(target):
                raise RequestError(f"{target} exists already: choose another name, or delete it")
            return folder, target

        return self._submit((model, seq), kind, body, prepare)

    def _unload_model(self, request: Request, owner: str, body: bytes) -> Response:
        row = self.owned.model(JsonFields.parsed(body).get("model_id", str), owner)
        request_id = f"{row['id']}:unload"
        self.turns.leave(row["id"])
        if self.futures.open(request_id, owner):
            self.futures.resolve(request_id, {"type": "unload_model", "model_id": row["id"]})
        return say({"request_id": request_id})

    # Samples

    def _create_sampling_session(self, request: Request, owner: str, body: bytes) -> Response:
        fields = JsonFields.parsed(body)
        session = self._open_session(fields, owner)
        number = fields.get("sampling_session_seq_id", int, least=0)
        sampler = f"{session}:sample:{number}"
        base, path, folder = self._source(fields, owner)
        facts = {"session": session, "owner": owner, "base": base, "path": path, "folder": folder}
        self.ledger.add_sampler(sampler, **facts)
        return say({"type": "create_sampling_session", "sampling_session_id": sampler})

    def _source(self, fields: JsonFields, owner: str) -> tuple[str, str | None, str | None]:
        """Returns the base, the path and the folder that a client wants to sample from."""
        if (path := fields.get("model_path", str, None)) is None:
            return self._base(fields.get("base_model", str)), None, None
        row = self.owned.weights(path, owner)
        return self._base_of(row, fields), path, row["folder"]

    def _sample(self, request: Request, owner: str, body: bytes) -> Response:
        fields = JsonFields.parsed(body)
        if (sampler := fields.get("sampling_session_id", str, None)) is not None:
            row = self.owned.sampler(sampler, owner)
            request_id = f"{sampler}:{fields.get('seq_id', int, least=0)}"
            path, folder, client = row["path"], row["folder"], Client(owner, row["session"])
            if path is not None and not Path(folder).exists():
                raise RequestError(f"{path} was deleted or overwritten: sample from another")
        else:
            _, path, folder = self._source(fields, owner)
            request_id, client = f"{uuid.uuid4()}:sample", Client(owner)
        self.ledger.hear(client.session)
        name = None if folder is None else self.turns.name(folder)
        wanted, encoded = commands.sample_of(fields, self.engine.facts, name)
        wanted = dataclasses.replace(wanted, client=client)
        work = partial(self.adoption.sample, wanted, folder)
        self.futures.start(request_id, owner, work, encoded, client.session)
        sequences = [f"{request_id}:{index}" for index in range(wanted.n)]
        return say({"request_id": request_id, "sample_sequence_ids": sequences})

    async def _retrieve(self, request: Request, owner: str, body: bytes) -> Response:
        fields = JsonFields.parsed(body)

        async def closed() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        return await self.futures.poll(fields.get("request_id", str), owner, closed)


def _try(what: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function; an error is logged, such as of a full disk, and hinders nothing else."""
    try:
        function(*arguments)
    except Exception:
        _log.exception("%s failed", what)


def _anyone(request: Request) -> str:
    return ""  # it needs no key


def _raiser(error: RequestError) -> Callable[[], NoReturn]:
    def refuse() -> NoReturn:
        raise error

    return refuse


async def _unknown(request: Request, owner: str, body: bytes) -> Response:
    raise Refused(404, f"there is no {request.method} {request.url.path[:200]} here")
