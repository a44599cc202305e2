"""Builds the answers of OpenAI's API from tokens, whole or in parts."""

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
    """A new part of an answer.

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
    """The settings for reading completions.

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
    """Builds the choice of a completion while its tokens are drawn."""

    def __init__(
        self,
        tokens: ServedTokenizer,
        sample: SampleRequest,
        style: AnswerStyle,
    ) -> None:
        """Creates a builder without tokens."""
        self._text = CompletionText(
            tokens,
            sample.stop,
            special=style.special or style.make_calls is not None,
            keeps_stop=style.keeps_stop,
            min_tokens=sample.limits.min_tokens,
        )
        self._calls = None if style.make_calls is None else style.make_calls()
        self._style = style
        self._stop_ids = sample.stop_ids
        self._n_tokens = 0

    def add(self, token: DrawnToken) -> AnswerPart:
        """Adds a token, and returns the new part of the answer."""
        self._n_tokens += 1
        is_hidden_stop = token.token in self._stop_ids and not self._style.keeps_stop
        if is_hidden_stop:
            return AnswerPart()
        text, entries = self._text.add(token.token, token.logprob, listed(token.top))
        return self._make_part(text, entries)

    def end(self, completion: Completion) -> AnswerPart:
        """Adds the remaining tokens of a completion, and returns the last part of the answer."""
        parts = [self.add(token) for token in _drawn_tokens(completion, self._n_tokens)]
        last_text, last_entries = self._text.end()
        parts.append(self._make_part(last_text, last_entries, last=True))
        answer = AnswerPart()
        for part in parts:
            answer.text += part.text
            answer.calls += part.calls
            answer.entries += part.entries
            answer.thinking += part.thinking
        if not (completion.stopped or self._text.stopped):
            answer.finish = "length"
        elif self._calls is not None and self._calls.n:
            answer.finish = "tool_calls"
        else:
            answer.finish = "stop"
        return answer

    def _make_part(self, text: str, entries: list[TokenEntry], *, last: bool = False) -> AnswerPart:
        """Returns the part of an answer for new text, with the calls in the text."""
        if self._calls is None:
            return AnswerPart(text=text, entries=entries)
        has_earlier_call = self._calls.n > 0
        plain_text, calls, thinking = self._calls.add(text, last=last)
        if self._style.one_call:
            calls = [] if has_earlier_call else calls[:1]
        return AnswerPart(text=plain_text, calls=calls, entries=entries, thinking=thinking)


def _drawn_tokens(completion: Completion, start: int) -> Iterable[DrawnToken]:
    """Yields the tokens of a completion from an index on."""
    top = completion.top
    for i in range(start, len(completion.tokens)):
        yield DrawnToken(
            index=0,
            token=int(completion.tokens[i]),
            logprob=finite(completion.logprobs[i]),
            top=None if top is None else (top.ids[i], top.logprobs[i]),
        )


def with_all_entries(part: AnswerPart, completion: Completion) -> AnswerPart:
    """Returns a complete answer with an entry for each token, including the end tokens."""
    entries = [*part.entries]
    for token in _drawn_tokens(completion, len(part.entries)):
        entries.append(
            TokenEntry(
                token=token.token,
                logprob=token.logprob,
                top=listed(token.top),
                start=len(part.text),
            )
        )
    return dataclasses.replace(part, entries=entries)


def echo_prompt(
    tokens: ServedTokenizer, sample: SampleRequest, result: SampleResult | None
) -> AnswerPart:
    """Returns a prompt as the first part of its answer, with entries if they are requested."""
    prompt_text = CompletionText(tokens)
    prompt = AnswerPart()
    logprobs = None if result is None else result.prompt_logprobs
    top = None if result is None else result.top_prompt
    for i, token in enumerate(sample.prompt):
        logprob = None
        alternatives = None
        has_logprob = logprobs is not None and i > 0 and not np.isnan(logprobs[i])
        if has_logprob:
            assert logprobs is not None
            logprob = finite(logprobs[i])
            if top is not None:
                alternatives = listed((top.ids[i][: sample.top], top.logprobs[i][: sample.top]))
        text, entries = prompt_text.add(token, logprob, alternatives)
        prompt.text += text
        prompt.entries += entries
    text, entries = prompt_text.end()
    prompt.text += text
    prompt.entries += entries
    return prompt


def prompt_entries(
    tokens: ServedTokenizer, sample: SampleRequest, result: SampleResult, n_top: int
) -> list[JsonObject | None]:
    """Returns vLLM's `prompt_logprobs`: each token of a prompt and its alternatives, by id.

    A token that is not among the likeliest has no rank that is known.
    """
    assert result.prompt_logprobs is not None
    entries: list[JsonObject | None] = [None]  # the first token has no probability
    for i, token in enumerate(sample.prompt[1:], start=1):
        alternatives: list[tuple[int, float]] = []
        if result.top_prompt is not None:
            top_ids = result.top_prompt.ids[i][:n_top]
            top_logprobs = result.top_prompt.logprobs[i][:n_top]
            alternatives = listed((top_ids, top_logprobs)) or []
        ranks = {top_id: rank for rank, (top_id, _) in enumerate(alternatives, start=1)}
        # The token itself comes first.
        logprob_of_token = {token: finite(result.prompt_logprobs[i])} | dict(alternatives)
        entries.append(
            {
                str(token_id): {
                    "logprob": logprob,
                    "rank": ranks.get(token_id),
                    "decoded_token": tokens.of(token_id).decode(errors="replace"),
                }
                for token_id, logprob in logprob_of_token.items()
            }
        )
    return entries


