"""Accepts or refuses requests to a server: keys, origins, startup, and limits."""

import asyncio
import dataclasses
import hashlib
import hmac
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from train.console.errors import UserError, read_user_file
from train.serve.routes.errors import HttpError, json_response
from train.serve.routes.origins import Origins

LOCAL = "local"  # the owner of all requests, without keys
_START_RETRY = "2"  # seconds after which a request may come again while a server starts
_READING = 300.0  # seconds that a body may take
_PAGE = "/"
_PUBLIC_PATHS = (_PAGE, "/health", "/healthz", "/api/v1/healthz")
_SIGNED_PREFIX = "/api/v1/files/"  # of addresses that say themselves who may have the file
_FUTURE_PATH = "/api/v1/retrieve_future"  # is answered while the server ends: the work is old


@dataclasses.dataclass
class StartProgress:
    """The progress of the server's start. Any thread may change it.

    Attributes:
      model: name of the base.
      compiled: number of parts that are compiled.
      parts: number of all parts; 0 while weights are read.
    """

    model: str
    compiled: int = 0
    parts: int = 0

    def see(self, compiled: int, parts: int) -> None:
        """Updates the progress."""
        self.compiled = compiled
        self.parts = parts

    def refusal(self) -> HttpError:
        """Returns the error for a request that comes before the server is ready."""
        progress = "the weights are being loaded"
        if self.parts:
            progress = f"{self.compiled} of {self.parts} parts are compiled"
        return HttpError(
            503,
            f"the server is starting ({progress}). Send the request again later.",
            headers={"Retry-After": _START_RETRY},
            more={"starting": dataclasses.asdict(self)},
        )


class Access:
    """The keys and origins that a server accepts, and its present state.

    Attributes:
      keyed: whether there are keys.
      origins: web pages that may use the server without keys.
      draining: whether the server ends; new work is refused then.
      starting: how far the server is, until it is ready; all but its page is refused then.
      running: requests under way, by owner.
    """

    def __init__(
        self, keys: Mapping[str, str] | None = None, origins: Origins | None = None
    ) -> None:
        """Stores the owners by their keys (None for a server without keys) and the origins."""
        self.keyed = keys is not None
        self.draining = False
        self.origins = origins or Origins()
        self.starting: StartProgress | None = None
        self.running: Counter[str] = Counter()
        self._owner_of_digest = {_digest(key): owner for key, owner in (keys or {}).items()}

    def owner(self, request: HTTPConnection) -> str | None:
        """Returns the owner of the key in `Authorization` or `X-API-Key`; None for a wrong key."""
        if not self.keyed:
            return LOCAL
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        bearer_key = bearer.strip() if scheme.lower() == "bearer" else ""
        request_digest = _digest(request.headers.get("x-api-key", bearer_key))
        request_owner = None
        for digest, owner in self._owner_of_digest.items():  # all of them: the time tells nothing
            if hmac.compare_digest(digest, request_digest):
                request_owner = owner
        return request_owner


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: Path) -> dict[str, str]:
    """Reads the owners by their keys from a file with a line `name key` for each key.

    Empty lines, and those that begin with #, are left out. An owner may have several keys.

    Raises:
      UserError: the file cannot be read, holds no key, or has another line, or a key twice.
    """
    option = f"--keys {path}: "
    owner_of_key: dict[str, str] = {}
    for number, line in enumerate(read_user_file(path, option).splitlines(), start=1):
        words = line.split()
        is_comment = not words or words[0].startswith("#")
        if is_comment:
            continue
        has_valid_name = words[0].replace("-", "").replace("_", "").isalnum()
        if len(words) != 2 or not has_valid_name:
            raise UserError(
                f"{option}line {number} is not of the form `name key`. Write a name of letters, "
                "digits, - and _, then a space, then a key without spaces."
            )
        owner, key = words
        if key in owner_of_key:
            raise UserError(
                f"{option}the key of line {number} occurs twice. Use a different key for each line."
            )
        owner_of_key[key] = owner
    if not owner_of_key:
        raise UserError(f"{option}the file contains no key. Write lines of the form `name key`.")
    return owner_of_key


