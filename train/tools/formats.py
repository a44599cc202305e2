"""The formats in which models write calls of tools, and a reader for each.

A format names the texts that begin a block, and reads the block that a text begins with.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from train.tools.contract import ToolCall
from train.tools.literals import read_call, read_calls, read_value
from train.tools.schemas import Tools, with_types


class NoCall(Exception):
    """A text looks like a block's beginning, and is none: it is part of what is said."""


class WrittenCall(NamedTuple):
    """A call with its arguments as a text.

    Attributes:
      call: the call.
      text: its arguments as JSON, or as the model wrote them.
    """

    call: ToolCall
    text: str


class CallBlock(NamedTuple):
    """A part of an answer that is no text for its reader.

    Attributes:
      calls: the calls in it.
      rest: the text that follows it.
      thinking: what is thought in it.
    """

    calls: list[WrittenCall]
    rest: str
    thinking: str = ""


class CallFormat(NamedTuple):
    """A way of writing calls.

    Attributes:
      name: the format's name.
      signs: texts, one of which a chat template has that writes calls so.
      marks: texts that begin a block.
      close: the text that ends a block of which nothing can be read; "" for none.
      read: reads the block that a text begins with, from the text, whether it is the answer's end,
        and the tools. Raises ValueError for what is no call, or none yet, and NoCall for a text.
    """

    name: str
    signs: tuple[str, ...]
    marks: tuple[str, ...]
    close: str
    read: Callable[[str, bool, Tools], CallBlock]


def _make(name: str, arguments: Any, problem: str | None = None) -> WrittenCall:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            problem = problem or f"the arguments are no JSON: {error}"
    if not problem and not isinstance(arguments, dict):
        problem = f"the arguments are {text[:80]}: an object is needed"
    return WrittenCall(ToolCall(name, None if problem else arguments, problem), text)


def _decode(text: str) -> tuple[Any, str]:
    """Reads JSON at the beginning of a text; returns it and the rest."""
    begun = text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(begun)
    except json.JSONDecodeError as error:
        raise ValueError(f"the call is no JSON: {error}") from None
    return value, begun[end:]


