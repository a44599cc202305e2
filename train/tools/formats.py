"""The formats in which models write calls of tools, and a reader for each.

A format names the texts that begin a block, and reads the block that a text begins with.
"""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from train.tools.contract import ToolCall
from train.tools.literals import read_call, read_calls, read_value
from train.tools.schemas import Tools, convert_arguments


class NoCall(Exception):
    """The error for a text that looks like the start of a call but is plain text."""


class WrittenCall(NamedTuple):
    """A call together with the text of its arguments.

    Attributes:
      call: the call.
      text: its arguments as JSON, or as the model wrote them.
    """

    call: ToolCall
    text: str


class CallBlock(NamedTuple):
    """A part of an answer that contains calls or thoughts.

    Attributes:
      calls: the calls in it.
      text_after: the text that follows it.
      thinking: what is thought in it.
    """

    calls: list[WrittenCall]
    text_after: str
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


def _written_call(name: str, arguments: Any, problem: str | None = None) -> WrittenCall:
    """Returns a call from its arguments or their JSON; bad arguments set its `problem`."""
    if isinstance(arguments, str):
        text = arguments
        try:
            arguments = json.loads(text) if text.strip() else {}
        except ValueError as error:
            problem = problem or f"the arguments are not JSON: {error}"
    else:
        text = json.dumps(arguments, ensure_ascii=False)
    if not problem and not isinstance(arguments, dict):
        problem = f"the arguments must be an object, but they are {text[:80]}"
    return WrittenCall(ToolCall(name, None if problem else arguments, problem), text)


def _read_json(text: str) -> tuple[Any, str]:
    """Reads JSON at the beginning of a text; returns it and the rest."""
    text = text.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the call is not JSON: {error}") from None
    return value, text[end:]


def _read_object(value: Any) -> WrittenCall:
    """Returns the call in an object with `name` and `arguments`."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("the call is not an object with `name` and `arguments`")
    arguments = value.get("arguments", value.get("parameters"))
    return _written_call(value["name"], {} if arguments is None else arguments)


def _skip_closing_mark(text: str, close: str, is_end: bool) -> str:
    """Returns the text after a closing mark, which may be missing at the end of an answer.

    Args:
      text: the text after a call.
      close: the text that must close the call.
      is_end: whether `text` is the answer's end.
    """
    text = text.lstrip()
    is_cut_off = is_end and not text
    if not text.startswith(close) and not is_cut_off:
        raise ValueError(f"{close} is missing after the call")
    return text.removeprefix(close)


def _read_hermes(text: str, is_end: bool, tools: Tools) -> CallBlock:
    """Reads <tool_call>, an object, and </tool_call>."""
    value, text_after = _read_json(text.removeprefix("<tool_call>"))
    text_after = _skip_closing_mark(text_after, "</tool_call>", is_end)
    return CallBlock([_read_object(value)], text_after)


def _read_arguments(text: str, pattern: re.Pattern[str]) -> tuple[dict[str, str], str]:
    """Returns the argument texts at the start of a text, by name, and the remaining text."""
    texts: dict[str, str] = {}
    argument = pattern.match(text)
    while argument is not None:
        texts[argument[1].strip()] = argument[2]
        text = text[argument.end() :]
        argument = pattern.match(text)
    return texts, text


_XML_FUNCTION = re.compile(r"(?:<tool_call>\s*)?<function=([^\n>]+)>")
_XML_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _read_qwen3_coder(text: str, is_end: bool, tools: Tools) -> CallBlock:
    """Reads <function=NAME> with <parameter=NAME> blocks, which <tool_call> may surround."""
    head = _XML_FUNCTION.match(text)
    if head is None:
        raise ValueError("the call does not begin with <function=NAME>")
    name = head[1].strip()
    argument_texts, text_after = _read_arguments(text[head.end() :], _XML_PARAMETER)
    text_after = _skip_closing_mark(text_after, "</function>", is_end)
    if text.startswith("<tool_call>"):
        text_after = _skip_closing_mark(text_after, "</tool_call>", is_end)
    return CallBlock(
        [_written_call(name, convert_arguments(name, argument_texts, tools))], text_after
    )


_GLM_NAME = re.compile(r"<tool_call>\s*([^\s<]+)")
_GLM_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _read_glm(text: str, is_end: bool, tools: Tools) -> CallBlock:
    """Reads <tool_call>, a name, pairs of <arg_key> and <arg_value>, and </tool_call>."""
    head = _GLM_NAME.match(text)
    if head is None:
        raise ValueError("the call does not begin with the name of a tool")
    name = head[1]
    argument_texts, text_after = _read_arguments(text[head.end() :], _GLM_ARGUMENT)
    text_after = _skip_closing_mark(text_after, "</tool_call>", is_end)
    return CallBlock(
        [_written_call(name, convert_arguments(name, argument_texts, tools))], text_after
    )


_NEXT_LLAMA_CALL = re.compile(r"\s*;\s*(?={)")


def _read_llama(text: str, is_end: bool, tools: Tools) -> CallBlock:
    """Reads objects that semicolons separate, or a call of a built-in tool in Python's syntax."""
    text_after = text.removeprefix("<|python_tag|>")
    has_tag = text_after != text
    if has_tag and not text_after.lstrip().startswith("{"):
        (name, arguments), end = read_call(text_after, 0)
        return CallBlock([_written_call(name.removesuffix(".call"), arguments)], text_after[end:])
    calls: list[WrittenCall] = []
    while True:
        value, text_after = _read_json(text_after)
        fields = set(value) if isinstance(value, dict) else set()
        looks_like_call = bool(fields & {"parameters", "arguments", "function"})
        if not has_tag and not looks_like_call:
            raise NoCall
        calls.append(_read_object(value))
        if not is_end and not text_after.strip(" \n;"):
            raise ValueError("another call may follow")
        separator = _NEXT_LLAMA_CALL.match(text_after)
        if separator is None:
            return CallBlock(calls, text_after)
        text_after = text_after[separator.end() :]


