"""The application of all routes, and its server, which ends gracefully."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from train.console.errors import UserError
from train.console.output import say
from train.serve.connections import Connections
from train.serve.requests import Serving
from train.serve.routes.access import BODY, WAITING, Access, Gate
from train.serve.routes.errors import HANDLERS
from train.serve.routes.openai.api import OpenAI
from train.serve.routes.openai.models import Models, Owns, Resolve, TemplateOf
from train.serve.routes.openai.text import Tokens
from train.serve.routes.status import StatusRoutes

_CORS: dict[str, Any] = {
    "allow_methods": ["*"],
    "allow_headers": ["*"],
    "expose_headers": ["Retry-After"],
    "allow_private_network": True,
}
_DRAIN = 30.0  # seconds that requests under way have when the server ends
_LOOK = 0.05


def make_app(
    engine: Serving,
    tokenizer: Any,
    tinker_routes: Sequence[BaseRoute] = (),
    *,
    access: Access | None = None,
    sampling: Mapping[str, float] | None = None,
    adapters: Path | None = None,
    resolve: Resolve = lambda path, owner: None,
    owns: Owns = lambda owner, name: True,
    template_of: TemplateOf = lambda folder: None,
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
      template_of: see `Models`.
      body: bytes of a request's body at most.
      waiting: requests of an owner under way at most.
    """
    access = access or Access()
    how: dict[str, Any] = {"resolve": resolve, "owns": owns, "template_of": template_of}
    models = Models(engine, access, folder=adapters, **how)
    routes = [
        *OpenAI(engine, Tokens(tokenizer), models, sampling).routes(),
        *StatusRoutes(engine, access, owns).routes(),
        *tinker_routes,
    ]
    gates = [Middleware(Gate, access, body=body, waiting=waiting)]
    if access.origins.allowed:  # browsers ask first whether they may send a request
        gates.insert(0, Middleware(CORSMiddleware, allow_origins=access.origins.allowed, **_CORS))
    app = Starlette(routes=routes, middleware=gates, exception_handlers=HANDLERS)
    app.state.access = access
    return app


class _Server(uvicorn.Server):
    """Counts signals; uvicorn's own ends at the first, and has it kill the process at the end."""

    signals = 0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def count(number: int, frame: Any) -> None:
            self.signals += 1

        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, count) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(app: Starlette, host: str, port: int, stop: Callable[[], None]) -> None:
    """Serves until SIGTERM or SIGINT, in the main thread.

    Then new work is refused with 503, and requests under way have half a minute to end; a second
    signal ends them at once. Long polls should end once `app.state.access.draining` is set.

    Args:
      app: the application, of `make_app`.
      host: the address.
      port: the port; 0 for a free one.
      stop: ends the engine; is called in a thread, once no request is under way, or time is up.

    Raises:
      UserError: the address cannot be had.
    """
    with _listening(host, port) as listener:
        config = uvicorn.Config(
            app,
            http=cast(Any, Connections()),
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
        asyncio.run(_served(_Server(config), app.state.access, listener, stop))


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


async def _served(
    server: _Server, access: Access, listener: socket.socket, stop: Callable[[], None]
) -> None:
    running = asyncio.create_task(server.serve([listener]))
    say(f"serving at {_address(listener)} (Ctrl-C ends it)")
    while not server.signals and not running.done():
        await asyncio.sleep(_LOOK)
    access.draining = True
    say("ends: what runs is finished; a second Ctrl-C ends it at once")
    signals, left = server.signals, _DRAIN
    while access.running.total() and server.signals == signals and left > 0:
        await asyncio.sleep(_LOOK)
        left -= _LOOK
    await run_in_threadpool(stop)
    server.should_exit = True
    await running


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
