"""OpenAI's API: chats and completions, whole or as they are drawn."""

import dataclasses
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lora_jax.models.sampling.grammar import GrammarCompiler
from lora_jax.training.errors import TrainingError
from train.serve.protocol.engine import EngineProtocol
from train.serve.protocol.requests import TOP, Client, DrawnToken, SampleRequest, SampleResult
from train.serve.routes.access import owner_of
from train.serve.routes.errors import HttpError, JsonObject, as_http_error, json_response
from train.serve.routes.openai import fields
from train.serve.routes.openai.answers import (
    AnswerPart,
    AnswerStyle,
    ChatForm,
    ChoiceBuilder,
    TextForm,
    counts_of,
    echo_prompt,
    join,
    prompt_entries,
    usage_of,
    with_all_entries,
)
from train.serve.routes.openai.chat import (
    ToolCalls,
    make_calls,
    prompt_of,
    template_of,
    tokenize,
)
from train.serve.routes.openai.limits import add_limits
from train.serve.routes.openai.models import Models
from train.serve.routes.openai.pending import Events, PendingSamples, unless_gone
from train.serve.routes.openai.structured import is_forced, read_grammar
from train.serve.routes.openai.table import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    FIELDS,
    STREAM_OPTIONS,
    TOKENIZE,
)
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
      style: reading of the answers.
      prompt_top: the alternatives told for each token of the prompts, None for no such list.
      echo: whether prompts begin their completions.
      stream: whether the answer comes in parts.
      usage: whether a stream ends with the numbers of tokens.
      running_usage: whether each of its parts has those of its choice so far, as at vLLM's.
      ids: whether the tokens of prompts and answers are told as ids.
    """

    model: str
    samples: list[SampleRequest]
    form: ChatForm | TextForm
    style: AnswerStyle = AnswerStyle()
    prompt_top: int | None = None
    echo: bool = False
    stream: bool = False
    usage: bool = False
    running_usage: bool = False
    ids: bool = False

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
        *,
        trusts_templates: bool = False,
    ) -> None:
        """Serves an engine.

        Args:
          engine: the engine.
          tokens: tokenizer of the model.
          models: finds the adapters.
          sampling: the values of requests that give none.
          trusts_templates: whether requests may bring a chat template.
        """
        self._engine, self._tokens, self._models = engine, tokens, models
        self._sampling, self._trusts_templates = sampling or {}, trusts_templates
        facts = engine.facts
        self.grammars = GrammarCompiler(tokens.tokenizer, facts.vocab_size, facts.eos)

    def routes(self) -> list[Route]:
        """Returns the routes."""
        return [
            Route(CHAT, self._chat, methods=["POST"]),
            Route(COMPLETIONS, self._complete, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            *self._models.routes(),
        ]

    def _templated(self, body: JsonObject, adapter: str | None) -> ServedTokenizer:
        """Returns the tokenizer with a chat's template: the request's, an adapter's or the base's.

        Raises:
          HttpError: the request brings a template, and the server does not take it.
        """
        template = self._models.template(adapter)
        if body.get("chat_template") is not None:
            if not self._trusts_templates:
                raise HttpError(
                    400,
                    "`chat_template` runs as a program, which the server takes from no request: "
                    "leave it out, or start it with --trust-request-chat-template",
                    param="chat_template",
                )
            template = fields.read_text(body, "chat_template")
        return self._tokens.templated(template)

    async def _chat(self, request: Request) -> Response:
        body = await self._read(request, CHAT)
        sample, top = await self._sample(request, body, None), fields.read_top(body)
        tokens, facts = self._templated(body, sample.adapter), self._engine.facts
        room = fields.read_room(body, sample, facts)
        prompt = await run_in_threadpool(
            partial(prompt_of, body, tokens, facts.max_length, cuts=room is not None)
        )
        sample = dataclasses.replace(sample, top=top or 0)
        return await self._answer(
            request,
            CompletionRequest(
                str(body["model"]),
                [fields.add_prompt(sample, prompt, facts, room)],
                ChatForm(self._tokens, top is not None),
                _read_style(body, make_calls(body, tokens)),
                **_read_extras(body),
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
            sample,
            prompt_logprobs=scored or sample.prompt_logprobs,
            top_prompt=max(sample.top_prompt, scored * (top or 0)),
            top=top or 0,
        )
        room = fields.read_room(body, sample, facts)
        ids = await run_in_threadpool(self._ids, prompts, room is not None)
        return await self._answer(
            request,
            CompletionRequest(
                str(body["model"]),
                [fields.add_prompt(sample, prompt_ids, facts, room) for prompt_ids in ids],
                TextForm(self._tokens, top),
                _read_style(body),
                echo=echo,
                **_read_extras(body),
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
        sample = dataclasses.replace(sample, adapter=adapter, client=Client(owner))
        return await run_in_threadpool(self._add_limits, sample, body)

    def _add_limits(self, sample: SampleRequest, body: JsonObject) -> SampleRequest:
        """Returns a sample with all that limits its tokens, and whether its prompt is scored."""
        sample = add_limits(sample, body, self._engine.facts, self._tokens)
        template = ""
        if is_forced(body):
            template = template_of(body, self._templated(body, sample.adapter))
        if (grammar := read_grammar(body, self.grammars, template)) is not None:
            limits = dataclasses.replace(sample.limits, grammar=grammar)
            sample = dataclasses.replace(sample, limits=limits)
        top = fields.read_integer(body, "prompt_logprobs", 0, TOP)
        scored = top is not None
        return dataclasses.replace(sample, prompt_logprobs=scored, top_prompt=top or 0)

    async def _tokenize(self, request: Request) -> Response:
        body = await fields.read_body(request)
        fields.check_fields(body, TOKENIZE, "/tokenize")
        adapter = await self._models.find(fields.read_text(body, "model"), owner_of(request))
        tokens, most = self._templated(body, adapter), self._engine.facts.max_length
        return json_response(await run_in_threadpool(tokenize, body, tokens, most))

    async def _detokenize(self, request: Request) -> Response:
        body = await fields.read_body(request)
        fields.check_fields(body, DETOKENIZE, "/detokenize")
        await self._models.find(fields.read_text(body, "model"), owner_of(request))
        ids = fields.read_ids(body, "tokens", self._engine.facts)
        if ids is None:
            raise fields.field_error("tokens", None, "a list of token ids is needed")
        return json_response({"prompt": await run_in_threadpool(self._tokens.text, ids)})

    def _ids(self, prompts: Sequence[str | list[int]], cuts: bool) -> list[list[int]]:
        try:
            most = self._engine.facts.max_length
            return [
                self._tokens.ids(prompt, most, cuts=cuts) if isinstance(prompt, str) else prompt
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
        of_prompt: JsonObject = {}  # of the last one: a chat has no other
        is_chat = isinstance(wanted.form, ChatForm)
        for sample, result in zip(wanted.samples, drawn, strict=True):
            if (top := wanted.prompt_top) is not None:
                entries = prompt_entries(self._tokens, sample, result, top)
                of_prompt = {"prompt_logprobs": entries}
            if wanted.ids:
                of_prompt = {**of_prompt, "prompt_token_ids": [int(i) for i in sample.prompt]}
            prompt = echo_prompt(self._tokens, sample, result) if wanted.echo else AnswerPart()
            for completion in result.completions:
                part = ChoiceBuilder(self._tokens, sample, wanted.style).end(completion)
                if wanted.ids:
                    part = with_all_entries(part, completion)
                choice = wanted.form.whole(len(choices), join(prompt, part))
                if wanted.ids:
                    choice["token_ids"] = completion.tokens.tolist()
                choices.append(choice if is_chat else choice | of_prompt)
        whole = {**wanted.head, "choices": choices, "usage": usage_of(wanted.samples, drawn)}
        return whole | of_prompt if is_chat else whole

    async def _events(
        self,
        wanted: CompletionRequest,
        pending: PendingSamples,
        item: tuple[int, DrawnToken | SampleResult],
    ) -> AsyncIterator[str]:
        """Yields the events of a stream; `item` is the first that came of its samples."""
        head = wanted.head | ({"usage": None} if wanted.usage else {})

        n, choices, drawn = wanted.samples[0].n, [], []
        lengths = Counter[int]()

        def event(choice: JsonObject) -> str:
            usage, i = {}, choice["index"]
            if wanted.running_usage and isinstance(i, int):
                usage = {"usage": counts_of(wanted.samples[i // n : i // n + 1], lengths[i])}
            return f"data: {json.dumps({**head, **usage, 'choices': [choice]})}\n\n"

        for k, sample in enumerate(wanted.samples):
            prompt = echo_prompt(self._tokens, sample, None) if wanted.echo else AnswerPart()
            for i in range(n):
                choices.append(ChoiceBuilder(self._tokens, sample, wanted.style))
                if begun := wanted.form.begin(k * n + i):
                    yield event(begun)
                if prompt.text:
                    yield event(wanted.form.part(k * n + i, prompt))
        try:
            while True:
                k, drawing = item
                if isinstance(drawing, DrawnToken):
                    lengths[k * n + drawing.index] += 1
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


def _read_style(body: JsonObject, make_calls: Callable[[], ToolCalls] | None = None) -> AnswerStyle:
    """Returns the reading of the answers that a request asks for."""
    shows_special = body.get("skip_special_tokens") is not None
    return AnswerStyle(
        make_calls,
        special=shows_special and not fields.read_flag(body, "skip_special_tokens"),
        keeps_stop=fields.read_flag(body, "include_stop_str_in_output"),
        one_call=body.get("parallel_tool_calls") is not None
        and not fields.read_flag(body, "parallel_tool_calls"),
    )


def _read_extras(body: JsonObject) -> dict[str, Any]:
    """Returns the fields of a `CompletionRequest` that say what else is told, and how."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise fields.field_error("stream_options", options, "an object is needed")
    fields.check_fields(options, STREAM_OPTIONS, "`stream_options`")
    stream, top = fields.read_flag(body, "stream"), body.get("prompt_logprobs")
    ids = fields.read_flag(body, "return_token_ids")
    for name, value in (("prompt_logprobs", top), ("return_token_ids", ids or None)):
        if stream and value is not None:
            raise fields.field_error(name, value, "they come whole: leave out `stream`")
    usage = fields.read_flag(options, "include_usage")
    running = usage and fields.read_flag(options, "continuous_usage_stats")
    told = {"usage": usage, "running_usage": running, "ids": ids}
    return {"stream": stream, "prompt_top": top, **told}