_HARMONY_HEAD = re.compile(
    r"(?:<\|start\|>assistant)?\s*(?:to=(?P<to>\S+?))?\s*<\|channel\|>\s*(?P<channel>\w+)"
    r"(?:\s+to=(?P<late>[^\s<]+))?[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
)
_HARMONY_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_HARMONY_END = re.compile("|".join(map(re.escape, _HARMONY_ENDS)))


def _read_gpt_oss(text: str, is_end: bool, tools: Tools) -> CallBlock:
    """Reads a message's header, and its content unless the message is for the user."""
    for end in _HARMONY_ENDS:  # of a message that was shown
        if text.startswith(end):
            return CallBlock([], text.removeprefix(end))
    head = _HARMONY_HEAD.match(text)
    if head is None:
        raise ValueError("the message needs a channel and <|message|>")
    body = text[head.end() :]
    recipient = head["to"] or head["late"]
    is_for_user = recipient is None and head["channel"] != "analysis"
    if is_for_user:
        return CallBlock([], body)
    match = _HARMONY_END.search(body)
    if match is not None:
        content = body[: match.start()].strip()
        text_after = body[match.end() :]
    elif is_end:
        content = body.strip()
        text_after = ""
    else:
        raise ValueError("the message has no end")
    if recipient is None:
        return CallBlock([], text_after, thinking=content)
    return CallBlock([_written_call(recipient.removeprefix("functions."), content)], text_after)


def _read_lfm(text: str, is_end: bool, tools: Tools) -> CallBlock:
    """Reads a list of calls in Python's syntax between two special tokens."""
    calls, end = read_calls(text, len("<|tool_call_start|>"))
    text_after = _skip_closing_mark(text[end:], "<|tool_call_end|>", is_end)
    return CallBlock([_written_call(name, arguments) for name, arguments in calls], text_after)


_GEMMA_HEAD = re.compile(r"<\|tool_call>call:([\w.-]+)\s*(?={)")


def _read_gemma(text: str, is_end: bool, tools: Tools) -> CallBlock:
    """Reads <|tool_call>call:NAME, a mapping without quotes, and <tool_call|>."""
    head = _GEMMA_HEAD.match(text)
    if head is None:
        raise ValueError("the call does not begin with call:NAME{")
    arguments, end = read_value(text, head.end())
    text_after = _skip_closing_mark(text[end:], "<tool_call|>", is_end)
    return CallBlock([_written_call(head[1], arguments)], text_after)


_MISTRAL_HEAD = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?={)")


def _read_mistral(text: str, is_end: bool, tools: Tools) -> CallBlock:
    """Reads [TOOL_CALLS] with a name and its arguments, or with a list of objects."""
    head = _MISTRAL_HEAD.match(text)
    if head is not None:
        arguments, text_after = _read_json(text[head.end() :])
        return CallBlock([_written_call(head[1], arguments)], text_after)
    value, text_after = _read_json(text.removeprefix("[TOOL_CALLS]"))
    objects = value if isinstance(value, list) else [value]
    return CallBlock([_read_object(call) for call in objects], text_after)


_FORMATS_IN_ORDER = (  # as one's sign may stand in another's template
    CallFormat(
        name="gpt-oss",
        signs=("<|channel|>commentary",),
        marks=("<|channel|>", "<|start|>assistant", "to=functions.", *_HARMONY_ENDS),
        close="<|call|>",
        read=_read_gpt_oss,
    ),
    CallFormat(
        name="lfm2",
        signs=("<|tool_call_start|>", "<|tool_response_start|>"),  # the first ones render no calls
        marks=("<|tool_call_start|>",),
        close="<|tool_call_end|>",
        read=_read_lfm,
    ),
    CallFormat(
        name="gemma4",
        signs=("<|tool_call>call:",),
        marks=("<|tool_call>",),
        close="<tool_call|>",
        read=_read_gemma,
    ),
    CallFormat(
        name="glm4",
        signs=("<arg_key>",),
        marks=("<tool_call>",),
        close="</tool_call>",
        read=_read_glm,
    ),
    CallFormat(
        name="qwen3-coder",
        signs=("<function=",),
        marks=("<tool_call>", "<function="),
        close="</tool_call>",
        read=_read_qwen3_coder,
    ),
    CallFormat(
        name="mistral",
        signs=("[TOOL_CALLS]",),
        marks=("[TOOL_CALLS]",),
        close="",
        read=_read_mistral,
    ),
    CallFormat(
        name="hermes",
        signs=("<tool_call>",),
        marks=("<tool_call>",),
        close="</tool_call>",
        read=_read_hermes,
    ),
    CallFormat(
        name="llama3",
        signs=("<|python_tag|>", '{"name": "'),
        marks=("<|python_tag|>", '{"name":', '{"type": "function"'),
        close="",
        read=_read_llama,
    ),
)
FORMATS = {form.name: form for form in _FORMATS_IN_ORDER}
