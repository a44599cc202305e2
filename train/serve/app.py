"""The ASGI application: all routes behind the gate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from train.serve.protocol.engine import EngineProtocol
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