def join(prompt: AnswerPart, completion: AnswerPart) -> AnswerPart:
    """Returns a completion with its prompt in front."""
    shifted_entries = [
        dataclasses.replace(entry, start=entry.start + len(prompt.text))
        for entry in completion.entries
    ]
    return dataclasses.replace(
        completion,
        text=prompt.text + completion.text,
        entries=prompt.entries + shifted_entries,
    )


def count_usage(samples: Sequence[SampleRequest], results: Sequence[SampleResult]) -> JsonObject:
    """Returns the `usage` of a request: the numbers of prompt tokens and completion tokens."""
    n_completion_tokens = 0
    n_cached_tokens = 0
    for result in results:
        n_completion_tokens += sum(len(completion.tokens) for completion in result.completions)
        n_cached_tokens += result.cached
    details = {"cached_tokens": n_cached_tokens}
    return make_token_counts(samples, n_completion_tokens) | {"prompt_tokens_details": details}


def make_token_counts(samples: Sequence[SampleRequest], n_completion_tokens: int) -> JsonObject:
    """Returns the counts of `usage`, from samples and the number of generated tokens."""
    n_prompt_tokens = sum(len(sample.prompt) for sample in samples)
    return {
        "prompt_tokens": n_prompt_tokens,
        "completion_tokens": n_completion_tokens,
        "total_tokens": n_prompt_tokens + n_completion_tokens,
    }


@dataclasses.dataclass(frozen=True)
class ChatForm:
    """The JSON format of chats.

    Attributes:
      tokens: tokenizer of the model.
      logprobs: whether each token's log-probability is told.
    """

    tokens: ServedTokenizer
    logprobs: bool
    prefix, whole_kind, part_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def whole(self, index: int, part: AnswerPart) -> JsonObject:
        """Returns the choice of a complete answer."""
        message: JsonObject = {"role": "assistant", "content": part.text, "refusal": None}
        if part.calls:
            message["content"] = part.text or None
            message["tool_calls"] = [_without_index(call) for call in part.calls]
        if part.thinking:
            message["reasoning_content"] = part.thinking
        return self._make_choice(index, {"message": message}, part)

    def begin(self, index: int) -> JsonObject:
        """Returns the choice of a stream's first event."""
        return self._make_choice(
            index, {"delta": {"role": "assistant", "content": ""}}, AnswerPart()
        )

    def part(self, index: int, part: AnswerPart) -> JsonObject:
        """Returns the choice of a later event of a stream."""
        delta: JsonObject = {"content": part.text} if part.text else {}
        if part.calls:
            delta["tool_calls"] = part.calls
        if part.thinking:
            delta["reasoning_content"] = part.thinking
        return self._make_choice(index, {"delta": delta}, part)

    def _make_choice(self, index: int, content: JsonObject, part: AnswerPart) -> JsonObject:
        """Returns a choice with `content`, which is a message or a delta."""
        logprobs = None
        if self.logprobs and (part.entries or part.finish):
            entries = [self._make_entry(entry) for entry in part.entries]
            logprobs = {"content": entries, "refusal": None}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": part.finish}

    def _make_entry(self, entry: TokenEntry) -> JsonObject:
        """Returns the log-probability of a token, and its alternatives."""
        alternatives = [self._make_token(token, logprob) for token, logprob in entry.top or ()]
        return {**self._make_token(entry.token, entry.logprob), "top_logprobs": alternatives}

    def _make_token(self, token: int, logprob: float | None) -> JsonObject:
        """Returns a token, its log-probability and its bytes."""
        token_bytes = self.tokens.of(token)
        return {
            "token": token_bytes.decode(errors="replace"),
            "logprob": logprob,
            "bytes": [*token_bytes],
        }


def _without_index(call: JsonObject) -> JsonObject:
    """Returns a tool call without its index, which only the parts of a stream contain."""
    return {name: value for name, value in call.items() if name != "index"}


@dataclasses.dataclass(frozen=True)
class TextForm:
    """The JSON format of plain completions.

    Attributes:
      tokens: tokenizer of the model.
      top: the alternatives told for each token; None for no log-probabilities.
    """

    tokens: ServedTokenizer
    top: int | None
    prefix, whole_kind, part_kind = "cmpl-", "text_completion", "text_completion"

    def whole(self, index: int, part: AnswerPart) -> JsonObject:
        """Returns the choice of a complete answer."""
        return {
            "index": index,
            "text": part.text,
            "logprobs": None if self.top is None else self._logprobs(part.entries),
            "finish_reason": part.finish,
        }

    def begin(self, index: int) -> None:
        """Returns None, because a stream of plain completions begins with its first text."""

    part = whole

    def _logprobs(self, entries: Sequence[TokenEntry]) -> JsonObject:
        """Returns lists of the tokens' texts, log-probabilities, alternatives and offsets."""
        return {
            "tokens": [self._text(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._alternatives(entry) for entry in entries] if self.top else None,
            "text_offset": [entry.start for entry in entries],
        }

    def _alternatives(self, entry: TokenEntry) -> dict[str, float] | None:
        """Returns log-probabilities by the texts of tokens; the highest one for equal texts."""
        if entry.logprob is None:
            return None
        logprobs = {self._text(entry.token): entry.logprob}
        for token, logprob in reversed(entry.top or ()):
            logprobs[self._text(token)] = logprob
        return logprobs

    def _text(self, token: int) -> str:
        return self.tokens.of(token).decode(errors="replace")
