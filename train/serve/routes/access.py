"""Access to a server: keys, the start, and limits of bodies and of requests under way."""

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
_AGAIN = "2"  # seconds, while a server starts
_READING = 300.0  # seconds that a body may take
_PAGE = "/"
_OPEN = (_PAGE, "/health", "/healthz", "/api/v1/healthz")  # need no key
_SIGNED = "/api/v1/files/"  # addresses that say themselves who may have the file
_DRAINED = "/api/v1/retrieve_future"  # is answered while the server ends: the work is old


@dataclasses.dataclass
class StartProgress:
    """The progress of a start; any thread may change it.

    Attributes:
      model: name of the base.
      compiled: number of parts that are compiled.
      parts: number of all parts; 0 while weights are read.
    """

    model: str
    compiled: int = 0
    parts: int = 0

    def see(self, compiled: int, parts: int) -> None:
        """Notes the progress of the start."""
        self.compiled, self.parts = compiled, parts

    def refusal(self) -> HttpError:
        """Returns the answer to requests that come too early."""
        count = f"{self.compiled} of {self.parts} parts are compiled"
        progress = count if self.parts else "the weights are being loaded"
        return HttpError(
            503,
            f"the server starts: {progress}; ask again",
            headers={"Retry-After": _AGAIN},
            more={"starting": dataclasses.asdict(self)},
        )


class Access:
    """The keys and origins that a server accepts, and what it can take now.

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
        """Takes the owners by their keys, None for a server without; by default no origins."""
        self.keyed, self.draining = keys is not None, False
        self.origins = origins or Origins()
        self.starting: StartProgress | None = None
        self.running: Counter[str] = Counter()
        self._owners = [(_digest(key), name) for key, name in (keys or {}).items()]

    def owner(self, request: HTTPConnection) -> str | None:
        """Returns the owner by the key in `Authorization` or `X-API-Key`; None for a wrong one."""
        if not self.keyed:
            return LOCAL
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else ""
        digest, owner = _digest(request.headers.get("x-api-key", given)), None
        for known, name in self._owners:  # all of them: the time tells nothing
            if hmac.compare_digest(known, digest):
                owner = name
        return owner


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: Path) -> dict[str, str]:
    """Returns the owners by their keys, from a file with a `name key` in each line.

    Empty lines, and those that begin with #, are left out. An owner may have several keys.

    Raises:
      UserError: the file cannot be read, holds no key, or has another line, or a key twice.
    """
    given = f"--keys {path}: "
    keys: dict[str, str] = {}
    for number, line in enumerate(read_user_file(path, given).splitlines(), start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) != 2 or not parts[0].replace("-", "").replace("_", "").isalnum():
            raise UserError(
                f"{given}line {number} is no `name key`: a name of letters, digits, - and _, a "
                "space and a key without one are needed"
            )
        name, key = parts
        if key in keys:
            raise UserError(f"{given}the key of line {number} is there twice: make another one")
        keys[key] = name
    if not keys:
        raise UserError(f"{given}it holds no key: write lines of the form `name key`")
    return keys


def owner_of(request: HTTPConnection) -> str:
    """Returns the owner of a request that came through a `Gate`."""
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
    """ASGI middleware that lets requests in: with a key, of bounded size, so many at once."""

    def __init__(self, app: ASGIApp, access: Access, limits: GateLimits) -> None:
        """Wraps an application."""
        self._app, self._access = app, access
        self._body, self._waiting = limits.body, limits.waiting

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or refuses it."""
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
        body, started = _Body(receive, self._body), False

        async def replaced(message: Message) -> None:
            """Sends the refusal of a body in the place of what a route makes of it."""
            nonlocal started
            if body.refused is None or started:
                await send(message)
            elif message["type"] == "http.response.start":
                refusal = json_response(body.refused.content, body.refused.status)
                await refusal(scope, receive, send)
            started |= body.refused is None

        self._access.running[owner] += 1
        try:
            await self._app(scope, body, replaced)
        finally:
            self._access.running[owner] -= 1

    def _enter(self, scope: Scope) -> str:
        """Returns the owner of a request; raises HttpError if it is not let in."""
        path, new = scope["path"], scope["method"] not in ("GET", "HEAD")
        headers = Headers(scope=scope)
        if not self._access.keyed and (refusal := self._access.origins.refusal(headers)):
            raise HttpError(403, refusal, code="origin_not_allowed")
        if (starting := self._access.starting) is not None and path != _PAGE:
            raise starting.refusal()
        if self._access.draining and new and path != _DRAINED:
            raise HttpError(503, "the server ends; ask again", headers={"Retry-After": "5"})
        owner = self._access.owner(HTTPConnection(scope))
        if owner is None:
            if path not in _OPEN and not path.startswith(_SIGNED):
                raise HttpError(
                    401,
                    "a key is needed: as `Authorization: Bearer KEY`, or as `X-API-Key: KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            owner = ""
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._body:
            raise _too_large(self._body)
        if self._access.running[owner] >= self._waiting:
            raise HttpError(
                429,
                f"{self._waiting} of your requests are under way: wait for some of them",
                headers={"Retry-After": "1"},
            )
        return owner


class _Body:
    """A `receive` that raises HttpError for a body that is too large or too slow.

    Attributes:
      refused: the error, once it was raised.
    """

    def __init__(self, receive: Receive, most: int) -> None:
        self.refused: HttpError | None = None
        self._receive, self._most, self._size, self._whole = receive, most, 0, False
        self._end = asyncio.get_running_loop().time() + _READING

    async def __call__(self) -> Message:
        if self._whole:  # what comes now is the end of the connection
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._end):
                message = await self._receive()
        except TimeoutError:
            self.refused = HttpError(408, f"the body was not there after {_READING:.0f} s")
            raise self.refused from None
        self._size += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._size > self._most:
            self.refused = _too_large(self._most)
            raise self.refused
        return message


def _too_large(most: int) -> HttpError:
    return HttpError(413, f"the body has more than {most:,} bytes: send it in parts")
