"""The reader of calls: from a turn's text, whole or while it grows, to calls of tools.

A chat template tells the format in which its model writes calls (`formats.py`).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.core.types import Tokenizer
from lora_jax.models.sampling.text import partial_length
from train.tools.contract import ToolCall
from train.tools.formats import FORMATS, CallBlock, CallFormat, NoCall, WrittenCall
from train.tools.schemas import Tools

_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>", re.DOTALL)


def call_format(template: str | None) -> CallFormat | None:
    """Returns the format in which a chat template writes calls; None where it has none of ours.

    >>> from train.tools.calls import call_format
    >>> call_format("{{ '<tool_call>' + call + '</tool_call>' }}").name
    'hermes'
    """
    signs = ((x, sign) for x in FORMATS.values() for sign in x.signs)
    return next((x for x, sign in signs if template and sign in template), None)


class AnswerText(NamedTuple):
    """A part of an answer.

    Attributes:
      text: what is said.
      calls: the calls that are whole.
      thinking: what was thought in a channel of its own.
    """

    text: str
    calls: list[WrittenCall]
    thinking: str = ""


class CallReader:
    """Finds the calls in an answer, while it grows.

    White space around calls is left out. A block of which no call can be read is held back until
    the answer ends; it is a malformed call then.

    Attributes:
      n: the number of calls so far.
    """

    def __init__(self, form: CallFormat, tools: Tools, *, shows_malformed: bool = False):
        """Begins an answer.

        Args:
          form: the format.
          tools: schemas of the tools, for arguments whose types the format does not show.
          shows_malformed: leave in the text what can be read as no call.
        """
        self.n = 0
        self._form, self._tools, self._shows = form, tools, shows_malformed
        self._held = ""
        self._after = False  # nothing was said since the last call

    def add(self, text: str, *, last: bool = False) -> AnswerText:
        """Takes more of the text; returns the part that is known now."""
        self._held += text
        answer = AnswerText("", [])
        while (at := self._next_mark()) is not None:
            before, block = self._held[:at], self._held[at:]
            try:
                got = self._form.read(block, last, self._tools)
            except NoCall:
                answer, self._held = self._say(answer, before + block[:1]), block[1:]
                continue
            except (ValueError, RecursionError) as error:
                if not last:
                    before = before.rstrip()
                    self._held = self._held[len(before) :]
                    return self._say(answer, before)
                got = self._malformed(block, error)
                if self._shows:
                    answer = self._say(answer, before + block.removesuffix(got.rest))
                    self._held = got.rest
                    continue
            answer = self._say(answer, before.rstrip())
            thoughts = "\n\n".join(filter(None, (answer.thinking, got.thinking)))
            answer = answer._replace(calls=answer.calls + got.calls, thinking=thoughts)
            self._held, self._after = got.rest, self._after or bool(got.calls)
            self.n += len(got.calls)
        if self._after:
            self._held = self._held.lstrip()
        kept = len(self._held) - partial_length(self._held, self._form.marks)
        kept = len(self._held) if last else len(self._held[:kept].rstrip())
        answer, self._held = self._say(answer, self._held[:kept]), self._held[kept:]
        return answer

    def _next_mark(self) -> int | None:
        places = (self._held.find(mark) for mark in self._form.marks)
        return min((at for at in places if at >= 0), default=None)

    def _say(self, answer: AnswerText, text: str) -> AnswerText:
        if self._after:
            text = text.lstrip()
        self._after &= not text
        return answer._replace(text=answer.text + text)

    def _malformed(self, block: str, error: Exception) -> CallBlock:
        close = self._form.close
        end = block.find(close) if close else -1
        length = len(block) if end < 0 else end + len(close)
        problem = str(error) if isinstance(error, ValueError) else "the call is nested too deep"
        call = WrittenCall(ToolCall("", None, problem), block[:length])
        return CallBlock([call], block[length:])


class TurnText(NamedTuple):
    """A turn of the assistant.

    Attributes:
      content: the text for the user.
      calls: the calls of tools, malformed ones included.
      thinking: what it thought.
    """

    content: str
    calls: list[ToolCall]
    thinking: str = ""


def read_turn(
    text: str, form: CallFormat, tools: Tools = (), *, thinking: bool = False
) -> TurnText:
    """Reads a whole turn.

    Args:
      text: what was drawn, with special tokens, but without the one that ended the turn.
      form: the format of its calls.
      tools: the tools' schemas, for formats that do not show types.
      thinking: whether the prompt has opened <think> already; see `opens_thinking`.

    >>> from train.tools.calls import read_turn
    >>> from train.tools.formats import FORMATS
    >>> text = 'I look.<tool_call>{"name": "look_up", "arguments": {"n": 2}}</tool_call>'
    >>> content, (call,), _ = read_turn(text, FORMATS["hermes"])
    >>> content, call.name, call.arguments
    ('I look.', 'look_up', {'n': 2})
    """
    thought = ""
    if (match := _THOUGHT.match(text)) is not None and (thinking or "<think>" in match[0]):
        thought, text = match[1], text[match.end() :]
    elif thinking or text.lstrip().startswith("<think>"):  # and it did not come to an end
        return TurnText("", [], text.strip().removeprefix("<think>").strip())
    answer = CallReader(form, tools).add(text, last=True)
    calls = [written.call for written in answer.calls]
    return TurnText(answer.text.strip(), calls, thought.strip() or answer.thinking)


def turn_text(tokenizer: Tokenizer, ids: Sequence[int], ends: Sequence[int]) -> str:
    """Returns the text of a turn's tokens for `read_turn`, without the one that ended it."""
    if len(ids) and ids[-1] in ends:
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False)


def opens_thinking(prompt: str) -> bool:
    """Returns True if a rendered prompt ends within <think>, as the answer begins."""
    return prompt.rstrip().endswith("<think>")
