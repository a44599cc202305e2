"""Parses the tool calls in a turn's text, which may be complete or still growing.

A chat template tells the format in which its model writes calls (`formats.py`).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from lora_jax.core.types import Tokenizer
from lora_jax.models.sampling.text import unfinished_mark_length
from train.tools.contract import ToolCall
from train.tools.formats import FORMATS, CallBlock, CallFormat, NoCall, WrittenCall
from train.tools.schemas import Tools

_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>", re.DOTALL)


def call_format(template: str | None) -> CallFormat | None:
    """Returns the format in which a chat template writes calls; None for an unknown format.

    >>> from train.tools.calls import call_format
    >>> call_format("{{ '<tool_call>' + call + '</tool_call>' }}").name
    'hermes'
    """
    if not template:
        return None
    for form in FORMATS.values():
        if any(sign in template for sign in form.signs):
            return form
    return None


class AnswerText(NamedTuple):
    """A part of an answer, with the calls and thoughts in it.

    Attributes:
      text: what is said.
      calls: the calls that are whole.
      thinking: what was thought in a channel of its own.
    """

    text: str
    calls: list[WrittenCall]
    thinking: str = ""


class CallReader:
    """Finds the tool calls in an answer that grows.

    White space around calls is left out. A block of which no call can be read is held back until
    the answer ends; it is a malformed call then.

    Attributes:
      n: the number of calls so far.
    """

    def __init__(self, form: CallFormat, tools: Tools, *, shows_malformed: bool = False):
        """Creates a reader for an empty answer.

        Args:
          form: the format.
          tools: schemas of the tools, for arguments whose types the format does not show.
          shows_malformed: leave in the text what can be read as no call.
        """
        self.n = 0
        self._form = form
        self._tools = tools
        self._shows_malformed = shows_malformed
        self._unread = ""  # the text that may belong to a call
        self._follows_call = False  # no text was said since the last call

    def add(self, text: str, *, last: bool = False) -> AnswerText:
        """Adds text to the answer; returns the text and the calls that are complete now."""
        self._unread += text
        answer = AnswerText("", [])
        while True:
            mark_index = self._mark_index()
            if mark_index is None:
                break
            plain_text = self._unread[:mark_index]
            block_text = self._unread[mark_index:]
            try:
                block = self._form.read(block_text, last, self._tools)
            except NoCall:  # the text only looks like the beginning of a call
                answer = self._append_text(answer, plain_text + block_text[:1])
                self._unread = block_text[1:]
                continue
            except (ValueError, RecursionError) as error:
                if not last:  # the call may become whole
                    plain_text = plain_text.rstrip()
                    self._unread = self._unread[len(plain_text) :]
                    return self._append_text(answer, plain_text)
                block = self._malformed_block(block_text, error)
                if self._shows_malformed:
                    answer = self._append_text(
                        answer, plain_text + block_text.removesuffix(block.text_after)
                    )
                    self._unread = block.text_after
                    continue
            answer = self._append_text(answer, plain_text.rstrip())
            answer = self._add_block(answer, block)
        # The rest is plain text, except for characters that may begin a mark.
        if self._follows_call:
            self._unread = self._unread.lstrip()
        n_plain = len(self._unread)
        if not last:  # the last characters may begin a mark
            n_plain -= unfinished_mark_length(self._unread, self._form.marks)
            n_plain = len(self._unread[:n_plain].rstrip())
        plain_text = self._unread[:n_plain]
        self._unread = self._unread[n_plain:]
        return self._append_text(answer, plain_text)

    def _add_block(self, answer: AnswerText, block: CallBlock) -> AnswerText:
        """Returns the answer with a block's calls and thoughts, and skips the block."""
        self._unread = block.text_after
        if block.calls:
            self._follows_call = True
        self.n += len(block.calls)
        thoughts = [thought for thought in (answer.thinking, block.thinking) if thought]
        return answer._replace(calls=answer.calls + block.calls, thinking="\n\n".join(thoughts))

    def _mark_index(self) -> int | None:
        """Returns the index of the first text that may begin a call, or None."""
        indices = [self._unread.find(mark) for mark in self._form.marks]
        return min((index for index in indices if index >= 0), default=None)

    def _append_text(self, answer: AnswerText, text: str) -> AnswerText:
        """Returns the answer with more text, without white space directly after a call."""
        if self._follows_call:
            text = text.lstrip()
        if text:
            self._follows_call = False
        return answer._replace(text=answer.text + text)

    def _malformed_block(self, block_text: str, error: Exception) -> CallBlock:
        """Returns the block at the start of a text as a call with a problem."""
        close = self._form.close
        close_index = block_text.find(close) if close else -1
        end = len(block_text) if close_index < 0 else close_index + len(close)
        problem = str(error) if isinstance(error, ValueError) else "the call is nested too deep"
        call = WrittenCall(ToolCall("", None, problem), block_text[:end])
        return CallBlock([call], block_text[end:])


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
    """Parses a complete turn.

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
    match = _THOUGHT.match(text)
    if match is not None and (thinking or "<think>" in match[0]):
        thought = match[1].strip()
        text = text[match.end() :]
    elif thinking or text.lstrip().startswith("<think>"):  # the thought did not come to an end
        return TurnText("", [], text.strip().removeprefix("<think>").strip())
    answer = CallReader(form, tools).add(text, last=True)
    calls = [written.call for written in answer.calls]
    return TurnText(answer.text.strip(), calls, thought or answer.thinking)


def turn_text(tokenizer: Tokenizer, ids: Sequence[int], end_tokens: Sequence[int]) -> str:
    """Returns the text of a turn's tokens without its end token, as `read_turn` expects it."""
    if len(ids) and ids[-1] in end_tokens:
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False)


def opens_thinking(prompt: str) -> bool:
    """Returns True if a rendered prompt ends with <think>, so that the answer begins inside."""
    return prompt.rstrip().endswith("<think>")
