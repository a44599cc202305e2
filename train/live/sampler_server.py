"""Speaks to an OpenAI-compatible server that loads adapters: vLLM, SGLang, or `train.serve`."""

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
_LATER = (408, 425, 429, 500, 502, 503, 504)
_PAUSES = (0.2, 8.0)  # seconds between two attempts, at first and at most
_LOOK = 1.0  # seconds to wait for a connection in `SamplerServer.probe`
_CONNECT = 10.0  # seconds to connect
_SHOWN = 300  # characters of a server's answer in a message


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


class _Refused(Exception):
    """The server's answer is an error; `status` is that of HTTP."""

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
        needed = UserError(f"--sampler {url}: an address such as http://127.0.0.1:8000 is needed")
        parts = urllib.parse.urlsplit(self.url)
        try:
            self._port = parts.port
        except ValueError:
            raise needed from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise needed
        self._parts, self.seconds = parts, seconds
        self._closed = threading.Event()
        self._open: set[http.client.HTTPConnection] = set()
        self._prefix: str | None = None  # of the routes that load adapters, once it is known
        self._base: str | None = None

    def probe(self) -> list[str]:
        """Returns the names of its models; a server that is not there is an error at once."""
        try:
            answer = self._ask("GET", "/v1/models", None, patience=_LOOK)
        except _Refused as error:
            raise self._error(f"/v1/models answers {error.status}: {error}") from None
        data = answer.get("data") if isinstance(answer, dict) else None
        names = [str(model.get("id")) for model in data or () if isinstance(model, dict)]
        if not names:
            raise self._error("/v1/models lists no model: is it a server of OpenAI's API?")
        self._base = names[0]
        return names

    def check_loads(self) -> None:
        """Raises a UserError if no adapter can be loaded."""
        try:
            self._adapters("load", {})
        except _Refused as error:
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
            except _Refused as error:
                if error.status != 400 or "already" not in str(error):
                    raise
                self.unload(name)  # of an attempt whose answer was lost
                self._adapters("load", body)
        except _Refused as error:
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
        except _Refused as error:
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
        except _Refused as error:
            if error.status == 404:
                return None
            raise self._error(f"it refuses to draw ({error.status}: {error})") from None
        return self._read(answer, prompt, options)

    def close(self) -> None:
        """Ends all requests."""
        self._closed.set()
        for connection in [*self._open]:
            if (sock := connection.sock) is not None:
                try:
                    sock.shutdown(2)
                except OSError:
                    pass  # it has ended

    def _read(
        self, answer: Any, prompt: Sequence[int], options: SamplingOptions
    ) -> list[DrawnCompletion]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        choices = [choice for choice in choices or () if isinstance(choice, dict)]
        if len(choices) != options.n:
            raise self._error(
                f"it returns {len(choices)} completions of a prompt, and {options.n} were asked "
                "for (`n`): each prompt needs --group of them"
            )
        return [self._completion(choice, prompt, options) for choice in choices]

    def _completion(
        self, choice: Mapping[str, Any], prompt: Sequence[int], options: SamplingOptions
    ) -> DrawnCompletion:
        shown = choice.get("prompt_token_ids")
        if shown is not None and shown != [*prompt]:
            n = len(shown) if isinstance(shown, list) else 0
            raise self._error(
                f"it draws after a prompt of {n} tokens where it was given {len(prompt)} "
                "ids: it has to take prompts as they are"
            )
        ids = choice.get("token_ids", choice.get("response_token_ids"))
        if not isinstance(ids, list) or not ids or not all(isinstance(x, int) for x in ids):
            raise self._error(
                "it returns no ids of the tokens that it draws (`return_token_ids`), without "
                "which other tokens might train than were drawn: vLLM has them from 0.10.2 on, "
                "and `lora-jax serve` has them"
            )
        told = choice.get("logprobs")
        logps = told.get("token_logprobs") if isinstance(told, dict) else None
        logps = logps if isinstance(logps, list) else []
        numbers = [x for x in logps if isinstance(x, int | float) and -1e4 < x < 1e-3]
        if not len(numbers) == len(logps) == len(ids):
            n = len(logps)
            raise self._error(
                f"it returns log-probabilities of {n} tokens where it drew {len(ids)}: "
                "`logprobs` of each token are needed"
            )
        if len(ids) > options.max_tokens:
            raise self._error(
                f"it drew {len(ids)} tokens, more than --max-new-tokens {options.max_tokens}"
            )
        return DrawnCompletion(
            [*ids], [float(x) for x in logps], choice.get("finish_reason") == "stop"
        )

    def _adapters(self, verb: str, body: Mapping[str, Any]) -> None:
        """Posts to the routes of adapters, which SGLang has elsewhere."""
        prefixes = ("/v1", "") if self._prefix is None else (self._prefix,)
        for prefix in prefixes:
            try:
                self._ask("POST", f"{prefix}/{verb}_lora_adapter", body)
            except _Refused as error:
                is_there = error.status not in (404, 405) or self._prefix is not None
                if is_there:
                    self._prefix = prefix
                if is_there or prefix == prefixes[-1]:
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
          _Refused: the server says no.
        """
        began, pause, problem = time.monotonic(), _PAUSES[0], ""
        while not self._closed.is_set():
            left, wait = self.seconds - (time.monotonic() - began), pause
            if left <= 0:
                break
            try:
                status, text, after = self._once(method, path, body, left)
            except (OSError, http.client.HTTPException) as error:
                if not (problem and isinstance(error, TimeoutError)):  # what it last said says more
                    problem = f"cannot be reached ({str(error) or type(error).__name__})"
                if patience is not None and time.monotonic() - began > patience:
                    raise self._error(
                        f"{problem}: is the server up, and is this its address?"
                    ) from None
            else:
                if status < 300:
                    return _parsed(text)
                if status in (401, 403):
                    raise self._error(
                        f"it refuses the request ({status}: {_message(text)}); its key is taken "
                        f"from the environment, {KEY}"
                    )
                if status not in _LATER or (status == 500 and problem.startswith("answers 500")):
                    raise _Refused(status, _message(text))
                problem, wait = f"answers {status} ({_message(text)})", max(pause, after)
            self._closed.wait(min(wait, max(left, 0)))
            pause = min(2 * pause, _PAUSES[1])
        if self._closed.is_set():
            raise self._error("the run has ended")
        raise self._error(
            f"{path} {problem or 'gives no answer'}, for --sampler-timeout {self.seconds:g} s; "
            "start it again, or give it more time"
        )

    def _once(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float
    ) -> tuple[int, str, float]:
        """Returns status, text and `Retry-After` of one answer."""
        kind = http.client.HTTPSConnection
        if self._parts.scheme == "http":
            kind = http.client.HTTPConnection  # type: ignore[assignment]
        connection = kind(self._parts.hostname or "", self._port, timeout=min(seconds, _CONNECT))
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        sent = None if body is None else json.dumps(body).encode()
        self._open.add(connection)
        try:
            connection.connect()
            if self._closed.is_set():  # while there was no socket for `close` to shut down
                raise OSError("the run has ended")
            connection.sock.settimeout(seconds)
            connection.request(method, self._parts.path + path, sent, headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
            after = answer.headers.get("Retry-After", "")
            return answer.status, text, float(after) if after.isdigit() else 0.0
        finally:
            self._open.discard(connection)
            connection.close()

    def _error(self, problem: str) -> UserError:
        return UserError(f"--sampler {self.url}: {problem}")


def _parsed(text: str) -> Any:
    """Returns an answer's JSON, or the text that it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _message(text: str) -> str:
    """Returns the message of an error's answer, whoever's form it has."""
    content = _parsed(text)
    if isinstance(content, dict):
        content = content.get("error", content.get("message", content.get("detail", text)))
    if isinstance(content, dict):
        content = content.get("message", text)
    return " ".join(str(content).split())[:_SHOWN]