def owner_of(request: HTTPConnection) -> str:
    """Returns the owner of a request that passed a `Gate`."""
    return request.scope["owner"]


@dataclasses.dataclass(frozen=True)
class GateLimits:
    """Limits of requests.

    Attributes:
      body: bytes of a body at most.
      waiting: requests of an owner under way at most.
    """

    body: int = 64 << 20
    waiting: int = 4096


class Gate:
    """ASGI middleware that checks the key, the size of the body, and the number of requests."""

    def __init__(self, app: ASGIApp, access: Access, limits: GateLimits) -> None:
        """Wraps an application."""
        self._app = app
        self._access = access
        self._max_body_bytes = limits.body
        self._max_running = limits.waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            owner = self._enter(scope)
        except HttpError as error:
            answer = json_response(error.content, error.status, error.headers)
            await answer(scope, receive, send)
            return
        scope["owner"] = owner
        body = _Body(receive, self._max_body_bytes)
        has_started = False

        async def send_or_refuse(message: Message) -> None:
            """Sends a message of the route, or an error if the body was refused."""
            nonlocal has_started
            if body.refusal is None or has_started:
                await send(message)
            elif message["type"] == "http.response.start":
                answer = json_response(body.refusal.content, body.refusal.status)
                await answer(scope, receive, send)
            if body.refusal is None:
                has_started = True

        self._access.running[owner] += 1
        try:
            await self._app(scope, body, send_or_refuse)
        finally:
            self._access.running[owner] -= 1

    def _enter(self, scope: Scope) -> str:
        """Returns the owner of a request; raises HttpError if the request is refused."""
        path = scope["path"]
        headers = Headers(scope=scope)
        if not self._access.keyed:
            refusal = self._access.origins.refusal(headers)
            if refusal is not None:
                raise HttpError(403, refusal, code="origin_not_allowed")
        starting = self._access.starting
        if starting is not None and path != _PAGE:
            raise starting.refusal()
        is_new_work = scope["method"] not in ("GET", "HEAD")
        if self._access.draining and is_new_work and path != _FUTURE_PATH:
            raise HttpError(
                503,
                "the server is shutting down. Send the request again later.",
                headers={"Retry-After": "5"},
            )
        owner = self._access.owner(HTTPConnection(scope))
        if owner is None:
            if path not in _PUBLIC_PATHS and not path.startswith(_SIGNED_PREFIX):
                raise HttpError(
                    401,
                    "the request has no valid key. Send a key as `Authorization: Bearer KEY`, or "
                    "as `X-API-Key: KEY`.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            owner = ""
        content_length = headers.get("content-length", "0")
        if content_length.isdecimal() and int(content_length[:20]) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        if self._access.running[owner] >= self._max_running:
            raise HttpError(
                429,
                f"{self._max_running} of your requests are running, which is the maximum. Wait "
                "until some have finished.",
                headers={"Retry-After": "1"},
            )
        return owner


class _Body:
    """A `receive` that raises HttpError for a body that is too large or too slow.

    Attributes:
      refusal: the error, once it was raised.
    """

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        """Wraps the `receive` of a request."""
        self.refusal: HttpError | None = None
        self._receive = receive
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._is_complete = False
        self._deadline = asyncio.get_running_loop().time() + _READING

    async def __call__(self) -> Message:
        """Returns the next message of the body."""
        if self._is_complete:  # what comes now is the end of the connection
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            self.refusal = HttpError(
                408,
                f"the body of the request did not arrive within {_READING:.0f} s. Send the request "
                "again.",
            )
            raise self.refusal from None
        self._n_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        if self._n_bytes > self._max_bytes:
            self.refusal = _too_large(self._max_bytes)
            raise self.refusal
        return message


def _too_large(max_bytes: int) -> HttpError:
    return HttpError(413, f"the body has more than {max_bytes:,} bytes. Send it in parts.")
