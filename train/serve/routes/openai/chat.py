"""Chats: from turns to the tokens of a prompt, and from an answer to its calls of tools."""

import json
import uuid
from collections.abc import Mapping

from jinja2 import TemplateError

from lora_jax.models.sampling.text import partial_length
from lora_jax.training.data.rows import check_text, question, shown
from lora_jax.training.data.templates import render_prompt
from lora_jax.training.errors import TrainingError
from train.serve.routes.errors import HttpError, JsonObject
from train.serve.routes.openai.text import ServedTokenizer

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


def tools_of(body: Mapping[str, object]) -> object:
    """Returns the tools that a chat may call; None for none."""
    return None if body.get("tool_choice") == "none" else body.get("tools") or None


def prompt_of(body: Mapping[str, object], tokens: ServedTokenizer, most: int) -> list[int]:
    """Returns the tokens of a chat, up to the beginning of the answer.

    Args:
      body: `messages`, `tools` and `chat_template_kwargs`.
      tokens: tokenizer of the model.
      most: the most tokens that are of use.

    Raises:
      HttpError: the turns are no chat, or the model's template refuses or drops some of it.
    """
    if tokens.tokenizer.chat_template is None:
        raise HttpError(
            400,
            "the model has no chat template to put `messages` into: ask /v1/completions to "
            "continue a text",
            param="messages",
        )
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise HttpError(400, f"`messages` is {shown(messages)}: a list of turns is needed")
    row = {
        "messages": [_read_message(message, i) for i, message in enumerate(messages)],
        "tools": tools_of(body),
        "chat_template_kwargs": body.get("chat_template_kwargs"),
    }
    try:
        check_text(json.dumps(row, ensure_ascii=False), "the request")
        text = render_prompt(question(row, "the request"), tokens.tokenizer)
        return tokens.ids(text, most, special=False)
    except TemplateError as error:
        problem = f"the model's chat template says: {error}"
        raise HttpError(400, problem, param="messages") from None
    except TrainingError as error:
        raise HttpError(400, str(error), param="messages") from None
    except (
        TypeError,
        KeyError,
        AttributeError,
    ) as error:  # the template met what it did not expect
        problem = f"the model's chat template cannot render this chat: {shown(error)}"
        raise HttpError(400, problem, param="messages") from None


def _read_message(message: object, index: int) -> object:
    """Returns a message as chat templates know it; refuses what is no text."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise HttpError(
                400,
                f"`content` of turn {index} has a part of the type {shown(kind)}: only texts are "
                "supported",
                param=f"messages[{index}].content",
            )
    return {**message, "role": "system"} if message.get("role") == "developer" else message


class ToolCalls:
    """Finds the calls of tools in an answer, while it grows.

    A call is an object of JSON with `name` and `arguments`, between the tags that the templates of
    Hermes and Qwen have. What is no such call stays in the text. White space around calls does not.

    Attributes:
      n: the number of calls so far.
    """

    def __init__(self) -> None:
        """Begins an answer."""
        self.n = 0
        self._held = ""
        self._after = False  # nothing was said since the last call

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[JsonObject]]:
        """Takes more of the text; returns what of it is said now, and the calls that are whole."""
        visible, calls, self._held = "", [], self._held + text
        while _OPEN in self._held:
            before, _, rest = self._held.partition(_OPEN)
            call, after = _read(rest, last)
            if call is not None:
                visible += before.rstrip()
                self._held, self._after = after, True
                calls.append({"index": self.n, **call})
                self.n += 1
            elif last:
                visible, self._held = visible + before + _OPEN, rest
            else:
                visible += before.rstrip()
                self._held = self._held[len(before.rstrip()) :]
                return visible, calls
        if self._after:
            self._held = self._held.lstrip()
        kept = len(self._held) - partial_length(self._held, [_OPEN])
        kept = len(self._held) if last else len(self._held[:kept].rstrip())
        visible, self._held = visible + self._held[:kept], self._held[kept:]
        self._after &= kept == 0
        return visible, calls


def _read(text: str, last: bool) -> tuple[JsonObject | None, str]:
    """Returns the call that a text begins with, if it is whole, and what follows it."""
    begun = text.lstrip()
    try:
        call, end = json.JSONDecoder().raw_decode(begun)
    except (ValueError, RecursionError):
        return None, text
    rest = begun[end:].lstrip()
    closed = rest.startswith(_CLOSE)
    if not closed and not (last and not rest):  # the end of an answer may take the place of the tag
        return None, text
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None, text
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    made: JsonObject = {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
    return made, rest.removeprefix(_CLOSE)
