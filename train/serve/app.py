"""The application of all routes, and its server, which ends gracefully."""

import asyncio
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from train.console.errors import UserError
from train.console.output import say
from train.serve.connections import Connections
from train.serve.requests import EngineProtocol
from train.serve.routes.access import BODY, WAITING, Access, Gate
from train.serve.routes.errors import HANDLERS
from train.serve.routes.openai.api import OpenAI
from train.serve.routes.openai.models import Models, Owns, Resolve, TemplateOf
from train.serve.routes.openai.text import ServedTokenizer
from train.serve.routes.status import DisplayName, StatusRoutes, Tenants, page_route

_CORS: dict[str, Any] = {
    "allow_methods": ["*"],
    "allow_headers": ["*"],
    "expose_headers": ["Retry-After"],
    "allow_private_network": True,
}
_DRAIN = 30.0  # seconds that requests under way have when the server ends
_LOOK = 0.05


def make_app(
    engine: EngineProtocol,
    tokenizer: Any,
    tinker_routes: Sequence[BaseRoute] = (),
    *,
    access: Access | None = None,
    sampling: Mapping[str, float] | None = None,
    adapters: Path | None = None,
    resolve: Resolve = lambda path, owner: None,
    owns: Owns = lambda owner, name: True,
    display_name: DisplayName = lambda tenant: None,
    template_of: TemplateOf = lambda folder: None,
    tenants: Tenants | None = None,
    body: int = BODY,
    waiting: int = WAITING,
) -> Starlette:
    """Returns the application.

    Args:
      engine: the engine.
      tokenizer: the model's, of transformers.
      tinker_routes: the routes of Tinker's API. `access.owner_of(request)` tells them the owner.
      access: the keys, and the web pages that are let in; none by default, but the server's own.
        It is `app.state.access`.
      sampling: the temperature, top_p and top_k of OpenAI's routes, where a request gives none.
      adapters: the folder of --adapters.
      resolve: see `Models`.
      owns: tells whether an owner may see a tenant, or an adapter that the engine knows.
      display_name: returns the name that the page shows for a tenant; None for its id alone.
      template_of: see `Models`.
      tenants: returns the tenants and their states; by default those of the engine.
      body: bytes of a request's body at most.
      waiting: requests of an owner under way at most.
    """
    access = access or Access()
    how: dict[str, Any] = {"resolve": resolve, "owns": owns, "template_of": template_of}
    models = Models(engine, access, folder=adapters, **how)
    routes = [
        *OpenAI(engine, ServedTokenizer(tokenizer), models, sampling).routes(),
        *StatusRoutes(engine, access, owns, display_name, tenants).routes(),
        *tinker_routes,
    ]
    return _app(routes, access, body=body, waiting=waiting)


def make_starting_app(access: Access) -> Starlette:
    """Returns the application until the server is ready: its page, and 503 for all else."""
    return _app([page_route()], access)


def _app(routes: Sequence[BaseRoute], access: Access, **limits: int) -> Starlette:
    gates = [Middleware(Gate, access, **limits)]
    if access.origins.allowed:  # browsers ask first whether they may send a request
        gates.insert(0, Middleware(CORSMiddleware, allow_origins=access.origins.allowed, **_CORS))
    app = Starlette(routes=routes, middleware=gates, exception_handlers=HANDLERS)
    app.state.access = access
    return app


class _Server(uvicorn.Server):
    """Leaves signals alone: the main thread counts them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """A server in a thread, which listens from the beginning to the end of a `with` block.

    Attributes:
      app: the application; it may be replaced by another.
      address: the address.
    """

    def __init__(self, app: Starlette, host: str, port: int) -> None:
        """Listens.

        Args:
          app: the application.
          host: the address.
          port: the port; 0 for a free one.

        Raises:
          UserError: the address cannot be had.
        """
        self.app, self._listener = app, _listening(host, port)
        self.address = _address(self._listener)
        config = uvicorn.Config(
            self._answer,
            http=cast(Any, Connections()),
            interface="asgi3",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._work, name="server", daemon=True)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)

    def _work(self) -> None:
        with self._listener:
            asyncio.run(self._server.serve([self._listener]))

    def __enter__(self) -> "HttpServer":
        """Begins to answer."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends."""
        self._server.should_exit = True
        self._thread.join()

    def serve(self, access: Access, stop: Callable[[], None]) -> None:
        """Serves until SIGTERM or SIGINT, in the main thread.

        Then new work is refused with 503, and requests under way have half a minute to end; a
        second signal ends them at once. Long polls should end once `access.draining` is set.

        Args:
          access: that of the application.
          stop: ends the engine; it is called once no request is under way, or time is up.
        """
        with _signals() as signals:
            say(f"serving at {self.address} (Ctrl-C ends it)")
            while not signals and self._thread.is_alive():
                time.sleep(_LOOK)
            access.draining = True
            say("ends: what runs is finished; a second Ctrl-C ends it at once")
            seen, left = len(signals), _DRAIN
            while access.running.total() and len(signals) == seen and left > 0:
                time.sleep(_LOOK)
                left -= _LOOK
            stop()
            self._server.should_exit = True
            self._thread.join()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects signals that would end the process."""
    seen: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, frame: seen.append(number)) for n in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(app: Starlette, host: str, port: int, stop: Callable[[], None]) -> None:
    """Serves an application of `make_app`; see `HttpServer`."""
    with HttpServer(app, host, port) as site:
        site.serve(app.state.access, stop)


def _listening(host: str, port: int) -> socket.socket:
    """Returns a socket that listens."""
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: the server cannot listen there ({error.strerror}): "
            "another one may run: stop it, or give another --port"
        ) from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
