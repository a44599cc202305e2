"""Speaks to an OpenAI-compatible server that loads adapters: vLLM, SGLang, or `train.serve`."""

import contextlib
import http.client
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from train.console.errors import UserError

KEY = "LORA_JAX_SAMPLER_KEY"  # the environment variable of a server's key
_TRANSIENT_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_PAUSES = (0.2, 8.0)  # seconds between two attempts, at first and at most
_LOOK = 1.0  # seconds to wait for a connection in `SamplerServer.probe`
_CONNECT_SECONDS = 10.0  # seconds to connect
_MAX_MESSAGE_CHARS = 300  # characters of a server's answer in a message


class SamplingOptions(NamedTuple):
    """Options of draws, the same for all requests of a run.

    Attributes:
      n: completions of a prompt.
      max_tokens: tokens of each at most.
      temperature, top_p, top_k: limits of the draws, as `lora_jax.models.sample` has them.
      stop: texts that end a completion.
      ends: tokens that do.
    """

    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int | None
    stop: Sequence[str]
    ends: Sequence[int]

    def body(self) -> dict[str, Any]:
        """Returns the fields of a request; each default of a server's own is overridden."""
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
    """A completion: its tokens, their log-probabilities, and whether it came to an end."""

    ids: list[int]
    logps: list[float]
    ended: bool


