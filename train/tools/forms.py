"""The texts around the names and arguments of tool calls, for each format of calls."""

from collections.abc import Mapping
from typing import NamedTuple


class ArgumentForm(NamedTuple):
    """The texts around arguments, for formats that write each argument separately.

    Attributes:
      before: the text before a value, with {key}.
      after: the text after it.
      between: the text between two arguments.
      is_raw: whether texts stand as they are, up to `after`; they are JSON otherwise.
      quote: the text on both sides of a raw text.
    """

    before: str
    after: str = ""
    between: str = ""
    is_raw: bool = True
    quote: str = ""


class CallForm(NamedTuple):
    """The texts of an answer that calls tools.

    Attributes:
      head: the text before the arguments, with {name}, or {json} for the name as JSON.
      tail: the text after them.
      between: the text between two calls; None where an answer has one.
      begin: the text before all calls.
      end: the text after them.
      arguments: form of the arguments; None for a JSON object.
      thoughts: the texts around thoughts that may come before; None for none.
    """

    head: str
    tail: str
    between: str | None = "\n"
    begin: str = ""
    end: str = ""
    arguments: ArgumentForm | None = None
    thoughts: tuple[str, str] | None = None


_JSON_CALL_HEAD = '{{"name": {json}, "arguments": '
_FORMS: Mapping[str, CallForm] = {
    "hermes": CallForm(f"<tool_call>\n{_JSON_CALL_HEAD}", "}}\n</tool_call>"),
    "qwen3-coder": CallForm(
        "<tool_call>\n<function={name}>\n",
        "</function>\n</tool_call>",
        arguments=ArgumentForm("<parameter={key}>\n", "\n</parameter>\n"),
    ),
    "glm4": CallForm(
        "<tool_call>{name}",
        "\n</tool_call>",
        arguments=ArgumentForm("\n<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>"),
    ),
    "llama3": CallForm('{{"name": {json}, "parameters": ', "}}", None),
    "gpt-oss": CallForm(
        "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
        "",
        None,
        thoughts=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    ),
    "lfm2": CallForm(
        "{name}(",
        ")",
        ", ",
        "<|tool_call_start|>[",
        "]<|tool_call_end|>",
        ArgumentForm("{key}=", between=", ", is_raw=False),
    ),
    "gemma4": CallForm(
        "<|tool_call>call:{name}{{",
        "}}<tool_call|>",
        "",
        arguments=ArgumentForm("{key}:", between=",", quote='<|"|>'),
    ),
    "mistral": CallForm(_JSON_CALL_HEAD, "}}", ", ", "[TOOL_CALLS][", "]"),
}
_MISTRAL_TAGGED = CallForm("[TOOL_CALLS]{name}[ARGS]", "", "")


def call_form(name: str, template: str) -> CallForm:
    """Returns the form of calls in a format and with a chat template.

    >>> from train.tools.forms import call_form
    >>> call_form("llama3", "").head.format(json='"look_up"')
    '{"name": "look_up", "parameters": '
    """
    form = _FORMS[name]
    if name != "mistral":
        return form
    # Templates of Mistral's versions differ.
    if "[ARGS]" in template:
        return _MISTRAL_TAGGED
    if "[TOOL_CALLS] [" in template:
        return form._replace(begin="[TOOL_CALLS] [")
    return form
