"""The routes of OpenAI's API: chats and completions, complete or as streams."""

import dataclasses
import json
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
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
    count_usage,
    echo_prompt,
    join,
    make_token_counts,
    prompt_entries,
    with_all_entries,
)
from train.serve.routes.openai.chat import (
    ToolCalls,
    choose_template,
    make_calls,
    tokenize,
    tokenize_chat,
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

_MAX_COMPLETIONS = 1024  # of a request
_DEFAULT_TOKENS = 16  # of a plain completion that asks for no number, as at OpenAI's


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """A request for completions after parsing.

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
        """The fields at the beginning of each part of an answer."""
        kind = self.form.part_kind if self.stream else self.form.whole_kind
        name = f"{self.form.prefix}{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.model}


class OpenAI:
    """The routes of OpenAI's API over one engine."""

    def __init__(
        self,
        engine: EngineProtocol,
        tokens: ServedTokenizer,
        models: Models,
        sampling: Mapping[str, float] | None = None,
        *,
        trusts_templates: bool = False,
    ) -> None:
        """Creates the routes for an engine.

        Args:
          engine: the engine.
          tokens: tokenizer of the model.
          models: finds the adapters.
          sampling: the values of requests that give none.
          trusts_templates: whether requests may bring a chat template.
        """
        self._engine = engine
        self._tokens = tokens
        self._models = models
        self._sampling = sampling or {}
        self._trusts_templates = trusts_templates
        facts = engine.facts
        self.grammars = GrammarCompiler(tokens.tokenizer, facts.vocab_size, facts.eos)

    def routes(self) -> list[Route]:
        """Returns the routes."""
        return [
            Route(CHAT, self._answer_chat, methods=["POST"]),
            Route(COMPLETIONS, self._answer_completion, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            *self._models.routes(),
        ]

    def _tokenizer_with_template(self, body: JsonObject, adapter: str | None) -> ServedTokenizer:
        """Returns the tokenizer with a chat's template: the request's, an adapter's or the base's.

        Raises:
          HttpError: the request brings a template, and the server does not take it.
        """
        template = self._models.template(adapter)
        if body.get("chat_template") is not None:
            if not self._trusts_templates:
                raise HttpError(
                    400,
                    "`chat_template` would run as a program, and the server takes no programs from "
                    "requests. Remove `chat_template`, or start the server with "
                    "--trust-request-chat-template.",
                    param="chat_template",
                )
            template = fields.read_text(body, "chat_template")
        return self._tokens.templated(template)

    async def _answer_chat(self, request: Request) -> Response:
        """Answers a request for a chat completion."""
        body = await self._read_fields(request, CHAT)
        facts = self._engine.facts
        # What to draw, before the prompt is known.
        sample = await self._read_sample(request, body, None)
        n_top = fields.read_top(body)
        tokens = self._tokenizer_with_template(body, sample.adapter)
        max_prompt_tokens = fields.read_max_prompt_tokens(body, sample, facts)
        # Render and tokenize the chat outside of the event loop.
        prompt = await run_in_threadpool(
            partial(
                tokenize_chat, body, tokens, facts.max_length, cuts=max_prompt_tokens is not None
            )
        )
        sample = dataclasses.replace(sample, top=n_top or 0)
        completion_request = CompletionRequest(
            model=str(body["model"]),
            samples=[fields.add_prompt(sample, prompt, facts, max_prompt_tokens)],
            form=ChatForm(self._tokens, n_top is not None),
            style=_read_style(body, make_calls(body, tokens)),
            **_read_extras(body),
        )
        return await self._draw_and_answer(request, completion_request)

    async def _answer_completion(self, request: Request) -> Response:
        """Answers a request for plain completions."""
        body = await self._read_fields(request, COMPLETIONS)
        facts = self._engine.facts
        prompts = fields.read_prompts(body, facts)
        echo = fields.read_flag(body, "echo")
        sample = await self._read_sample(
            request, body, _DEFAULT_TOKENS, min_tokens=0 if echo else 1
        )
        n_top = fields.read_integer(body, "logprobs", 0, TOP)
        if len(prompts) * sample.n > _MAX_COMPLETIONS:
            raise HttpError(
                400,
                f"The request asks for more than {_MAX_COMPLETIONS} completions. Send fewer "
                "prompts, or a smaller `n`.",
            )
        if echo and n_top is not None:
            if body.get("stream"):
                raise fields.field_error(
                    "stream", True, "`echo` with `logprobs` comes whole. Remove `stream`."
                )
            sample = dataclasses.replace(
                sample, prompt_logprobs=True, top_prompt=max(sample.top_prompt, n_top)
            )
        sample = dataclasses.replace(sample, top=n_top or 0)
        max_prompt_tokens = fields.read_max_prompt_tokens(body, sample, facts)
        prompt_ids = await run_in_threadpool(
            self._tokenize_prompts, prompts, max_prompt_tokens is not None
        )
        completion_request = CompletionRequest(
            model=str(body["model"]),
            samples=[
                fields.add_prompt(sample, ids, facts, max_prompt_tokens) for ids in prompt_ids
            ],
            form=TextForm(self._tokens, n_top),
            style=_read_style(body),
            echo=echo,
            **_read_extras(body),
        )
        return await self._draw_and_answer(request, completion_request)

    async def _read_fields(self, request: Request, path: str) -> JsonObject:
        """Returns the fields of a body, and refuses fields that the path does not support."""
        body = await fields.read_body(request)
        fields.check_fields(body, FIELDS[path], path)
        return body

    async def _read_sample(
        self, request: Request, body: JsonObject, max_tokens: int | None, min_tokens: int = 1
    ) -> SampleRequest:
        """Returns the sample that a request asks for, without its prompt; see `read_sample`."""
        body_values = {name: value for name, value in body.items() if value is not None}
        sample = fields.read_sample(
            {**self._sampling, **body_values},
            self._engine.facts,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
        )
        owner = owner_of(request)
        adapter = await self._models.find(fields.read_text(body, "model"), owner)
        sample = dataclasses.replace(sample, adapter=adapter, client=Client(owner))
        return await run_in_threadpool(self._add_limits, sample, body)

    def _add_limits(self, sample: SampleRequest, body: JsonObject) -> SampleRequest:
        """Returns a sample with the request's limits of tokens, and its wish for prompt scores."""
        sample = add_limits(sample, body, self._engine.facts, self._tokens)
        template = ""
        if is_forced(body):
            template = choose_template(body, self._tokenizer_with_template(body, sample.adapter))
        grammar = read_grammar(body, self.grammars, template)
        if grammar is not None:
            limits = dataclasses.replace(sample.limits, grammar=grammar)
            sample = dataclasses.replace(sample, limits=limits)
        n_top = fields.read_integer(body, "prompt_logprobs", 0, TOP)
        return dataclasses.replace(sample, prompt_logprobs=n_top is not None, top_prompt=n_top or 0)

    async def _tokenize(self, request: Request) -> Response:
        """Answers /tokenize with the tokens of a text or a chat."""
        body = await fields.read_body(request)
        fields.check_fields(body, TOKENIZE, "/tokenize")
        adapter = await self._models.find(fields.read_text(body, "model"), owner_of(request))
        tokens = self._tokenizer_with_template(body, adapter)
        max_length = self._engine.facts.max_length
        return json_response(await run_in_threadpool(tokenize, body, tokens, max_length))

    async def _detokenize(self, request: Request) -> Response:
        """Answers /detokenize with the text of tokens."""
        body = await fields.read_body(request)
        fields.check_fields(body, DETOKENIZE, "/detokenize")
        await self._models.find(fields.read_text(body, "model"), owner_of(request))
        ids = fields.read_ids(body, "tokens", self._engine.facts)
        if ids is None:
            raise fields.field_error("tokens", None, "Pass a list of token ids.")
        return json_response({"prompt": await run_in_threadpool(self._tokens.text, ids)})

    def _tokenize_prompts(self, prompts: Sequence[str | list[int]], cuts: bool) -> list[list[int]]:
        """Returns the tokens of prompts, which may lose tokens at their start (`cuts`)."""
        max_length = self._engine.facts.max_length
        prompt_ids: list[list[int]] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                try:
                    prompt_ids.append(self._tokens.ids(prompt, max_length, cuts=cuts))
                except TrainingError as error:
                    raise HttpError(400, str(error), param="prompt") from None
            else:
                prompt_ids.append(prompt)
        return prompt_ids

    async def _draw_and_answer(self, http: Request, request: CompletionRequest) -> Response:
        """Draws the completions of a request, and answers with JSON or a stream."""
        pending = PendingSamples(self._engine, request.samples, streams=request.stream)
        try:
            if not request.stream:
                results = await unless_gone(http, pending.all())
                return json_response(
                    await run_in_threadpool(self._make_whole_answer, request, results)
                )
            # Wait for the first token: a request that fails gets an error and no stream.
            first_item = await unless_gone(http, pending.next())
        except BaseException:
            pending.close()
            raise
        return Events(self._stream_events(request, pending, first_item), pending.close)

    def _make_whole_answer(
        self, request: CompletionRequest, results: Sequence[SampleResult]
    ) -> JsonObject:
        """Returns the JSON of a complete answer."""
        choices: list[JsonObject] = []
        prompt_fields: JsonObject = {}  # of the last one: a chat has no other
        is_chat = isinstance(request.form, ChatForm)
        for sample, result in zip(request.samples, results, strict=True):
            prompt_fields = self._prompt_fields(request, sample, result)
            prompt = AnswerPart()
            if request.echo:
                prompt = echo_prompt(self._tokens, sample, result)
            for completion in result.completions:
                part = ChoiceBuilder(self._tokens, sample, request.style).end(completion)
                if request.ids:
                    part = with_all_entries(part, completion)
                choice = request.form.whole(len(choices), join(prompt, part))
                if request.ids:
                    choice["token_ids"] = completion.tokens.tolist()
                if not is_chat:
                    choice |= prompt_fields
                choices.append(choice)
        usage = count_usage(request.samples, results)
        answer = {**request.head, "choices": choices, "usage": usage}
        return answer | prompt_fields if is_chat else answer

    def _prompt_fields(
        self, request: CompletionRequest, sample: SampleRequest, result: SampleResult
    ) -> JsonObject:
        """Returns the fields about a prompt that a request includes."""
        prompt_fields: JsonObject = {}
        if request.prompt_top is not None:
            prompt_fields["prompt_logprobs"] = prompt_entries(
                self._tokens, sample, result, request.prompt_top
            )
        if request.ids:
            prompt_fields["prompt_token_ids"] = [int(token) for token in sample.prompt]
        return prompt_fields

    def _opening_choices(self, request: CompletionRequest) -> Iterator[tuple[int, JsonObject]]:
        """Yields the indices and choices of a stream's first events, before any token."""
        for i, sample in enumerate(request.samples):
            prompt = AnswerPart()
            if request.echo:
                prompt = echo_prompt(self._tokens, sample, None)
            for index in range(i * sample.n, (i + 1) * sample.n):
                first_choice = request.form.begin(index)
                if first_choice is not None:
                    yield index, first_choice
                if prompt.text:
                    yield index, request.form.part(index, prompt)

    async def _stream_events(
        self,
        request: CompletionRequest,
        pending: PendingSamples,
        item: tuple[int, DrawnToken | SampleResult],
    ) -> AsyncIterator[str]:
        """Yields the events of a stream. `item` is the first token or result of its samples."""
        head = request.head | ({"usage": None} if request.usage else {})
        n_completions = request.samples[0].n  # of each sample
        results: list[SampleResult] = []
        choices = [
            ChoiceBuilder(self._tokens, sample, request.style)
            for sample in request.samples
            for _ in range(n_completions)
        ]
        n_drawn = Counter[int]()  # tokens, by choice

        def event(index: int, choice: JsonObject) -> str:
            content = {**head, "choices": [choice]}
            if request.running_usage:
                sample = request.samples[index // n_completions]
                content["usage"] = make_token_counts([sample], n_drawn[index])
            return _format_event(content)

        # First the roles and the echoed prompts, then what is drawn.
        for index, choice in self._opening_choices(request):
            yield event(index, choice)
        try:
            while True:
                sample_index, output = item
                # A token goes to its choice. A finished sample ends its choices.
                if isinstance(output, DrawnToken):
                    index = sample_index * n_completions + output.index
                    n_drawn[index] += 1
                    part = choices[index].add(output)
                    if part.text or part.calls or part.entries or part.thinking:
                        yield event(index, request.form.part(index, part))
                else:
                    results.append(output)
                    first_index = sample_index * n_completions
                    for index, completion in enumerate(output.completions, start=first_index):
                        part = choices[index].end(completion)
                        yield event(index, request.form.part(index, part))
                if not pending.n_left:
                    break
                item = await pending.next()
        except Exception as error:
            answer = as_http_error(error)
            yield _format_event(answer.content)
            if answer.status >= 500:
                raise  # for the log
            return
        if request.usage:
            usage = count_usage(request.samples, results)
            yield _format_event({**head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def _format_event(content: JsonObject) -> str:
    """Returns a server-sent event that contains JSON."""
    return f"data: {json.dumps(content)}\n\n"


def _read_style(body: JsonObject, make_calls: Callable[[], ToolCalls] | None = None) -> AnswerStyle:
    """Returns the settings for reading answers, from the fields of a body."""
    asks_for_special = body.get("skip_special_tokens") is not None
    asks_for_calls = body.get("parallel_tool_calls") is not None
    return AnswerStyle(
        make_calls=make_calls,
        special=asks_for_special and not fields.read_flag(body, "skip_special_tokens"),
        keeps_stop=fields.read_flag(body, "include_stop_str_in_output"),
        one_call=asks_for_calls and not fields.read_flag(body, "parallel_tool_calls"),
    )


def _read_extras(body: JsonObject) -> dict[str, Any]:
    """Returns the fields of a `CompletionRequest` about streaming, usage and token ids."""
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise fields.field_error("stream_options", options, "Pass an object.")
    fields.check_fields(options, STREAM_OPTIONS, "`stream_options`")
    stream = fields.read_flag(body, "stream")
    prompt_top = body.get("prompt_logprobs")
    ids = fields.read_flag(body, "return_token_ids")
    for name, value in (("prompt_logprobs", prompt_top), ("return_token_ids", ids or None)):
        if stream and value is not None:
            raise fields.field_error(name, value, "They come whole. Remove `stream`.")
    usage = fields.read_flag(options, "include_usage")
    return {
        "stream": stream,
        "prompt_top": prompt_top,
        "usage": usage,
        "running_usage": usage and fields.read_flag(options, "continuous_usage_stats"),
        "ids": ids,
    }
