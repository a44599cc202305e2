"""Answers of OpenAI's forms: choices that grow, and their JSON."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from train.serve.protocol.requests import Completion, DrawnToken, SampleRequest, SampleResult
from train.serve.routes.errors import JsonObject
from train.serve.routes.openai.chat import ToolCalls
from train.serve.routes.openai.text import (
    CompletionText,
    ServedTokenizer,
    TokenEntry,
    finite,
    listed,
)


@dataclasses.dataclass
class AnswerPart:
    """A part of an answer.

    Attributes:
      text: the text.
      calls: the calls of tools.
      entries: the tokens whose text it is.
      finish: why the answer ended; None while it goes on.
      thinking: what is thought, of models that have a channel for it.
    """

    text: str = ""
    calls: list[JsonObject] = dataclasses.field(default_factory=list)
    entries: list[TokenEntry] = dataclasses.field(default_factory=list)
    finish: str | None = None
    thinking: str = ""


@dataclasses.dataclass(frozen=True)
class AnswerStyle:
    """The reading of completions.

    Attributes:
      make_calls: begins what looks for calls of tools in an answer; None for none.
      special: whether special tokens are shown.
      keeps_stop: whether the stop that ended an answer is shown.
      one_call: whether calls after the first are left out.
    """

    make_calls: Callable[[], ToolCalls] | None = None
    special: bool = False
    keeps_stop: bool = False
    one_call: bool = False


class ChoiceBuilder:
    """A completion of a request, while it grows."""

    def __init__(
        self,
        tokens: ServedTokenizer,
        sample: SampleRequest,
        style: AnswerStyle,
    ) -> None:
        """Begins a completion."""
        self._text = CompletionText(
            *(tokens, sample.stop),
            special=style.special or style.make_calls is not None,
            keeps_stop=style.keeps_stop,
            least=sample.limits.min_tokens,
        )
        self._calls, self._style = style.make_calls and style.make_calls(), style
        self._ends, self._n = sample.stop_ids, 0

    def add(self, piece: DrawnToken) -> AnswerPart:
        """Takes a token."""
        self._n += 1
        if piece.token in self._ends and not self._style.keeps_stop:  # no text
            return AnswerPart()
        return self._make_part(*self._text.add(piece.token, piece.logprob, listed(piece.top)))

    def end(self, completion: Completion) -> AnswerPart:
        """Takes the tokens that did not come yet, and what was held back."""
        parts = [self.add(piece) for piece in _pieces(completion, self._n)]
        parts.append(self._make_part(*self._text.end(), last=True))
        stopped = completion.stopped or self._text.stopped
        finish = "tool_calls" if self._calls is not None and self._calls.n else "stop"
        return AnswerPart(
            "".join(part.text for part in parts),
            [call for part in parts for call in part.calls],
            [entry for part in parts for entry in part.entries],
            finish if stopped else "length",
            "".join(part.thinking for part in parts),
        )

    def _make_part(self, text: str, entries: list[TokenEntry], *, last: bool = False) -> AnswerPart:
        if self._calls is None:
            return AnswerPart(text, [], entries)
        before = self._calls.n
        said, calls, thinking = self._calls.add(text, last=last)
        if self._style.one_call:
            calls = calls[: int(before == 0)]
        return AnswerPart(said, calls, entries, thinking=thinking)


def _pieces(completion: Completion, first: int) -> Iterable[DrawnToken]:
    top = completion.top
    for i in range(first, len(completion.tokens)):
        likely = None if top is None else (top.ids[i], top.logprobs[i])
        yield DrawnToken(0, int(completion.tokens[i]), finite(completion.logprobs[i]), likely)


def with_all_entries(part: AnswerPart, completion: Completion) -> AnswerPart:
    """Returns a whole answer with an entry for each token, also for those that ended it."""
    end = len(part.text)
    rest = [
        TokenEntry(piece.token, piece.logprob, listed(piece.top), end)
        for piece in _pieces(completion, len(part.entries))
    ]
    return dataclasses.replace(part, entries=[*part.entries, *rest])


def echo_prompt(
    tokens: ServedTokenizer, sample: SampleRequest, drawn: SampleResult | None
) -> AnswerPart:
    """Returns a prompt as the beginning of its completion, with entries if they were asked for."""
    text, parts = CompletionText(tokens), AnswerPart()
    logprobs = None if drawn is None else drawn.prompt_logprobs
    top = None if drawn is None else drawn.top_prompt
    for i, token in enumerate(sample.prompt):
        known = logprobs is not None and i > 0 and not np.isnan(logprobs[i])
        likely = None
        if known and top is not None:
            likely = listed((top.ids[i][: sample.top], top.logprobs[i][: sample.top]))
        shown = text.add(
            token, finite(logprobs[i]) if known and logprobs is not None else None, likely
        )
        parts.text, parts.entries = parts.text + shown[0], parts.entries + shown[1]
    shown = text.end()
    return AnswerPart(parts.text + shown[0], [], parts.entries + shown[1])


def prompt_entries(
    tokens: ServedTokenizer, sample: SampleRequest, drawn: SampleResult, top: int
) -> list[JsonObject | None]:
    """Returns vLLM's `prompt_logprobs`: each token of a prompt and its alternatives, by id.

    A token that is not among the likeliest has no rank that is known.
    """
    assert drawn.prompt_logprobs is not None
    places: list[JsonObject | None] = [None]  # the first token has no probability
    for i, token in enumerate(sample.prompt[1:], start=1):
        likely: list[tuple[int, float]] = []
        if drawn.top_prompt is not None:
            ids, logprobs = drawn.top_prompt.ids[i][:top], drawn.top_prompt.logprobs[i][:top]
            likely = listed((ids, logprobs)) or []
        ranks = {other: rank for rank, (other, _) in enumerate(likely, start=1)}
        own = (token, finite(drawn.prompt_logprobs[i]))
        places.append(
            {
                str(other): {
                    "logprob": logprob,
                    "rank": ranks.get(other),
                    "decoded_token": tokens.of(other).decode(errors="replace"),
                }
                for other, logprob in {own[0]: own[1], **dict(likely)}.items()
            }
        )
    return places


def join(first: AnswerPart, then: AnswerPart) -> AnswerPart:
    """Returns a completion with its prompt before it."""
    moved = [
        dataclasses.replace(entry, start=entry.start + len(first.text)) for entry in then.entries
    ]
    return dataclasses.replace(then, text=first.text + then.text, entries=first.entries + moved)


def usage_of(samples: Sequence[SampleRequest], drawn: Iterable[SampleResult]) -> JsonObject:
    """Returns the numbers of tokens of a request."""
    results = [*drawn]
    completed = sum(
        len(completion.tokens) for result in results for completion in result.completions
    )
    details = {"cached_tokens": sum(result.cached for result in results)}
    return counts_of(samples, completed) | {"prompt_tokens_details": details}


def counts_of(samples: Sequence[SampleRequest], completed: int) -> JsonObject:
    """Returns the numbers of tokens of prompts, and of so many that were drawn."""
    prompted = sum(len(sample.prompt) for sample in samples)
    return {
        "prompt_tokens": prompted,
        "completion_tokens": completed,
        "total_tokens": prompted + completed,
    }


@dataclasses.dataclass(frozen=True)
class ChatForm:
    """The JSON of chats.

    Attributes:
      tokens: tokenizer of the model.
      logprobs: whether each token's log-probability is told.
    """

    tokens: ServedTokenizer
    logprobs: bool
    prefix, whole_kind, part_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def whole(self, index: int, part: AnswerPart) -> JsonObject:
        """Returns a choice."""
        message: JsonObject = {"role": "assistant", "content": part.text, "refusal": None}
        if part.calls:
            calls = [{k: v for k, v in call.items() if k != "index"} for call in part.calls]
            message |= {"content": part.text or None, "tool_calls": calls}
        if part.thinking:
            message["reasoning_content"] = part.thinking
        return self._choice(index, {"message": message}, part)

    def begin(self, index: int) -> JsonObject:
        """Returns the choice of the first event."""
        return self._choice(index, {"delta": {"role": "assistant", "content": ""}}, AnswerPart())

    def part(self, index: int, part: AnswerPart) -> JsonObject:
        """Returns the choice of an event."""
        delta: JsonObject = {"content": part.text} if part.text else {}
        if part.calls:
            delta["tool_calls"] = part.calls
        if part.thinking:
            delta["reasoning_content"] = part.thinking
        return self._choice(index, {"delta": delta}, part)

    def _choice(self, index: int, content: JsonObject, part: AnswerPart) -> JsonObject:
        content_logprobs = {
            "content": [self._entry(item) for item in part.entries],
            "refusal": None,
        }
        logprobs = content_logprobs if self.logprobs and (part.entries or part.finish) else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": part.finish}

    def _entry(self, entry: TokenEntry) -> JsonObject:
        likely = [self._token(*item) for item in entry.top or ()]
        return {**self._token(entry.token, entry.logprob), "top_logprobs": likely}

    def _token(self, token: int, logprob: float | None) -> JsonObject:
        known = self.tokens.of(token)
        text = known.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": [*known]}


@dataclasses.dataclass(frozen=True)
class TextForm:
    """The JSON of plain completions.

    Attributes:
      tokens: tokenizer of the model.
      top: the alternatives told for each token; None for no log-probabilities.
    """

    tokens: ServedTokenizer
    top: int | None
    prefix, whole_kind, part_kind = "cmpl-", "text_completion", "text_completion"

    def whole(self, index: int, part: AnswerPart) -> JsonObject:
        """Returns a choice."""
        logprobs = None if self.top is None else self._logprobs(part.entries)
        choice = {"index": index, "text": part.text, "logprobs": logprobs}
        return {**choice, "finish_reason": part.finish}

    def begin(self, index: int) -> None:
        """Returns None: the first event is that of the first text."""

    part = whole

    def _logprobs(self, entries: Sequence[TokenEntry]) -> JsonObject:
        return {
            "tokens": [self._text(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._likely(entry) for entry in entries] if self.top else None,
            "text_offset": [entry.start for entry in entries],
        }

    def _likely(self, entry: TokenEntry) -> dict[str, float] | None:
        if entry.logprob is None:
            return None
        likely = [*(entry.top or ()), (entry.token, entry.logprob)]
        return {self._text(token): logprob for token, logprob in reversed(likely)}

    def _text(self, token: int) -> str:
        return self.tokens.of(token).decode(errors="replace")
