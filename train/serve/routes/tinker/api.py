"""Tinker's API: its sessions and its start and end. Other modules hold its other routes."""

import dataclasses
import logging
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import RequestError
from train.serve.routes.errors import HttpError, json_response
from train.serve.routes.tinker.bodies import Endpoint, Owner, OwnerRequest, guard
from train.serve.routes.tinker.commands import TinkerCodec
from train.serve.routes.tinker.futures import Futures
from train.serve.routes.tinker.owner_rows import OwnerRows, TinkerParts
from train.serve.routes.tinker.runs import RunRoutes
from train.serve.routes.tinker.sampling import SamplingRoutes
from train.serve.routes.tinker.training import TrainingRoutes
from train.serve.storage.ledger import Ledger
from train.serve.tenants.command_log import CommandLog, LogLimits
from train.serve.tenants.seats import Seats

_logger = logging.getLogger(__name__)
API = "/api/v1"
_MAX_HEARTBEAT_GAP = 40.0  # seconds; clients send a heartbeat every 10
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


@dataclasses.dataclass(frozen=True)
class TinkerLimits:
    """Limits of a server of Tinker's API.

    Attributes:
      hold: seconds for which a request for a result is held open.
      every: a tenant's state is saved after so many commands.
      room: models in the engine at once, others lie on disk; None for any number.
      own_room: the same, of an owner.
      idle: seconds of silence that end a session; None for any number.
      missing: seconds for which commands wait for an earlier one that did not come.
    """

    hold: float = 25.0
    every: int = 32
    room: int | None = None
    own_room: int | None = None
    idle: float | None = None
    missing: float = 600.0


