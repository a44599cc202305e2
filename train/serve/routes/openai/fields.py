"""The fields of a request for completions, read as a `SampleRequest` without its prompt."""

import dataclasses
import json
from collections.abc import Mapping

from starlette.requests import Request

from lora_jax.training.data.rows import check_text
from lora_jax.training.data.turns import shown
from lora_jax.training.errors import TrainingError
from train.serve.protocol.engine import EngineFacts
from train.serve.protocol.requests import TOP, SampleRequest
from train.serve.routes.errors import HttpError, JsonObject
from train.serve.routes.openai.table import Field, nearest

_MOST = 128  # completions of a prompt
_STOPS = 16
_SEEDS = 2**63


async def read_body(request: Request) -> JsonObject:
    """Returns the JSON object of a body; raises HttpError where there is none."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HttpError(400, "the body is no JSON: send an object of fields") from None
    if not isinstance(body, dict):
        raise HttpError(400, f"the body is {shown(body)}: send an object of fields")
    return body


def field_error(name: str, value: object, needed: str) -> HttpError:
    """Returns the refusal of a field."""
    return HttpError(400, f"`{name}` is {shown(value)}: {needed}", param=name)


def read_text(body: Mapping[str, object], name: str) -> str:
    """Returns a field that has to be a text."""
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise field_error(name, value, "a text is needed")
    return value


def read_flag(body: Mapping[str, object], name: str) -> bool:
    """Returns a field that is true or false; false without it."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise field_error(name, value, "true or false is needed")
    return bool(value)


def read_integer(body: Mapping[str, object], name: str, least: int, most: int) -> int | None:
    """Returns a field that is a whole number of a range, or None."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise field_error(name, value, f"a whole number from {least} to {most} is needed")
    return value


def read_number(
    body: Mapping[str, object], name: str, default: float, most: float, least: float = 0.0
) -> float:
    """Returns a field that is a number of a range, by default from 0 on."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise field_error(name, value, f"a number from {least:g} to {most:g} is needed")
    return float(value)


def check_fields(body: Mapping[str, object], fields: Mapping[str, Field], of: str) -> None:
    """Raises HttpError for a field that is unknown, or that would change the answer and cannot.

    Args:
      body: the fields that were sent.
      fields: the known fields, of `table`.
      of: the name of what was sent, for the message.
    """
    for name, value in body.items():
        field = fields.get(name)
        if field is None:
            raise _unknown(name, fields, of)
        if value is not None and field.values is not None and value not in field.values:
            raise field_error(name, value, f"this is not supported; {field.instead}")


def _unknown(name: str, fields: Mapping[str, Field], of: str) -> HttpError:
    like = nearest(name, fields)
    works = ", ".join(known for known, field in fields.items() if field.kind == "works")
    instead = f"did you mean `{like}`?" if like else f"leave it out; there are {works}"
    problem = f"{shown(name)} is no field of {of}: {instead}"
    return HttpError(400, problem, param=name[:100], code="unknown_parameter")


def read_sample(
    body: Mapping[str, object], facts: EngineFacts, *, max_tokens: int | None, least: int
) -> SampleRequest:
    """Returns the sample that a request asks for, of the base and with an empty prompt.

    Args:
      body: the fields that chats and plain completions share; see `check_fields`.
      facts: the engine's.
      max_tokens: default of the number of tokens.
      least: smallest number of tokens; 0 where the prompt itself is scored.

    Raises:
      HttpError: a field is wrong.
    """
    longest = [
        read_integer(body, x, least, 1 << 30) for x in ("max_completion_tokens", "max_tokens")
    ]
    given = next((x for x in longest if x is not None), max_tokens)
    n = read_integer(body, "n", 1, _MOST) or 1
    if (best := read_integer(body, "best_of", 1, _MOST)) not in (None, n):
        raise field_error(
            "best_of", best, "completions are not compared here; give the value of `n`"
        )
    top_p = read_number(body, "top_p", 1.0, 1.0)
    if top_p == 0:
        raise field_error("top_p", 0, "a number above 0 is needed; `temperature` 0 is greedy")
    seed = read_integer(body, "seed", -_SEEDS, _SEEDS)
    ends = set() if read_flag(body, "ignore_eos") else set(facts.eos)
    return SampleRequest(
        adapter=None,
        prompt=(),
        n=n,
        max_tokens=given,
        temperature=read_number(body, "temperature", 1.0, 2.0),
        top_k=read_integer(body, "top_k", -1, facts.vocab_size) or -1,
        top_p=top_p,
        seed=None if seed is None else seed % 2**32,
        stop_ids=frozenset(ends | {*(read_ids(body, "stop_token_ids", facts) or [])}),
        stop=_stops(body.get("stop")),
    )


