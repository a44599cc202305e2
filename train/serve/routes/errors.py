"""The errors that clients receive: JSON in OpenAI's format, without tracebacks."""

import json
from collections.abc import Awaitable, Callable, Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from train.serve.protocol.requests import RequestError

JsonObject = dict[str, object]
_TYPE_OF_STATUS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class HttpError(Exception):
    """An error that refuses a request.

    Attributes:
      status: status of HTTP.
      param: the field that is wrong.
      code: code as OpenAI has it, such as "model_not_found".
      headers: headers of the answer.
      more: fields of the answer beside `error`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, object] | None = None,
    ) -> None:
        """Creates an error with an HTTP status and a message for the client."""
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers
        self.more = more or {}

    @property
    def content(self) -> JsonObject:
        """The JSON object of the answer."""
        default_type = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPE_OF_STATUS.get(self.status, default_type)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error, **self.more}


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Returns JSON in ASCII, because UTF-8 cannot encode the unpaired surrogates of some texts."""
    return Response(json.dumps(content), status, headers, "application/json")


def as_http_error(error: BaseException) -> HttpError:
    """Returns the error for the client, without details of the server's own failures."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, RequestError):
        return HttpError(400, str(error))
    if isinstance(error, HTTPException):
        return HttpError(error.status_code, error.detail, headers=error.headers)
    if isinstance(error, RecursionError):
        return HttpError(
            400, "the body has too many nested lists or objects. Send a body with less nesting."
        )
    return HttpError(
        500, "the server failed at this request. The log of the server names the reason."
    )


async def wait_disconnect(request: Request) -> None:
    """Waits until the client closes the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def handle(request: Request, error: Exception) -> Response:
    """Returns the answer to an error: an exception handler for Starlette."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    answer = as_http_error(error)
    return json_response(answer.content, answer.status, answer.headers)


_KINDS = (HttpError, RequestError, HTTPException, RecursionError, ClientDisconnect, Exception)
HANDLERS: Mapping[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = (
    dict.fromkeys(_KINDS, handle)
)
