"""A client of OpenAI-compatible servers that load adapters: vLLM, SGLang, or `train.serve`."""

import contextlib
import http.client
import json
import math
import os
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from train.console.errors import UserError

KEY = "LORA_JAX_SAMPLER_KEY"  # the environment variable of a server's key
_TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.2, 8.0  # between two attempts
_PROBE_SECONDS = 1.0  # to wait for a connection in `SamplerServer.probe`
_CONNECT_SECONDS = 10.0
_MAX_MESSAGE_CHARS = 300  # characters of a server's answer in a message


class SamplingOptions(NamedTuple):
    """The options of sampling, which are the same for all requests of a run.

    Attributes:
      n: the number of completions of a prompt.
      max_tokens: the maximum number of tokens of a completion.
      temperature, top_p, top_k: see `lora_jax.models.sample`.
      stop: texts that end a completion.
      ends: tokens that end a completion.
    """

    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    stop: Sequence[str]
    ends: Sequence[int]

    def body(self) -> dict[str, Any]:
        """Returns the fields of a request, which override all defaults of a server."""
        return {
            "n": self.n,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": -1 if self.top_k is None else self.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": [*self.stop],
            "stop_token_ids": [*self.ends],
            "logprobs": 1,
            "return_token_ids": True,
        }


class DrawnCompletion(NamedTuple):
    """A completion: its token ids, their log-probabilities, and whether it ended by itself."""

    ids: list[int]
    logps: list[float]
    ended: bool


