"""Converts turns of a chat to prompt tokens, and the text of an answer to tool calls."""

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

_MAX_COUNTED_TOKENS = 1 << 20  # of a text that is not drawn from


def read_tools(body: Mapping[str, object]) -> object:
    """Returns the tools that a chat may call, or None."""
    return None if body.get("tool_choice") == "none" else body.get("tools") or None


def tokenize_chat(
    body: Mapping[str, object], tokens: ServedTokenizer, max_tokens: int, *, cuts: bool = False
) -> list[int]:
    """Returns the tokens of a chat, up to the beginning of the answer.

    Args:
      body: `messages`, `tools` and `chat_template_kwargs`.
      tokens: tokenizer of the model.
      max_tokens: tokens that are of use.
      cuts: leaves out the beginning of a text that has more; see `ServedTokenizer.ids`.

    Raises:
      HttpError: the turns are no chat, or the model's template refuses or drops some of it.
    """
    if tokens.tokenizer.chat_template is None:
        raise HttpError(
            400,
            "the model has no chat template, so it cannot render `messages`. Use /v1/completions "
            "to continue a text.",
            param="messages",
        )
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise HttpError(400, f"`messages` is {shown(messages)}. Pass a list of turns.")
    row = {
        "messages": [_read_message(message, i) for i, message in enumerate(messages)],
        "tools": read_tools(body),
        "chat_template_kwargs": body.get("chat_template_kwargs"),
    }
    try:
        check_text(json.dumps(row, ensure_ascii=False), "the request")
        text = render_prompt(question(row, "the request"), tokens.tokenizer)
        return tokens.ids(text, max_tokens, special=False, cuts=cuts)
    except TemplateError as error:
        problem = f"the model's chat template refuses this chat: {error}"
        raise HttpError(400, problem, param="messages") from None
    except TrainingError as error:
        raise HttpError(400, str(error), param="messages") from None
    except (TypeError, KeyError, AttributeError) as error:
        # The template met what it did not expect.
        problem = f"the model's chat template cannot render this chat: {shown(error)}"
        raise HttpError(400, problem, param="messages") from None


def _read_message(message: object, index: int) -> object:
    """Returns a message for chat templates; raises HttpError if a part of it is not text."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    content_parts = content if isinstance(content, list) else []
    for content_part in content_parts:
        kind = content_part.get("type") if isinstance(content_part, dict) else content_part
        is_text = isinstance(content_part, dict) and kind == "text"
        if not is_text:
            raise HttpError(
                400,
                f"`content` of turn {index} has a part of the type {shown(kind)}. Pass only parts "
                "of the type text.",
                param=f"messages[{index}].content",
            )
    if message.get("role") == "developer":
        return {**message, "role": "system"}
    return message


def choose_template(body: Mapping[str, object], tokens: ServedTokenizer) -> str:
    """Returns the chat template that renders a chat with its tools; "" without a template."""
    if tokens.tokenizer.chat_template is None:
        return ""
    return str(tokens.tokenizer.get_chat_template(None, read_tools(body)))


class ToolCalls:
    """Finds the tool calls in a growing answer, as OpenAI's JSON.

    What can be read as no call stays in the text.

    Attributes:
      n: the number of calls so far.
    """

    def __init__(self, form: CallFormat = FORMATS["hermes"], tools: Tools = ()) -> None:
        """Creates a reader for an empty answer in a format."""
        self.n = 0
        self._reader = CallReader(form, tools, shows_malformed=True)

    def add(self, text: str, *, last: bool = False) -> tuple[str, list[JsonObject], str]:
        """Adds text to the answer; returns new plain text, complete calls and thoughts."""
        answer = self._reader.add(text, last=last)
        calls: list[JsonObject] = []
        for written_call in answer.calls:
            function = {"name": written_call.call.name, "arguments": written_call.text}
            calls.append(
                {
                    "index": self.n,
                    "id": f"call_{uuid.uuid4().hex}",
                    "type": "function",
                    "function": function,
                }
            )
            self.n += 1
        return answer.text, calls, answer.thinking


def make_calls(
    body: Mapping[str, object], tokens: ServedTokenizer
) -> Callable[[], ToolCalls] | None:
    """Returns a function that makes readers of tool calls; None for a chat without tools.

    A template whose format is not known is read as Hermes'.
    """
    tools = read_tools(body)
    if not isinstance(tools, list):
        return None
    template = choose_template(body, tokens)
    if is_forced(body):
        form, _ = forced_form(body, template)
    else:
        form = call_format(template) or FORMATS["hermes"]
    return partial(ToolCalls, form, tools)


def tokenize(body: Mapping[str, object], tokens: ServedTokenizer, max_length: int) -> JsonObject:
    """Returns vLLM's answer at /tokenize: the tokens of `prompt`, or of `messages`.

    Args:
      body: the fields of the request.
      tokens: tokenizer of the model, with the template of chats.
      max_length: tokens of a sequence at most.

    Raises:
      HttpError: there is neither or both; see `tokenize_chat`, too.
    """
    has_prompt = body.get("prompt") is not None
    has_messages = body.get("messages") is not None
    if has_prompt == has_messages:
        raise HttpError(
            400, "The body has neither `prompt` nor `messages`. Pass one of them.", param="prompt"
        )
    if has_messages:
        ids = tokenize_chat(body, tokens, _MAX_COUNTED_TOKENS)
    else:
        special = body.get("add_special_tokens") is None or read_flag(body, "add_special_tokens")
        try:
            ids = tokens.ids(read_text(body, "prompt"), _MAX_COUNTED_TOKENS, special=special)
        except TrainingError as error:
            raise HttpError(400, str(error), param="prompt") from None
    token_texts = None
    if read_flag(body, "return_token_strs"):
        vocabulary = tokens.tokenizer.backend_tokenizer
        token_texts = [vocabulary.id_to_token(token) for token in ids]
    return {
        "count": len(ids),
        "max_model_len": max_length,
        "tokens": ids,
        "token_strs": token_texts,
    }