def read_room(body: Mapping[str, object], sample: SampleRequest, facts: EngineFacts) -> int | None:
    """Returns the number of last tokens that are left of a longer prompt; None for all."""
    room = read_integer(body, "truncate_prompt_tokens", -1, facts.max_length)
    if room == 0:
        raise field_error("truncate_prompt_tokens", 0, "1 or more, or -1 for what fits, is needed")
    fits = facts.max_length - (1 if sample.max_tokens is None else sample.max_tokens)
    return max(1, fits) if room == -1 else room


def add_prompt(
    sample: SampleRequest, prompt: list[int], facts: EngineFacts, room: int | None
) -> SampleRequest:
    """Returns a sample of a prompt; raises HttpError if the two are too long, or it is empty.

    Args:
      sample: the sample.
      prompt: its tokens.
      facts: the engine's.
      room: the number of last tokens that are left of a longer prompt; see `read_room`.
    """
    prompt = prompt if room is None else prompt[-room:]
    if not prompt:
        raise HttpError(400, "the prompt has no token: give a text", param="prompt")
    if (n := len(prompt)) + (
        sample.max_tokens or int(sample.max_tokens is None)
    ) > facts.max_length:
        more = "" if sample.max_tokens is None else f" and {sample.max_tokens:,} are to be drawn"
        raise HttpError(
            400,
            f"the prompt has {n:,} tokens{more}; the model is served with {facts.max_length:,} at "
            "most for both: give a shorter prompt, or a smaller `max_tokens`",
            param="max_tokens" if n < facts.max_length else "prompt",
            code="context_length_exceeded",
        )
    return dataclasses.replace(sample, prompt=prompt)


def read_prompts(body: Mapping[str, object], facts: EngineFacts) -> list[str | list[int]]:
    """Returns the prompts of `prompt`: a text or token ids, or a list of such."""
    given = body.get("prompt")
    if isinstance(given, str):
        return [given]
    needed = "a text, a list of token ids, or a list of such is needed"
    if not isinstance(given, list) or not given:
        raise field_error("prompt", given, needed)
    if all(isinstance(prompt, int) for prompt in given):
        return [_ids(given, "prompt", facts)]
    for prompt in given:
        if not isinstance(prompt, str | list):
            raise field_error("prompt", given, needed)
    return [
        prompt if isinstance(prompt, str) else _ids(prompt, "prompt", facts) for prompt in given
    ]


def read_top(body: Mapping[str, object]) -> int | None:
    """Returns the alternatives that a chat wants for each token; None for no log-probabilities."""
    top = read_integer(body, "top_logprobs", 0, TOP)
    if read_flag(body, "logprobs"):
        return top or 0
    if top is not None:
        raise field_error("top_logprobs", top, "set `logprobs` to true, too")
    return None


def read_ids(body: Mapping[str, object], name: str, facts: EngineFacts) -> list[int] | None:
    """Returns a field that is a list of tokens, or None."""
    given = body.get(name)
    return None if given is None else _ids(given, name, facts)


def _ids(given: object, name: str, facts: EngineFacts) -> list[int]:
    if not isinstance(given, list):
        raise field_error(name, given, "a list of token ids is needed")
    for token in given:
        if (
            isinstance(token, bool)
            or not isinstance(token, int)
            or not 0 <= token < facts.vocab_size
        ):
            raise field_error(name, token, f"ids from 0 to {facts.vocab_size - 1} are needed")
    return given


def _stops(given: object) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given or []
    if not isinstance(stops, list) or len(stops) > _STOPS:
        raise field_error("stop", given, f"a text, or a list of {_STOPS} at most, is needed")
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise field_error("stop", stop, "texts that are not empty are needed")
    try:
        check_text("".join(stops), "`stop`")
    except TrainingError as error:
        raise HttpError(400, str(error), param="stop") from None
    return tuple(stops)