class _HttpError(Exception):
    """An error that the server returned, with the HTTP status in `status`."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class SamplerServer:
    """A server at an address. Its methods may be called in any thread.

    The methods raise a UserError that names --sampler for all problems.
    """

    def __init__(self, url: str, seconds: float) -> None:
        """Keeps the address of --sampler and the maximum number of seconds for a request."""
        self.url = url.rstrip("/").removesuffix("/v1")
        invalid_url = UserError(
            f"--sampler {url} is not an address. Pass an address such as http://127.0.0.1:8000."
        )
        address = urllib.parse.urlsplit(self.url)
        try:
            self._port = address.port
        except ValueError:
            raise invalid_url from None
        if address.scheme not in ("http", "https") or not address.hostname:
            raise invalid_url
        self._address = address
        self.seconds = seconds
        self._closed = threading.Event()
        self._connections: set[http.client.HTTPConnection] = set()
        self._prefix: str | None = None  # of the routes that load adapters; None if unknown
        self._base: str | None = None

    def probe(self) -> list[str]:
        """Returns the names of the server's models, without waiting for an unreachable server."""
        try:
            answer = self._ask("GET", "/v1/models", None, patience=_PROBE_SECONDS)
        except _HttpError as error:
            raise self._error(
                f"/v1/models answers {error.status}: {error}. Check the address."
            ) from None
        names = [str(model.get("id")) for model in _objects(answer, "data")]
        if not names:
            raise self._error(
                "/v1/models lists no model. Check that this is a server of OpenAI's API."
            )
        self._base = names[0]
        return names

    def check_loads(self) -> None:
        """Raises a UserError if no adapter can be loaded."""
        try:
            self._post_adapter("load", {})
        except _HttpError as error:
            if error.status in (404, 405):
                raise self._error(
                    "the server loads no adapters (/v1/load_lora_adapter does not exist). Start "
                    "vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its "
                    "environment, SGLang with --enable-lora, or `lora-jax serve`."
                ) from None

    def load(self, name: str, path: str) -> None:
        """Loads an adapter from a folder, and replaces an adapter with the same name."""
        body = {"lora_name": name, "lora_path": path}
        try:
            try:
                self._post_adapter("load", body)
            except _HttpError as error:
                has_name_already = error.status == 400 and "already" in str(error)
                if not has_name_already:
                    raise
                # An earlier attempt loaded the adapter, but its answer was lost.
                self.unload(name)
                self._post_adapter("load", body)
        except _HttpError as error:
            raise self._error(
                f"the server does not load the adapter in {path} ({error.status}: {error}). Pass a "
                "folder that both machines can read with --sampler-folder, and its path on the "
                "server's machine with --sampler-mount. Start the server with room for this rank "
                "and these targets (vLLM: --max-lora-rank, --max-loras)."
            ) from None

    def unload(self, name: str) -> None:
        """Unloads an adapter. An adapter that is not loaded is no error."""
        try:
            self._post_adapter("unload", {"lora_name": name})
        except _HttpError as error:
            if error.status not in (400, 404):
                raise self._error(
                    f"the server does not unload {name} ({error}). Check the log of the server."
                ) from None

    def model_of(self, name: str) -> str:
        """Returns the `model` of requests to a loaded adapter."""
        is_sglang = self._prefix == ""
        return f"{self._base}:{name}" if is_sglang else name

    def complete(
        self, model: str, prompt: Sequence[int], options: SamplingOptions, seed: int
    ) -> list[DrawnCompletion] | None:
        """Returns completions of a prompt; None if the server does not have the model."""
        body = {"model": model, "prompt": [*prompt], "seed": seed, **options.body()}
        try:
            answer = self._ask("POST", "/v1/completions", body)
        except _HttpError as error:
            if error.status == 404:
                return None
            raise self._error(
                f"the server refuses to draw ({error.status}: {error}). Check the server's log."
            ) from None
        return self._read_completions(answer, prompt, options)

    def close(self) -> None:
        """Ends all requests."""
        self._closed.set()
        for connection in [*self._connections]:
            if connection.sock is not None:
                with contextlib.suppress(OSError):  # the connection has ended already
                    connection.sock.shutdown(2)

    def _read_completions(
        self, answer: Any, prompt: Sequence[int], options: SamplingOptions
    ) -> list[DrawnCompletion]:
        """Returns the completions of an answer, after checking their number."""
        choices = _objects(answer, "choices")
        if len(choices) != options.n:
            raise self._error(
                f"the server returns {len(choices)} completions of a prompt, but {options.n} "
                "(--group) were requested. Use a server that supports the field `n`."
            )
        return [self._read_completion(choice, prompt, options) for choice in choices]

    def _read_completion(
        self, choice: Mapping[str, Any], prompt: Sequence[int], options: SamplingOptions
    ) -> DrawnCompletion:
        """Returns a completion of an answer, after checking that it has all that training needs."""
        self._check_prompt(choice.get("prompt_token_ids"), prompt)
        ids = choice.get("token_ids", choice.get("response_token_ids"))
        if not isinstance(ids, list) or not ids or not all(isinstance(x, int) for x in ids):
            raise self._error(
                "the server does not return the ids of drawn tokens (`return_token_ids`), which "
                "training needs. Use vLLM from 0.10.2 on, or `lora-jax serve`."
            )
        logps = self._token_logps(choice.get("logprobs"), ids)
        if len(ids) > options.max_tokens:
            raise self._error(
                f"the server drew {len(ids)} tokens, more than --max-new-tokens "
                f"{options.max_tokens}. Use a server that supports the field `max_tokens`."
            )
        has_ended = choice.get("finish_reason") == "stop"
        return DrawnCompletion([*ids], logps, has_ended)

    def _check_prompt(self, prompt_ids: Any, prompt: Sequence[int]) -> None:
        """Raises a UserError if the answer says that another prompt was completed."""
        if prompt_ids is None or prompt_ids == [*prompt]:
            return
        n_tokens = len(prompt_ids) if isinstance(prompt_ids, list) else 0
        raise self._error(
            f"the server draws after a prompt of {n_tokens} tokens, but it received {len(prompt)} "
            "token ids. Use a server that does not change prompts of token ids."
        )

    def _token_logps(self, logprobs: Any, ids: Sequence[int]) -> list[float]:
        """Returns the log-probabilities in an answer's field, after checking them.

        Args:
          logprobs: the field.
          ids: the drawn tokens.
        """
        n_tokens = len(ids)
        logps = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(logps, list):
            logps = []
        for token_id, logp in zip(ids, logps, strict=False):
            if isinstance(logp, float) and math.isnan(logp):
                raise self._error(
                    f"the log-probability of token {token_id} is nan. The server's model computes "
                    "numbers that are not finite: start the server with another dtype, such as "
                    "float32, or with another base or adapter."
                )
        are_valid = all(isinstance(x, int | float) and -1e4 < x < 1e-3 for x in logps)
        if not are_valid or len(logps) != n_tokens:
            raise self._error(
                f"the server returns log-probabilities of {len(logps)} tokens, but it drew "
                f"{n_tokens} tokens. Use a server that returns `logprobs` of each token."
            )
        return [float(x) for x in logps]

    def _post_adapter(self, verb: str, body: Mapping[str, Any]) -> None:
        """Posts a request to load or unload an adapter. SGLang's route has no prefix "/v1"."""
        prefixes = ("/v1", "") if self._prefix is None else (self._prefix,)
        for prefix in prefixes:
            try:
                self._ask("POST", f"{prefix}/{verb}_lora_adapter", body)
            except _HttpError as error:
                # Another error than "not found" shows that the route exists.
                has_route = error.status not in (404, 405) or self._prefix is not None
                if has_route:
                    self._prefix = prefix
                if has_route or prefix == prefixes[-1]:
                    raise
            else:
                self._prefix = prefix
                return

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, patience: float | None = None
    ) -> Any:
        """Sends a request until the server is reachable and not busy, and returns the answer.

        Args:
          method, path, body: the request.
          patience: seconds to wait for an unreachable server; by default as for a busy server.

        Raises:
          _HttpError: the server refuses the request.
        """
        start_time = time.monotonic()
        pause = _FIRST_PAUSE_SECONDS
        problem = ""  # of the last attempt
        while not self._closed.is_set():
            seconds_left = self.seconds - (time.monotonic() - start_time)
            if seconds_left <= 0:
                break
            retry_after = 0.0
            try:
                status, text, retry_after = self._send_once(method, path, body, seconds_left)
            except (OSError, http.client.HTTPException) as error:
                # An earlier problem says more than a timeout.
                is_timeout = isinstance(error, TimeoutError)
                if not (problem and is_timeout):
                    problem = f"cannot be reached ({str(error) or type(error).__name__})"
                if patience is not None and time.monotonic() - start_time > patience:
                    raise self._error(
                        f"the server {problem}. Start the server, or check the address."
                    ) from None
            else:
                if status < 300:
                    return _parse_answer(text)
                self._check_retry(status, text, problem)
                problem = f"answers {status} ({_message(text)})"
            self._closed.wait(min(max(pause, retry_after), max(seconds_left, 0)))
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)
        if self._closed.is_set():
            raise self._error("the run has ended")
        raise self._error(
            f"{path} {problem or 'gave no answer'} for {self.seconds:g} s (--sampler-timeout). "
            "Restart the server, or increase --sampler-timeout."
        )

    def _check_retry(self, status: int, text: str, problem: str) -> None:
        """Raises an error if the request must not be sent again after an answer.

        Args:
          status, text: the answer.
          problem: the problem of the attempt before; "" for none.
        """
        if status in (401, 403):
            raise self._error(
                f"the server refuses the request ({status}: {_message(text)}). Set its key in the "
                f"environment variable {KEY}."
            )
        is_second_500 = status == 500 and problem.startswith("answers 500")
        if status not in _TRANSIENT_STATUSES or is_second_500:
            raise _HttpError(status, _message(text))

    def _send_once(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float
    ) -> tuple[int, str, float]:
        """Sends a request, and returns the status, the text and `Retry-After` of the answer."""
        connection = self._make_connection(min(seconds, _CONNECT_SECONDS))
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(KEY)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        self._connections.add(connection)
        try:
            connection.connect()
            if self._closed.is_set():  # `close` could not shut down a socket before
                raise OSError("the run has ended")
            connection.sock.settimeout(seconds)
            connection.request(method, self._address.path + path, content, headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            retry_after = answer.headers.get("Retry-After", "")
            return answer.status, text, float(retry_after) if retry_after.isdigit() else 0.0
        finally:
            self._connections.discard(connection)
            connection.close()

    def _make_connection(self, timeout: float) -> http.client.HTTPConnection:
        """Returns a connection to the address that is not open yet."""
        host = self._address.hostname or ""
        if self._address.scheme == "http":
            return http.client.HTTPConnection(host, self._port, timeout=timeout)
        return http.client.HTTPSConnection(host, self._port, timeout=timeout)

    def _error(self, problem: str) -> UserError:
        """Returns a UserError that names the server."""
        return UserError(f"--sampler {self.url}: {problem}")


def _parse_answer(text: str) -> Any:
    """Returns the JSON value of an answer, or the text if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _objects(answer: Any, field: str) -> list[dict[str, Any]]:
    """Returns the JSON objects in a list field of an answer; [] without such a list."""
    values = answer.get(field) if isinstance(answer, dict) else None
    return [value for value in values or () if isinstance(value, dict)]


def _message(text: str) -> str:
    """Returns the message in the answer of an error, in any server's format."""
    content = _parse_answer(text)
    if isinstance(content, dict):
        content = content.get("error", content.get("message", content.get("detail", text)))
    if isinstance(content, dict):
        content = content.get("message", text)
    return " ".join(str(content).split())[:_MAX_MESSAGE_CHARS]
