"""OpenAI's API: chats and completions, whole or as they are drawn."""

import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lora_jax.training.errors import TrainingError
from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import TOP, Client, DrawnToken, SampleRequest, SampleResult
from train.serve.routes.access import owner_of
from train.serve.routes.errors import HttpError, JsonObject, as_http_error, json_response
from train.serve.routes.openai import fields
from train.serve.routes.openai.answers import (
    AnswerPart,
    ChatForm,
    ChoiceBuilder,
    TextForm,
    echo_prompt,
    join,
    usage_of,
)
from train.serve.routes.openai.chat import ToolCalls, make_calls, prompt_of
from train.serve.routes.openai.models import Models
from train.serve.routes.openai.pending import Events, PendingSamples, unless_gone
from train.serve.routes.openai.table import CHAT, COMPLETIONS, FIELDS, STREAM_OPTIONS
from train.serve.routes.openai.text import ServedTokenizer

_AT_ONCE = 1024  # completions of a request at most
_LENGTH = 16  # tokens of a plain completion that asks for no number, as at OpenAI's


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A request that was read.

    Attributes:
      model: the client's name of it.
      samples: what to draw, a prompt each.
      form: form of the answer.
      make_calls: begins what looks for calls of tools in an answer; None for none.
      echo: whether prompts begin their completions.
      stream: whether the answer comes in parts.
      usage: whether a stream ends with the numbers of tokens.
    """

    model: str
    samples: list[SampleRequest]
    form: ChatForm | TextForm
    make_calls: Callable[[], ToolCalls] | None = None
    echo: bool = False
    stream: bool = False
    usage: bool = False

    @property
    def head(self) -> JsonObject:
        """The fields that all parts of an answer begin with."""
        kind = self.form.part_kind if self.stream else self.form.whole_kind
        name = f"{self.form.prefix}{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.model}


class OpenAI:
    """The routes, over one engine."""

    def __init__(
        self,
        engine: EngineProtocol,
        tokens: ServedTokenizer,
        models: Models,
        sampling: Mapping[str, float] | None = None,
    ) -> None:
        """Serves an engine; `sampling` has the values of requests that give none."""
        self._engine, self._tokens, self._models = engine, tokens, models
        self._sampling = sampling or {}

    def routes(self) -> list[Route]:
        """Returns the routes."""
        return [
            Route(CHAT, self._chat, methods=["POST"]),
            Route(COMPLETIONS, self._complete, methods=["POST"]),
            *self._models.routes(),
        ]

    async def _chat(self, request: Request) -> Response:
        body = await self._read(request, CHAT)
        sample, top = await self._sample(request, body, None), fields.read_top(body)
        tokens = self._tokens.templated(self._models.template(sample.adapter))
        prompt = await run_in_threadpool(prompt_of, body, tokens, self._engine.facts.max_length)
        sample = dataclasses.replace(sample, top=top or 0)
        return await self._answer(
            request,
            CompletionRequest(
                str(body["model"]),
                [fields.add_prompt(sample, prompt, self._engine.facts)],
                ChatForm(self._tokens, top is not None),
                make_calls=make_calls(body, tokens),
                **_streaming(body),
            ),
        )

    async def _complete(self, request: Request) -> Response:
        body, facts = await self._read(request, COMPLETIONS), self._engine.facts
        prompts, echo = fields.read_prompts(body, facts), fields.read_flag(body, "echo")
        sample = await self._sample(request, body, _LENGTH, least=int(not echo))
        top = fields.read_integer(body, "logprobs", 0, TOP)
        if len(prompts) * sample.n > _AT_ONCE:
            raise HttpError(400, f"{_AT_ONCE} completions at once are the most: send fewer prompts")
        if echo and top is not None and body.get("stream"):
            raise fields.field_error(
                "stream", True, "`echo` with `logprobs` comes whole: leave it out"
            )
        scored = echo and top is not None
        sample = dataclasses.replace(
            sample, prompt_logprobs=scored, top_prompt=scored * (top or 0), top=top or 0
        )
        ids = await run_in_threadpool(self._ids, prompts)
        return await self._answer(
            request,
            CompletionRequest(
                str(body["model"]),
                [fields.add_prompt(sample, prompt_ids, facts) for prompt_ids in ids],
                TextForm(self._tokens, top),
                echo=echo,
                **_streaming(body),
            ),
        )

    async def _read(self, request: Request, path: str) -> JsonObject:
        body = await fields.read_body(request)
        fields.check_fields(body, FIELDS[path], path)
        return body

    async def _sample(
        self, request: Request, body: JsonObject, max_tokens: int | None, least: int = 1
    ) -> SampleRequest:
        given = {name: x for name, x in body.items() if x is not None}
        sample = fields.read_sample(
            {**self._sampling, **given}, self._engine.facts, max_tokens=max_tokens, least=least
        )
        owner = owner_of(request)
        adapter = await self._models.find(fields.read_text(body, "model"), owner)
        return dataclasses.replace(sample, adapter=adapter, client=Client(owner))

    def _ids(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        try:
            most = self._engine.facts.max_length
            return [
                self._tokens.ids(prompt, most) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]
        except TrainingError as error:
            raise HttpError(400, str(error), param="prompt") from None

    async def _answer(self, request: Request, wanted: CompletionRequest) -> Response:
        pending = PendingSamples(self._engine, wanted.samples, pieces=wanted.stream)
        try:
            if not wanted.stream:
                drawn = await unless_gone(request, pending.all())
                return json_response(await run_in_threadpool(self._whole, wanted, drawn))
            # An error of the request's comes here.
            first = await unless_gone(request, pending.next())
        except BaseException:
            pending.close()
            raise
        return Events(self._events(wanted, pending, first), pending.close)

    def _whole(self, wanted: CompletionRequest, drawn: Sequence[SampleResult]) -> JsonObject:
        choices: list[JsonObject] = []
        for sample, result in zip(wanted.samples, drawn, strict=True):
            prompt = echo_prompt(self._tokens, sample, result) if wanted.echo else AnswerPart()
            for completion in result.completions:
                part = ChoiceBuilder(self._tokens, sample, wanted.make_calls).end(completion)
                choices.append(wanted.form.whole(len(choices), join(prompt, part)))
        return {**wanted.head, "choices": choices, "usage": usage_of(wanted.samples, drawn)}

    async def _events(
        self,
        wanted: CompletionRequest,
        pending: PendingSamples,
        item: tuple[int, DrawnToken | SampleResult],
    ) -> AsyncIterator[str]:
        """Yields the events of a stream; `item` is the first that came of its samples."""
        head = wanted.head | ({"usage": None} if wanted.usage else {})

        def event(choice: JsonObject) -> str:
            return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

        n, choices, drawn = wanted.samples[0].n, [], []
        for k, sample in enumerate(wanted.samples):
            prompt = echo_prompt(self._tokens, sample, None) if wanted.echo else AnswerPart()
            for i in range(n):
                choices.append(ChoiceBuilder(self._tokens, sample, wanted.make_calls))
                if begun := wanted.form.begin(k * n + i):
                    yield event(begun)
                if prompt.text:
                    yield event(wanted.form.part(k * n + i, prompt))
        try:
            while True:
                k, drawing = item
                if isinstance(drawing, DrawnToken):
                    part = choices[k * n + drawing.index].add(drawing)
                    if part.text or part.calls or part.entries or part.thinking:
                        yield event(wanted.form.part(k * n + drawing.index, part))
                else:
                    drawn.append(drawing)
                    for i, completion in enumerate(drawing.completions):
                        part = choices[k * n + i].end(completion)
                        yield event(wanted.form.part(k * n + i, part))
                if not pending.left:
                    break
                item = await pending.next()
        except Exception as error:
            answer = as_http_error(error)
            yield f"data: {json.dumps(answer.content)}\n\n"
            if answer.status >= 500:
                raise  # for the log
            return
        if wanted.usage:
            usage = usage_of(wanted.samples, drawn)
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def _streaming(body: JsonObject) -> dict[str, bool]:
    """Returns two flags: the answer comes in parts, and it ends with the usage."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise fields.field_error("stream_options", options, "an object is needed")
    fields.check_fields(options, STREAM_OPTIONS, "`stream_options`")
    return {
        "stream": fields.read_flag(body, "stream"),
        "usage": fields.read_flag(options, "include_usage"),
    }
