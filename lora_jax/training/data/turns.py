"""Reads and checks the turns of chats: roles, contents, tool calls and weights.

The name of a row, and the label of a field in it, begin the messages of errors.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.training.data.image_parts import images_in, is_image, is_text
from lora_jax.training.errors import TrainingError

Message = Mapping[str, Any]

_A_TURN = "a turn needs `role` and `content`, two texts. Correct the turn."
# ShareGPT's names of the roles.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"chatgpt": "assistant", "system": "system", "tool": "tool", "observation": "tool"}
_ROLES |= {"function_response": "tool", "function_call": "function_call"}
_USUAL = {"function_call": "'assistant', with `tool_calls`"}


def read_turns(messages: Any, field: str, name: str) -> list[dict[str, Any]]:
    """Returns the turns of a field, of which the loss counts at least one.

    Raises:
      TrainingError: a turn is malformed, or none of the assistant's has a weight.
    """
    turns = [read_turn(turn, i, name) for i, turn in enumerate(as_list(messages, field, name))]
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise TrainingError(
            f"{name} has no assistant turn to learn from, only {', '.join(roles)}. Add an answer, "
            "or remove the row."
        )
    if roles[0] == "assistant":
        raise TrainingError(
            f"{name} begins with an assistant turn, which answers nothing. Add a turn of the user "
            "before it, or remove the row."
        )
    if all(turn.get("weight") == 0 for turn in turns if turn["role"] == "assistant"):
        raise TrainingError(
            f"{name}: all assistant turns have the weight 0, so there is nothing to learn. Remove "
            "the row."
        )
    return turns


def read_turn(turn: Any, index: int, name: str) -> dict[str, Any]:
    """Returns a turn without None fields, which Parquet adds for missing ones."""
    if not isinstance(turn, Mapping):
        raise TrainingError(f"{name}: turn {index} is {shown(turn)}; {_A_TURN}")
    role: Any = turn.get("role")
    _check_role(role, f"{name}: `role` of turn {index}")
    fields = {key: value for key, value in turn.items() if value is not None or key == "content"}
    _check_weight(fields, role, f"{name}: `weight` of turn {index}")
    calls = parse_json(fields.pop("tool_calls", None))
    if calls:
        fields["tool_calls"] = _calls(calls, role, f"{name}: `tool_calls` of turn {index}")
    content: Any = turn.get("content")
    has_parts = isinstance(content, list) and bool(content)
    if has_parts and all(map(is_text, content)):
        content = "\n".join(part["text"] for part in content)  # as servers do
        fields["content"] = content
    shows_images = bool(images_in(content)) and all(
        is_text(part) or is_image(part) for part in content
    )
    only_calls = content is None and bool(calls)
    is_tool_result = role == "tool" and content is not None
    if not (isinstance(content, str) or shows_images or only_calls or is_tool_result):
        raise TrainingError(f"{name}: `content` of turn {index} is {shown(content)}; {_A_TURN}")
    return fields


def _check_role(role: Any, label: str) -> None:
    """Raises a TrainingError unless a role is a string that chat templates know."""
    if not isinstance(role, str):
        raise TrainingError(f"{label} is {shown(role)}; {_A_TURN}")
    template_role = _ROLES.get(role.strip().lower(), role)
    if template_role != role:
        raise TrainingError(
            f"{label} is {shown(role)}, which chat templates call "
            f"{_USUAL.get(template_role, repr(template_role))}"
        )


def _check_weight(turn: Message, role: str, label: str) -> None:
    """Raises a TrainingError unless a weight is 0 or 1 and belongs to an assistant turn."""
    weight = turn.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise TrainingError(
            f"{label} is {shown(weight)}, but it must be 0 (not learned) or 1. Correct the weight."
        )
    if "weight" in turn and role != "assistant":
        raise TrainingError(
            f"{label} belongs to the role {role!r}, but only turns of the assistant have weights. "
            "Remove it."
        )


def _calls(calls: Any, role: str, label: str) -> list[dict[str, Any]]:
    """Returns the tool calls of a turn, with JSON arguments parsed.

    Servers do the same before they render a chat, since most templates write arguments as JSON: a
    text would be quoted twice.
    """
    if role != "assistant":
        raise TrainingError(
            f"{label} belong to the role {role!r}, but only an assistant calls tools. Remove them, "
            "or correct the role."
        )
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise TrainingError(
            f"{label} is {shown(calls)}, but it must be a list of calls. Correct it."
        )
    return [_parsed_call(call, label) for call in calls]


def _parsed_call(call: Any, label: str) -> dict[str, Any]:
    """Returns a tool call with its arguments as an object."""
    function = None
    if isinstance(call, Mapping):
        function = call.get("function") or call
    if function is None or not isinstance(function.get("name"), str):
        raise TrainingError(
            f"{label} has {shown(call)}, but a call needs `function` with `name` and `arguments`. "
            "Correct the call."
        )
    arguments = parse_json(function.get("arguments", {}))
    if not isinstance(arguments, Mapping):
        raise TrainingError(
            f"{label}: `arguments` of {function['name']} is {shown(function['arguments'])}, but it "
            "must be an object, or an object as JSON text. Correct it."
        )
    parsed_function = {**function, "arguments": arguments}
    has_function_field = bool(call.get("function"))
    return {**call, "function": parsed_function} if has_function_field else parsed_function


def sharegpt_turn(turn: Any, index: int, name: str) -> Any:
    """Returns a ShareGPT turn (`from`, `value`) in the standard form; others unchanged."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    role = _ROLES.get(turn["from"])
    value = turn.get("value")
    if role is None:
        raise TrainingError(
            f"{name}: `from` of turn {index} is {shown(turn['from'])}, but it must be one of "
            f"{', '.join(_ROLES)}. Correct it."
        )
    if role == "function_call":
        calls = parse_json(value)
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "content": None, "tool_calls": calls}
    return {"role": role, "content": value}


def as_list(value: Any, field: str, name: str) -> Sequence[Any]:
    """Returns a field's list of turns, parsed from JSON if it is a text."""
    items = parse_json(value)
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise TrainingError(
            f"{name}: `{field}` is {shown(value)}, but it must be a list of turns. Correct it."
        )
    return items


def parse_json(value: Any) -> Any:
    """Returns the list or object in a JSON text; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def shown(value: Any) -> str:
    """Returns the `repr` of a value, shortened for messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
