"""Chats: from turns to the tokens of a prompt, and from an answer to its calls of tools."""

import json
import uuid
from collections.abc import Callable, Mapping
from functools import partial

from jinja2 import TemplateError

from lora_jax.training.data.rows import check_text, question
from lora_jax.training.data.templates import render_prompt
from lora_jax.training.data.turns import shown
from lora_jax.training.errors import TrainingError
from train.serve.routes.errors import HttpError, JsonObject
from train.serve.routes.openai.fields import read_flag, read_text
from train.serve.routes.openai.structured import forced_form, is_forced
from train.serve.routes.openai.text import ServedTokenizer
from train.tools.calls import CallReader, call_format
from train.tools.formats import FORMATS, CallFormat
from train.tools.schemas import Tools

_COUNTED = 1 << 20  # tokens of a text that is not drawn from, at most


def tools_of(body: Mapping[str, object]) -> object:
    """Returns the tools that a chat may call; None for none."""
    return None if body.get("tool_choice") == "none" else body.get("tools") or None


def prompt_of(
    body: Mapping[str, object], tokens: ServedTokenizer, most: int, *, cuts: bool = False
) -> list[int]:
    """Returns the tokens of a chat, up to the beginning of the answer.

    Args:
      body: `messages`, `tools` and `chat_template_kwargs`.
      tokens: tokenizer of the model.
      most: the most tokens that are of use.
      cuts: leaves out the beginning of a text that has more; see `ServedTokenizer.ids`.

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
        return tokens.ids(text, most, special=False, cuts=cuts)
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


def template_of(body: Mapping[str, object], tokens: ServedTokenizer) -> str:
    """Returns the template that renders a chat, of those that a model may have; "" for none."""
    if tokens.tokenizer.chat_template is None:
        return ""
    return str(tokens.tokenizer.get_chat_template(None, tools_of(body)))


class ToolCalls:
    """Finds the calls of tools in an answer, while it grows, as OpenAI's JSON.

    What can be read as no call stays in the text.

    Attributes:
      n: the number of calls so far.
    """

    def __init__(self, form: CallFormat = FORMATS["hermes"], tools: Tools = ()) -> None:
        """Begins an answer in a format."""
        self.n = 0
        self._reader = CallReader(form, tools, shows_malformed=True)

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[JsonObject], str]:
        """Takes more of the text; returns text, whole calls and thoughts that are known now."""
        answer = self._reader.add(text, last=last)
        calls = [
            {
                "index": index,
                "id": f"call_{uuid.uuid4().hex}",
                "type": "function",
                "function": {"name": written.call.name, "arguments": written.text},
            }
            for index, written in enumerate(answer.calls, start=self.n)
        ]
        self.n += len(calls)
        return answer.text, calls, answer.thinking


def make_calls(
    body: Mapping[str, object], tokens: ServedTokenizer
) -> Callable[[], ToolCalls] | None:
    """Returns a maker of readers for the calls of an answer; None where a chat has no tools.

    A template whose format is not known is read as Hermes'.
    """
    tools = tools_of(body)
    if not isinstance(tools, list):
        return None
    template = template_of(body, tokens)
    if is_forced(body):
        return partial(ToolCalls, forced_form(body, template)[0], tools)
    return partial(ToolCalls, call_format(template) or FORMATS["hermes"], tools)


def tokenize(body: Mapping[str, object], tokens: ServedTokenizer, most: int) -> JsonObject:
    """Returns vLLM's answer at /tokenize: the tokens of `prompt`, or of `messages`.

    Args:
      body: the fields of the request.
      tokens: tokenizer of the model, with the template of chats.
      most: tokens of a sequence at most.

    Raises:
      HttpError: there is neither or both; see `prompt_of`, too.
    """
    if (body.get("prompt") is None) == (body.get("messages") is None):
        raise HttpError(400, "give `prompt` or `messages`", param="prompt")
    if body.get("messages") is not None:
        ids = prompt_of(body, tokens, _COUNTED)
    else:
        special = body.get("add_special_tokens") is None or read_flag(body, "add_special_tokens")
        try:
            ids = tokens.ids(read_text(body, "prompt"), _COUNTED, special=special)
        except TrainingError as error:
            raise HttpError(400, str(error), param="prompt") from None
    core = tokens.tokenizer.backend_tokenizer
    texts = [core.id_to_token(i) for i in ids] if read_flag(body, "return_token_strs") else None
    return {"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": texts}
