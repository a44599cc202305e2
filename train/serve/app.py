"""The ASGI application: all routes, behind a gate that checks requests."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from train.serve.protocol.engine import EngineProtocol
from train.serve.routes.access import Access, Gate, GateLimits
from train.serve.routes.errors import HANDLERS
from train.serve.routes.openai.api import OpenAI
from train.serve.routes.openai.models import AdapterLookup, Models
from train.serve.routes.openai.text import ServedTokenizer
from train.serve.routes.status import StatusRoutes, TenantLookup, page_route

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
    lookup: AdapterLookup | None = None,
    tenants: TenantLookup | None = None,
    limits: GateLimits | None = None,
    trusts_templates: bool = False,
) -> Starlette:
    """Returns the application.

    Args:
      engine: the engine.
      tokenizer: the model's, of transformers.
      tinker_routes: the routes of Tinker's API. `access.owner_of(request)` tells them the owner.
      access: the keys, and the web pages that are let in; none by default, but the server's own.
        It is `app.state.access`.
      sampling: the temperature, top_p and top_k of OpenAI's routes, where a request gives none.
      lookup: finds adapters for owners; by default those that the engine knows, for all.
      tenants: finds the tenants of the status page; by default those of the engine.
      limits: limits of requests.
      trusts_templates: whether requests may bring a chat template, which runs as a program.
    """
    access = access or Access()
    lookup = lookup or AdapterLookup()
    models = Models(engine, access, lookup)
    openai = OpenAI(
        engine,
        ServedTokenizer(tokenizer),
        models,
        sampling,
        trusts_templates=trusts_templates,
    )
    routes = [
        *openai.routes(),
        *StatusRoutes(engine, access, lookup, tenants or TenantLookup()).routes(),
        *tinker_routes,
    ]
    return _make_app(routes, access, limits)


def make_starting_app(access: Access) -> Starlette:
    """Returns the application of a server that is starting: a page, and status 503 otherwise."""
    return _make_app([page_route()], access)


def _make_app(
    routes: Sequence[BaseRoute], access: Access, limits: GateLimits | None = None
) -> Starlette:
    """Returns the application of some routes."""
    middleware = [Middleware(Gate, access, limits or GateLimits())]
    if access.origins.allowed:  # browsers ask first whether they may send a request
        cors = Middleware(CORSMiddleware, allow_origins=access.origins.allowed, **_CORS)
        middleware.insert(0, cors)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=HANDLERS)
    app.state.access = access
    return app