class Tinker:
    """Serves Tinker's API from one folder.

    Attributes:
      ledger, rows, log, futures: its parts, which other routes may use.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        folder: Path,
        owner: Owner,
        names: Sequence[str] = (),
        limits: TinkerLimits = TinkerLimits(),
    ) -> None:
        """Opens the folder.

        Args:
          engine: trains and draws.
          folder: where all that lasts is kept.
          owner: returns the owner of a request's key; None for no valid one.
          names: more names of the base, by which clients may ask for it.
          limits: limits of the server.
        """
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        self._engine = engine
        self._owner = owner
        self._max_idle_seconds = limits.idle
        self._max_missing_seconds = limits.missing
        self.ledger = Ledger(folder / "ledger.sqlite")
        self.futures = Futures(self.ledger, hold=limits.hold)
        self.rows = OwnerRows(self.ledger, [engine.facts.model, *names])
        self.log = CommandLog(
            engine,
            self.ledger,
            folder,
            codec=TinkerCodec(engine.facts, folder),
            wake=self.futures.wake,
            seats=Seats(limits.room, limits.own_room),
            limits=LogLimits(every=limits.every),
        )
        parts = TinkerParts(
            engine=engine,
            ledger=self.ledger,
            rows=self.rows,
            log=self.log,
            futures=self.futures,
        )
        self._runs = RunRoutes(parts, API)
        self._training = TrainingRoutes(parts)
        self._sampling = SamplingRoutes(parts)

    def start(self, silent: float = math.inf) -> None:
        """Loads the tenants of the ledger again. It must be called before the first request.

        Args:
          silent: seconds; those without a command for longer stay on disk.
        """
        self.log.replay(silent)

    def close(self) -> None:
        """Records finished commands, and closes the ledger."""
        self.log.close()
        self.ledger.close()

    def end_session(self, session: str) -> None:
        """Ends a session with its models, snapshots and samples."""
        self.log.end_session(session)
        self.futures.end_session(session)

    def sweep(self, silent: float) -> None:
        """Removes expired data, closes gaps, and parks silent tenants. It is called every minute.

        Args:
          silent: seconds of silence of a session after which its tenants lie on disk.
        """
        if self._max_idle_seconds is not None:
            idle_sessions = set(self.ledger.idle_sessions(self._max_idle_seconds))
            busy_sessions = self.log.busy_sessions() | self.futures.busy_sessions()
            for session in idle_sessions - busy_sessions:
                _try(f"the end of the idle session {session}", self.end_session, session)
        _try("the search for missing commands", self.log.gaps.close, self._max_missing_seconds)
        _try("the parking of tenants", self.log.parking.park_silent, silent)
        _try("the removal of what is over", self.log.sweep)

    def sweep_samples(self) -> None:
        """Ends the samples of disconnected clients. It is called every few seconds."""
        self.futures.sweep(set(self.ledger.idle_sessions(_MAX_HEARTBEAT_GAP)))

    def routes(self) -> list[Route]:
        """Returns the routes below /api/v1."""
        posts: dict[str, Endpoint] = {
            "client/config": self._answer_with(_CONFIG),
            "client/dynamic_config": self._answer_with(_DYNAMIC),
            "telemetry": self._answer_with({"status": "accepted"}),
            "create_session": self._create_session,
            "session_heartbeat": self._heartbeat,
            "sessions/{session}/finish": self._finish,
        }
        endpoints_with_key = [
            *((path, "POST", endpoint) for path, endpoint in posts.items()),
            ("get_server_capabilities", "GET", self._capabilities),
            *self._training.endpoints(),
            *self._sampling.endpoints(),
            *self._runs.endpoints(),
        ]
        endpoints_without_key = [
            ("healthz", ["GET"], self._answer_with({"status": "ok"})),
            ("files/{expires:int}/{signature}", ["GET"], self._runs.download),
            ("{path:path}", ["GET", "POST", "PUT", "DELETE", "PATCH"], _unknown),
        ]
        routes: list[Route] = []
        for path, method, endpoint in endpoints_with_key:
            routes.append(Route(f"{API}/{path}", guard(endpoint, self._owner), methods=[method]))
        for path, methods, endpoint in endpoints_without_key:
            routes.append(Route(f"{API}/{path}", guard(endpoint, _anyone), methods=methods))
        return routes

    def find_checkpoint(self, path: str, owner: str) -> tuple[str, Path] | None:
        """Returns the engine's name and the folder of a checkpoint; None if the owner has none."""
        try:
            folder = Path(self.rows.weights(path, owner)["folder"])
        except RequestError:
            return None
        return self.log.name(folder), folder

    def owns(self, owner: str, name: str) -> bool:
        """Returns True if a tenant, or its adapter, belongs to an owner."""
        row = self.ledger.model(name)
        return row is not None and row["owner"] == owner

    # Sessions

    def _answer_with(self, content: Mapping[str, object]) -> Endpoint:
        async def answer(request: OwnerRequest) -> Response:
            return json_response(content)

        return answer

    def _capabilities(self, request: OwnerRequest) -> Response:
        """Answers with the names of the base and their capabilities."""
        capabilities = {
            "max_context_length": self._engine.facts.max_length,
            "trainable": True,
            "sampleable": True,
        }
        models = [{"model_name": name, **capabilities} for name in self.rows.names]
        return json_response({"supported_models": models})

    def _create_session(self, request: OwnerRequest) -> Response:
        """Opens a session with the client's name and metadata."""
        session = str(uuid.uuid4())
        metadata = {**(request.fields.metadata() or {})}
        display_name = request.fields.get("display_name", str, None)
        if display_name:
            metadata["display_name"] = display_name
        self.ledger.open_session(session, request.owner, metadata)
        return json_response({"type": "create_session", "session_id": session})

    def _heartbeat(self, request: OwnerRequest) -> Response:
        session = request.fields.get("session_id", str)
        self.ledger.hear(self.rows.open_session(session, request.owner))
        return json_response({"type": "session_heartbeat"})

    def _finish(self, request: OwnerRequest) -> Response:
        row = self.rows.session(request.path["session"], request.owner)
        self.end_session(row["id"])
        return json_response({})


def _try(task: str, function: Callable[..., object], *arguments: object) -> None:
    """Calls a function, and logs an error in it."""
    try:
        function(*arguments)
    except Exception:
        _logger.exception("%s failed", task)


def _anyone(request: Request) -> str:
    return ""  # it needs no key


async def _unknown(request: OwnerRequest) -> Response:
    raise HttpError(
        404,
        f"there is no {request.http.method} {request.http.url.path[:200]} on this server. Check "
        "the path and the version of the client.",
    )
