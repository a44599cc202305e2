"""The state of a server as a web page, as JSON, and as Prometheus metrics."""

import dataclasses
from collections.abc import Callable, Mapping
from importlib.resources import files

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from train.serve.protocol.engine import EngineProtocol, TenantStatus
from train.serve.routes.access import Access, owner_of
from train.serve.routes.errors import JsonObject, json_response
from train.serve.routes.openai.models import AdapterLookup

_PAGE = files("train.serve.routes").joinpath("status.html").read_text(encoding="utf-8")
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'"
)
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts that were run.",
    "found_tokens": "Tokens of prompts that had been run before.",
    "drawn_tokens": "Tokens that were drawn.",
    "trained_tokens": "Tokens of the data whose gradients were added.",
    "compiled": "Programs that were compiled.",
}
_GAUGES = {
    "waiting": "Samples that wait for a place.",
    "drawing": "Completions that are being drawn.",
    "base_size": "Bytes of the base on the device.",
    "prefix_size": "Bytes of prompts that were run, on the device.",
}
_TENANT_METRICS = {
    "steps": ("counter", "Updates that a tenant took."),
    "seconds": ("counter", "Seconds of the engine's time that a tenant had."),
    "size": ("gauge", "Bytes of a tenant's arrays on the device."),
    "queued": ("gauge", "Commands of a tenant that wait."),
}


@dataclasses.dataclass(frozen=True)
class TenantLookup:
    """Finds the tenants for the page.

    Attributes:
      list: returns the tenants, with those on disk; None for those of the engine.
      display_name: returns the name that people gave to a tenant; None for its id alone.
    """

    list: Callable[[], Mapping[str, TenantStatus]] | None = None
    display_name: Callable[[str], str | None] = lambda tenant: None


def page_route() -> Route:
    """Returns the route of the page."""
    return Route("/", _page)


async def _page(request: Request) -> Response:
    return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})


class StatusRoutes:
    """The routes of the server's state. With keys, owners see only their own tenants."""

    def __init__(
        self,
        engine: EngineProtocol,
        access: Access,
        lookup: AdapterLookup,
        tenants: TenantLookup,
    ) -> None:
        """Stores the arguments of `make_app`."""
        self._engine = engine
        self._access = access
        self._owns = lookup.owns
        self._display_name = tenants.display_name
        self._list_tenants = tenants.list or (lambda: engine.status().tenants)

    def routes(self) -> list[Route]:
        """Returns the routes."""
        return [
            page_route(),
            Route("/status.json", self._json),
            Route("/metrics", self._metrics),
            Route("/healthz", self._healthz),
            Route("/health", self._healthz),  # vLLM's name of it
        ]

    async def _healthz(self, request: Request) -> Response:
        return json_response({"status": "draining" if self._access.draining else "ok"})

    def _visible_status(self, owner: str) -> tuple[JsonObject, dict[str, TenantStatus]]:
        """Returns the server's figures, and the states of an owner's tenants."""
        status = self._engine.status()
        facts = self._engine.facts
        figures = {name: getattr(status, name) for name in (*_COUNTERS, *_GAUGES)}
        figures |= {"model": facts.model, "sequences": facts.sequences, "slots": facts.slots}
        tenants = {
            name: tenant for name, tenant in self._list_tenants().items() if self._owns(owner, name)
        }
        return figures, tenants

    async def _json(self, request: Request) -> Response:
        figures, tenants = await run_in_threadpool(self._visible_status, owner_of(request))
        tenant_figures = await run_in_threadpool(self._tenant_figures, tenants)
        return json_response({**figures, "tenants": tenant_figures})

    def _tenant_figures(self, tenants: Mapping[str, TenantStatus]) -> dict[str, JsonObject]:
        """Returns the figures of each tenant for the page."""
        figures_of_tenant: dict[str, JsonObject] = {}
        for name, tenant in tenants.items():
            figures_of_tenant[name] = {
                "name": self._display_name(name),
                "rank": tenant.spec.rank,
                "losses": [[step, _finite(loss)] for step, loss in tenant.losses],
                "owner": tenant.client.owner,
                "session": tenant.client.session,
                "used": tenant.used,
                "parked": tenant.parked,
                **{field: getattr(tenant, field) for field in _TENANT_METRICS},
            }
        return figures_of_tenant

    async def _metrics(self, request: Request) -> Response:
        """Answers with the figures in Prometheus' format."""
        figures, tenants = await run_in_threadpool(self._visible_status, owner_of(request))
        lines: list[str] = []
        for name, description in (_COUNTERS | _GAUGES).items():
            kind = "counter" if name in _COUNTERS else "gauge"
            metric = _add_head(lines, name, kind, description)
            lines.append(f"{metric} {figures[name]}")
        for name, (kind, description) in _TENANT_METRICS.items():
            metric = _add_head(lines, f"tenant_{name}", kind, description)
            for tenant_name, tenant in tenants.items():
                value = getattr(tenant, name)
                if value is not None:
                    lines.append(_tenant_sample(metric, tenant_name, value))
        metric = _add_head(lines, "tenant_loss", "gauge", "Loss a weighted token, latest step.")
        for tenant_name, tenant in tenants.items():
            if tenant.losses:
                _, loss = tenant.losses[-1]
                lines.append(_tenant_sample(metric, tenant_name, loss))
        text = "\n".join([*lines, ""])
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _add_head(lines: list[str], name: str, kind: str, description: str) -> str:
    """Appends the head of a metric; returns its name."""
    metric = f"lora_jax_{name}"
    if kind == "counter":
        metric += "_total"
    lines += [f"# HELP {metric} {description}", f"# TYPE {metric} {kind}"]
    return metric


def _tenant_sample(metric: str, tenant_name: str, value: object) -> str:
    """Returns the line of a metric with a tenant's value."""
    return f'{metric}{{tenant="{_escape(tenant_name)}"}} {value}'


def _escape(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _finite(value: float) -> float | None:
    """Returns a number if JSON can represent it; None otherwise."""
    return value if abs(value) < float("inf") else None
