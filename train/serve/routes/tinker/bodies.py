"""Reads the bodies of requests, and turns errors into JSON answers."""

import asyncio
import dataclasses
import functools
import inspect
import json
import logging
import math
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from train.console.errors import disk_full_text
from train.serve.protocol.requests import RequestError
from train.serve.routes.errors import HttpError, json_response
from train.serve.routes.tinker.wire import MOST_BYTES
from train.serve.storage.database import LockedError
from train.serve.storage.results import NO_ROOM
from train.serve.tenants.command_log import BusyError

_log = logging.getLogger(__name__)
MOST_METADATA_BYTES = 64 * 2**10  # of the metadata of a session, a model or a checkpoint
_THREADS = ThreadPoolExecutor(64, "tinker")
_Kind = TypeVar("_Kind", str, int, float, bool, dict, list)
_REQUIRED: Any = object()  # the default of a field that must be there
_KIND_NAMES = {str: "a text", int: "an integer", float: "a number", bool: "true or false"}
_KIND_NAMES |= {dict: "an object", list: "a list"}
Owner = Callable[[Request], str | None]


@dataclasses.dataclass(frozen=True)
class OwnerRequest:
    """A request with a valid key.

    Attributes:
      http: the request.
      owner: the owner of that key.
      body: its body.
    """

    http: Request
    owner: str
    body: bytes

    @property
    def path(self) -> dict[str, Any]:
        """The values of the route's path parameters, by name."""
        return self.http.path_params

    @functools.cached_property
    def fields(self) -> "JsonFields":
        """The fields of the body.

        Raises:
          RequestError: the body is no object in JSON.
        """
        return JsonFields.parse(self.body)


# Is called in a thread, where it may wait for files, unless it is a coroutine function.
Endpoint = Callable[[OwnerRequest], Response | Awaitable[Response]]


def guard(endpoint: Endpoint, find_owner: Owner) -> Callable[[Request], Awaitable[Response]]:
    """Returns an endpoint that requires a key, and that turns errors into answers.

    Args:
      endpoint: answers the request.
      find_owner: says whose key a request has; None for no valid one.
    """

    async def answer(request: Request) -> Response:
        """Answers a request, or explains why it is refused."""
        try:
            owner = find_owner(request)
            if owner is None:
                return json_response(
                    {"detail": "this server does not know the X-API-Key. Check the key."}, 401
                )
            owner_request = OwnerRequest(request, owner, await read_bytes(request))
            if inspect.iscoroutinefunction(endpoint):
                return await endpoint(owner_request)
            call = cast(Callable[[], Response], functools.partial(endpoint, owner_request))
            return await asyncio.get_running_loop().run_in_executor(_THREADS, call)
        except RequestError as error:
            return json_response({"detail": str(error)}, 400)
        except HttpError as error:
            return json_response({"detail": str(error)}, error.status)
        except BusyError as error:
            return json_response({"detail": str(error)}, 429, {"Retry-After": "1"})
        except LockedError as error:
            return json_response(
                {"detail": f"{error}. Send the request again."}, 503, {"Retry-After": "1"}
            )
        except ClientDisconnect:
            return json_response(
                {"detail": "the body of the request was cut off. Send the request again."}, 400
            )
        except Exception as error:
            _log.exception("%s failed", request.url.path)
            if disk_full_text(error):
                return json_response({"detail": NO_ROOM}, 507)
            return json_response({"detail": f"the server failed: {type(error).__name__}"}, 500)

    return answer


async def read_bytes(request: Request) -> bytes:
    """Returns a body; raises HttpError (413) if it has more than `MOST_BYTES`."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MOST_BYTES:
            raise HttpError(
                413, f"the body has more than {MOST_BYTES} bytes. Send fewer data at once."
            )
    return bytes(content)


class JsonFields:
    """Reads the fields of an object in JSON: each has a kind, unknown ones are ignored."""

    def __init__(self, values: object, label: str = "the body"):
        if not isinstance(values, dict):
            raise RequestError(f"{label} is not a JSON object. Send an object of fields.")
        self.values = values
        self._label = label

    @classmethod
    def parse(cls, body: bytes) -> "JsonFields":
        """Returns the fields of a body; raises a RequestError if it is no object in JSON."""
        try:
            return cls(json.loads(body))
        except (ValueError, RecursionError) as error:
            raise RequestError("the body is not valid JSON. Send a JSON object.") from error

    def get(
        self,
        name: str,
        kind: type[_Kind],
        default: Any = _REQUIRED,
        least: float = -(2**63),
        most: float = 2**63 - 1,
    ) -> _Kind:
        """Returns a field; the default if it is null or absent.

        Raises:
          RequestError: It has another kind, is out of bounds, or is needed and absent.
        """
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise RequestError(f"{self._label} lacks {name}. Pass {_KIND_NAMES[kind]}.")
            return default
        if kind is float and type(value) is int:  # JSON need not write 1 as 1.0
            value = float(value) if abs(value) < 2**63 else math.inf
        if type(value) is not kind:
            raise RequestError(
                f"{name} of {self._label} has the wrong type. Pass {_KIND_NAMES[kind]}."
            )
        if isinstance(value, int | float) and not least <= value <= most:
            raise RequestError(
                f"{name} of {self._label} is out of range. Pass a number from {least:g} to "
                f"{most:g}."
            )
        if isinstance(value, str) and not value.isprintable():
            raise RequestError(
                f"{name} of {self._label} has characters that cannot be printed. Remove them."
            )
        return value

    def object(self, name: str, default: Any = _REQUIRED) -> "JsonFields":
        """Returns the fields of a nested object."""
        return JsonFields(self.get(name, dict, default), name)

    def metadata(self) -> dict | None:
        """Returns the metadata of the client, or None.

        Raises:
          RequestError: it has more than `MOST_METADATA_BYTES`.
        """
        metadata = self.get("user_metadata", dict, None)
        n_bytes = len(json.dumps(metadata))
        if n_bytes > MOST_METADATA_BYTES:
            raise RequestError(
                f"user_metadata of {self._label} has {n_bytes} bytes as JSON, but the server keeps "
                f"at most {MOST_METADATA_BYTES}. Send less metadata."
            )
        return metadata