def _read_object(value: Any) -> WrittenCall:
    """Returns the call that an object with `name` and `arguments` is."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("the call is no object with `name` and `arguments`")
    arguments = value.get("arguments", value.get("parameters"))
    return _make(value["name"], {} if arguments is None else arguments)


def _closed(rest: str, close: str, last: bool) -> str:
    """Returns the rest after a closing text, whose place the end of an answer may take."""
    begun = rest.lstrip()
    if not begun.startswith(close) and not (last and not begun):
        raise ValueError(f"{close} is missing after the call")
    return begun.removeprefix(close)


def _hermes(text: str, last: bool, tools: Tools) -> CallBlock:
    value, rest = _decode(text.removeprefix("<tool_call>"))
    rest = _closed(rest, "</tool_call>", last)
    return CallBlock([_read_object(value)], rest)


def _arguments(text: str, pattern: re.Pattern[str]) -> tuple[dict[str, str], str]:
    """Returns the texts of arguments that a text begins with, by name, and the rest."""
    texts: dict[str, str] = {}
    while (argument := pattern.match(text)) is not None:
        texts[argument[1].strip()] = argument[2]
        text = text[argument.end() :]
    return texts, text


_FUNCTION = re.compile(r"(?:<tool_call>\s*)?<function=([^\n>]+)>")
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _xml(text: str, last: bool, tools: Tools) -> CallBlock:
    if (head := _FUNCTION.match(text)) is None:
        raise ValueError("the call does not begin with <function=NAME>")
    name, (texts, rest) = head[1].strip(), _arguments(text[head.end() :], _PARAMETER)
    rest = _closed(rest, "</function>", last)
    if text.startswith("<tool_call>"):
        rest = _closed(rest, "</tool_call>", last)
    return CallBlock([_make(name, with_types(name, texts, tools))], rest)


_NAMED = re.compile(r"<tool_call>\s*([^\s<]+)")
_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _glm(text: str, last: bool, tools: Tools) -> CallBlock:
    if (head := _NAMED.match(text)) is None:
        raise ValueError("the call does not begin with the name of a tool")
    texts, rest = _arguments(text[head.end() :], _ARGUMENT)
    rest = _closed(rest, "</tool_call>", last)
    return CallBlock([_make(head[1], with_types(head[1], texts, tools))], rest)


_ANOTHER = re.compile(r"\s*;\s*(?={)")


def _llama(text: str, last: bool, tools: Tools) -> CallBlock:
    body, calls = text.removeprefix("<|python_tag|>"), list[WrittenCall]()
    tagged = body != text
    if tagged and not body.lstrip().startswith("{"):
        (name, arguments), end = read_call(body, 0)
        return CallBlock([_make(name.removesuffix(".call"), arguments)], body[end:])
    while True:
        value, body = _decode(body)
        keys = value if isinstance(value, dict) else ()
        if not tagged and not {"parameters", "arguments", "function"} & {*keys}:
            raise NoCall
        calls.append(_read_object(value))
        if not last and not body.strip(" \n;"):
            raise ValueError("another call may follow")
        if (following := _ANOTHER.match(body)) is None:
            return CallBlock(calls, body)
        body = body[following.end() :]


_CHANNEL = re.compile(
    r"(?:<\|start\|>assistant)?\s*(?:to=(?P<to>\S+?))?\s*<\|channel\|>\s*(?P<channel>\w+)"
    r"(?:\s+to=(?P<late>[^\s<]+))?[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
)
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_ENDED = re.compile("|".join(map(re.escape, _ENDS)))


def _harmony(text: str, last: bool, tools: Tools) -> CallBlock:
    for end in _ENDS:  # of a message that was shown
        if text.startswith(end):
            return CallBlock([], text.removeprefix(end))
    if (head := _CHANNEL.match(text)) is None:
        raise ValueError("a message of gpt-oss has a channel and <|message|>")
    body, to = text[head.end() :], head["to"] or head["late"]
    if to is None and head["channel"] != "analysis":
        return CallBlock([], body)
    if (ended := _ENDED.search(body)) is None and not last:
        raise ValueError("the message has no end")
    content, rest = (body, "") if ended is None else (body[: ended.start()], body[ended.end() :])
    if to is None:
        return CallBlock([], rest, content.strip())
    return CallBlock([_make(to.removeprefix("functions."), content.strip())], rest)


def _lfm(text: str, last: bool, tools: Tools) -> CallBlock:
    calls, end = read_calls(text, len("<|tool_call_start|>"))
    rest = _closed(text[end:], "<|tool_call_end|>", last)
    return CallBlock([_make(*call) for call in calls], rest)


_CALL_OF = re.compile(r"<\|tool_call>call:([\w.-]+)\s*(?={)")


def _gemma(text: str, last: bool, tools: Tools) -> CallBlock:
    if (head := _CALL_OF.match(text)) is None:
        raise ValueError("the call does not begin with call:NAME{")
    arguments, end = read_value(text, head.end())
    return CallBlock([_make(head[1], arguments)], _closed(text[end:], "<tool_call|>", last))


_TAGGED = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?={)")


def _mistral(text: str, last: bool, tools: Tools) -> CallBlock:
    if (head := _TAGGED.match(text)) is not None:
        arguments, rest = _decode(text[head.end() :])
        return CallBlock([_make(head[1], arguments)], rest)
    values, rest = _decode(text.removeprefix("[TOOL_CALLS]"))
    listed = values if isinstance(values, list) else [values]
    return CallBlock([_read_object(value) for value in listed], rest)


# In this order, as one's sign may stand in another's template.
FORMATS = {
    x.name: x
    for x in (
        CallFormat(
            "gpt-oss",
            ("<|channel|>commentary",),
            ("<|channel|>", "<|start|>assistant", "to=functions.", *_ENDS),
            "<|call|>",
            _harmony,
        ),
        CallFormat(
            "lfm2",
            ("<|tool_call_start|>", "<|tool_response_start|>"),  # the first ones render no calls
            ("<|tool_call_start|>",),
            "<|tool_call_end|>",
            _lfm,
        ),
        CallFormat("gemma4", ("<|tool_call>call:",), ("<|tool_call>",), "<tool_call|>", _gemma),
        CallFormat("glm4", ("<arg_key>",), ("<tool_call>",), "</tool_call>", _glm),
        CallFormat(
            "qwen3-coder", ("<function=",), ("<tool_call>", "<function="), "</tool_call>", _xml
        ),
        CallFormat("mistral", ("[TOOL_CALLS]",), ("[TOOL_CALLS]",), "", _mistral),
        CallFormat("hermes", ("<tool_call>",), ("<tool_call>",), "</tool_call>", _hermes),
        CallFormat(
            "llama3",
            ("<|python_tag|>", '{"name": "'),
            ("<|python_tag|>", '{"name":', '{"type": "function"'),
            "",
            _llama,
        ),
    )
}