class _HttpError(Exception):
    """An answer that is an error; `status` is that of HTTP."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class SamplerServer:
    """A server at an address; its methods are called in any thread.

    They raise a UserError that names --sampler for whatever goes wrong.
    """

    def __init__(self, url: str, seconds: float) -> None:
        """Takes the address, as --sampler has it, and the seconds that a request may take."""
        self.url = url.rstrip("/").removesuffix("/v1")
        invalid_url = UserError(
            f"--sampler {url}: an address such as http://127.0.0.1:8000 is needed"
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
        self._prefix: str | None = None  # of the routes that load adapters, once it is known
        self._base: str | None = None

    def probe(self) -> list[str]:
        """Returns the names of its models; a server that is not there is an error at once."""
        try:
            answer = self._ask("GET", "/v1/models", None, patience=_LOOK)
        except _HttpError as error:
            raise self._error(f"/v1/models answers {error.status}: {error}") from None
        names = [str(model.get("id")) for model in _objects(answer, "data")]
        if not names:
            raise self._error("/v1/models lists no model: is it a server of OpenAI's API?")
        self._base = names[0]
        return names

    def check_loads(self) -> None:
        """Raises a UserError if no adapter can be loaded."""
        try:
            self._adapters("load", {})
        except _HttpError as error:
            if error.status in (404, 405):
                raise self._error(
                    "it loads no adapters (/v1/load_lora_adapter is not there): start vLLM with "
                    "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, "
                    "SGLang with --enable-lora, or `lora-jax serve`"
                ) from None

    def load(self, name: str, path: str) -> None:
        """Loads an adapter from a folder, in the place of one that has the name already."""
        body = {"lora_name": name, "lora_path": path}
        try:
            try:
                self._adapters("load", body)
            except _HttpError as error:
                has_name_already = error.status == 400 and "already" in str(error)
                if not has_name_already:
                    raise
                self.unload(name)  # of an attempt whose answer was lost
                self._adapters("load", body)
        except _HttpError as error:
            raise self._error(
                f"it does not load the adapter in {path} ({error.status}: {error}). It has to "
                "read that folder: --sampler-folder names one that both see, --sampler-mount its "
                "place on the server's machine; and it has to hold adapters of this rank and "
                "these targets (vLLM: --max-lora-rank, --max-loras)"
            ) from None

    def unload(self, name: str) -> None:
        """Unloads an adapter; one that is gone already is no error."""
        try:
            self._adapters("unload", {"lora_name": name})
        except _HttpError as error:
            if error.status not in (400, 404):
                raise self._error(f"it does not unload {name} ({error})") from None

    def model_of(self, name: str) -> str:
        """Returns the `model` of requests to a loaded adapter."""
        return f"{self._base}:{name}" if self._prefix == "" else name  # "" is SGLang's

    def complete(
        self, model: str, prompt: Sequence[int], options: SamplingOptions, seed: int
    ) -> list[DrawnCompletion] | None:
        """Returns completions of a prompt; None if the server has no such model (any more)."""
        body = {"model": model, "prompt": [*prompt], "seed": seed, **options.body()}
        try:
            answer = self._ask("POST", "/v1/completions", body)
        except _HttpError as error:
            if error.status == 404:
                return None
            raise self._error(f"it refuses to draw ({error.status}: {error})") from None
        return self._read(answer, prompt, options)

    def close(self) -> None:
        """Ends all requests."""
        self._closed.set()
        for connection in [*self._connections]:
            if connection.sock is not None:
                with contextlib.suppress(OSError):  # it has ended
                    connection.sock.shutdown(2)

    def _read(
        self, answer: Any, prompt: Sequence[int], options: SamplingOptions
    ) -> list[DrawnCompletion]:
        """Returns the completions of an answer, which must be as many as were asked for."""
        choices = _objects(answer, "choices")
        if len(choices) != options.n:
            raise self._error(
                f"it returns {len(choices)} completions of a prompt, and {options.n} were asked "
                "for (`n`): each prompt needs --group of them"
            )
        return [self._completion(choice, prompt, options) for choice in choices]

    def _completion(
        self, choice: Mapping[str, Any], prompt: Sequence[int], options: SamplingOptions
    ) -> DrawnCompletion:
        """Returns a completion of an answer, which must have all that training needs."""
        self._check_prompt(choice.get("prompt_token_ids"), prompt)
        ids = choice.get("token_ids", choice.get("response_token_ids"))
        if not isinstance(ids, list) or not ids or not all(isinstance(x, int) for x in ids):
            raise self._error(
                "it returns no ids of the tokens that it draws (`return_token_ids`), without "
                "which other tokens might train than were drawn: vLLM has them from 0.10.2 on, "
                "and `lora-jax serve` has them"
            )
        logps = self._token_logps(choice.get("logprobs"), len(ids))
        if len(ids) > options.max_tokens:
            raise self._error(
                f"it drew {len(ids)} tokens, more than --max-new-tokens {options.max_tokens}"
            )
        has_ended = choice.get("finish_reason") == "stop"
        return DrawnCompletion([*ids], logps, has_ended)

    def _check_prompt(self, prompt_ids: Any, prompt: Sequence[int]) -> None:
        """Raises a UserError if the answer says that another prompt was completed."""
        if prompt_ids is None or prompt_ids == [*prompt]:
            return
        n_tokens = len(prompt_ids) if isinstance(prompt_ids, list) else 0
        raise self._error(
            f"it draws after a prompt of {n_tokens} tokens where it was given {len(prompt)} "
            "ids: it has to take prompts as they are"
        )

    def _token_logps(self, logprobs: Any, n_tokens: int) -> list[float]:
        """Returns the log-probabilities of tokens from an answer's field; each token has one."""
        logps = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        if not isinstance(logps, list):
            logps = []
        are_valid = all(isinstance(x, int | float) and -1e4 < x < 1e-3 for x in logps)
        if not are_valid or len(logps) != n_tokens:
            raise self._error(
                f"it returns log-probabilities of {len(logps)} tokens where it drew {n_tokens}: "
                "`logprobs` of each token are needed"
            )
        return [float(x) for x in logps]

    def _adapters(self, verb: str, body: Mapping[str, Any]) -> None:
        """Posts to the routes of adapters, which SGLang has elsewhere."""
        prefixes = ("/v1", "") if self._prefix is None else (self._prefix,)
        for prefix in prefixes:
            try:
                self._ask("POST", f"{prefix}/{verb}_lora_adapter", body)
            except _HttpError as error:
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
        """Returns an answer, asking again while the server is busy, or cannot be reached.

        Args:
          method, path, body: the request.
          patience: seconds for an unreachable server; by default as for a busy one.

        Raises:
          _HttpError: the server says no.
        """
        start_time = time.monotonic()
        pause = _PAUSES[0]
        problem = ""  # of the last attempt
        while not self._closed.is_set():
            seconds_left = self.seconds - (time.monotonic() - start_time)
            if seconds_left <= 0:
                break
            retry_after = 0.0
            try:
                status, text, retry_after = self._once(method, path, body, seconds_left)
            except (OSError, http.client.HTTPException) as error:
                is_timeout = isinstance(error, TimeoutError)
                if not (problem and is_timeout):  # the problem of an earlier attempt says more
                    problem = f"cannot be reached ({str(error) or type(error).__name__})"
                if patience is not None and time.monotonic() - start_time > patience:
                    raise self._error(
                        f"{problem}: is the server up, and is this its address?"
                    ) from None
            else:
                if status < 300:
                    return _parsed(text)
                self._check_retry(status, text, problem)
                problem = f"answers {status} ({_message(text)})"
            self._closed.wait(min(max(pause, retry_after), max(seconds_left, 0)))
            pause = min(2 * pause, _PAUSES[1])
        if self._closed.is_set():
            raise self._error("the run has ended")
        raise self._error(
            f"{path} {problem or 'gives no answer'}, for --sampler-timeout {self.seconds:g} s; "
            "start it again, or give it more time"
        )

    def _check_retry(self, status: int, text: str, problem: str) -> None:
        """Raises the error of an answer after which the request is not sent again.

        Args:
          status, text: the answer.
          problem: the problem of the attempt before; "" for none.
        """
        if status in (401, 403):
            raise self._error(
                f"it refuses the request ({status}: {_message(text)}); its key is taken "
                f"from the environment, {KEY}"
            )
        is_second_500 = status == 500 and problem.startswith("answers 500")
        if status not in _TRANSIENT_STATUSES or is_second_500:
            raise _HttpError(status, _message(text))

    def _once(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float
    ) -> tuple[int, str, float]:
        """Returns status, text and `Retry-After` of one answer."""
        connection = self._connection(min(seconds, _CONNECT_SECONDS))
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(KEY)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        self._connections.add(connection)
        try:
            connection.connect()
            if self._closed.is_set():  # while there was no socket for `close` to shut down
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

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        """Returns a connection to the address, which is not open yet."""
        host = self._address.hostname or ""
        if self._address.scheme == "http":
            return http.client.HTTPConnection(host, self._port, timeout=timeout)
        return http.client.HTTPSConnection(host, self._port, timeout=timeout)

    def _error(self, problem: str) -> UserError:
        return UserError(f"--sampler {self.url}: {problem}")


def _parsed(text: str) -> Any:
    """Returns an answer's JSON, or the text that it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _objects(answer: Any, field: str) -> list[dict[str, Any]]:
    """Returns the JSON objects in a list of an answer; [] where it has none."""
    values = answer.get(field) if isinstance(answer, dict) else None
    return [value for value in values or () if isinstance(value, dict)]


def _message(text: str) -> str:
    """Returns the message of an error's answer, whoever's form it has."""
    content = _parsed(text)
    if isinstance(content, dict):
        content = content.get("error", content.get("message", content.get("detail", text)))
    if isinstance(content, dict):
        content = content.get("message", text)
    return " ".join(str(content).split())[:_MAX_MESSAGE_CHARS]
