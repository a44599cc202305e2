"""Reads rows of a dataset, in any of the usual forms, as conversations.

A row is a chat (``messages``, with ``tools`` where there are some), a pair (``prompt``,
``completion``), ShareGPT's ``conversations``, Alpaca's ``instruction``, ``input`` and ``output``,
or a plain ``text``. A ``system`` beside turns is the first of them.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.training.data.image_parts import (
    IMAGES,
    TEXTS_ONLY,
    images_in,
    is_image,
    is_text,
    shown_images,
)
from lora_jax.training.errors import TrainingError

Message = Mapping[str, Any]
Row = Mapping[str, Any]
TextOrTurns = str | list[dict[str, Any]]  # a text, or turns

NEEDED = (
    "a row needs `messages` (a list of turns with `role` and `content`), `prompt` and "
    "`completion`, `conversations` (ShareGPT), `instruction` and `output` (Alpaca), or `text`"
)
_A_TURN = "a turn needs `role` and `content`, two texts"
# ShareGPT's names of the roles.
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"chatgpt": "assistant", "system": "system", "tool": "tool", "observation": "tool"}
_ROLES |= {"function_response": "tool", "function_call": "function_call"}
_USUAL = {"function_call": "'assistant', with `tool_calls`"}
FORMS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("prompt", "completion"),
    ("conversations",),
    ("instruction", "output"),
    ("text",),
)


class PlacedRow(dict[str, Any]):
    """A row that knows where it was read: `place` is a file and a line, as text or with a `str`."""

    __slots__ = ("place",)
    place: tuple[str, object]


def replace_values(row: Row, values: Mapping[str, Any]) -> Row:
    """Returns a row with other values, of the same place."""
    made = PlacedRow(values)
    if not isinstance(row, PlacedRow):
        return dict(made)
    made.place = row.place
    return made


class Conversation(NamedTuple):
    """The variables of a chat template.

    Attributes:
      messages: the turns, as the template gets them; [] for a plain text.
      tools: the tools that the template gets; None for none.
      options: further variables of the template (`chat_template_kwargs`, `documents`).
      text: a plain text, of which every token counts.
      images: the images of the turns' parts of the type "image", in their order.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    options: Mapping[str, Any] = {}
    text: str | None = None
    images: Sequence[Any] = ()


def name_of(row: Row, source: str, number: int) -> str:
    """Returns a row's name in messages: its file and line, or its number in `source`, from 1."""
    if isinstance(row, PlacedRow):
        return ", ".join(map(str, row.place))
    return f"{source}, row {number}"


def conversation(row: Row, name: str) -> Conversation:
    """Returns the turns of a row that is called `name` in errors.

    Raises:
      TrainingError: fields are missing or of the wrong type, or no assistant turn is there.
    """
    form = next((f for f in FORMS if all(row.get(field) is not None for field in f)), None)
    if form is None:
        for fields in FORMS:
            if row.keys() >= {*fields}:
                check_nulls(row, fields, name)
        raise TrainingError(f"{name} has {field_names(row)}; {NEEDED}")
    if form == ("text",):
        if row.get(IMAGES):
            raise TrainingError(f"{name} has images and a `text`: only turns show images")
        return Conversation([], text=_text(row, "text", name))
    if form == ("messages",):
        messages = _turns(row["messages"], "messages", name)
    elif form == ("conversations",):
        turns = enumerate(_listed(row["conversations"], "conversations", name))
        messages = _turns(
            [_sharegpt_turn(turn, index, name) for index, turn in turns], "conversations", name
        )
    elif form == ("instruction", "output"):
        asked = _text(row, "instruction", name)
        if row.get("input"):
            asked = f"{asked}\n\n{_text(row, 'input', name)}"
        messages = _pair(asked, _text(row, "output", name))
    elif isinstance(row["prompt"], str):
        messages = _pair(_text(row, "prompt", name), _text(row, "completion", name))
    else:  # both are lists of turns
        both = (_listed(row[field], field, name) for field in form)
        messages = _turns([turn for turns in both for turn in turns], "prompt", name)
    return _conversation_of(messages, row, name)


def check_nulls(row: Row, fields: Sequence[str], name: str) -> None:
    """Raises TrainingError if one of these fields is there and null."""
    for field in fields:
        if field in row and row[field] is None:
            raise TrainingError(f"{name}: `{field}` is null: fill it in, or leave the row out")


def check_rows(
    rows: Iterable[Row],
    source: str,
    read: Callable[[Row, str], Conversation] = conversation,
    needed: str = NEEDED,
) -> None:
    """Checks that all rows can be used.

    Args:
      rows: the rows.
      source: their name in errors.
      read: reads a row that has a name.
      needed: what a row needs, in words.

    Raises:
      TrainingError: a row cannot; names the first. Plain texts and chats must not be mixed, since
        that is most likely a mistake in the fields' names.
    """
    texts = None
    for number, row in enumerate(rows, start=1):
        is_text = read(row, name_of(row, source, number)).text is not None
        if is_text != (is_text if texts is None else texts):
            raise TrainingError(
                f"{name_of(row, source, number)} has {field_names(row)}; {needed}, and "
                f"the rows before it are {'plain texts' if texts else 'chats'}"
            )
        texts = is_text


def question(row: Row, name: str, *, images: bool = False) -> Conversation:
    """Returns the turns that a row asks a model to answer: its ``messages``, or its ``prompt``.

    Args:
      row: ``messages``, with ``tools`` where there are some; or ``prompt``, a text or such turns.
      name: what it is called in errors.
      images: whether the row may have images.

    Raises:
      TrainingError: the row has neither, one is of the wrong type, or its last turn is an answer.
    """
    field = next((f for f in ("messages", "prompt") if row.get(f) is not None), None)
    if field is None:
        raise TrainingError(
            f"{name} has {field_names(row)}; a row needs `prompt` (a text), or `messages` (a list "
            "of turns with `role` and `content`)"
        )
    value = row[field] if field == "prompt" else _listed(row[field], field, name)
    turns = as_turns(text_or_turns(value, field, name, images=images), "user")
    if turns[-1]["role"] == "assistant":
        raise TrainingError(
            f"{name} ends with an assistant's turn, and nothing is left to answer: leave that turn "
            "out"
        )
    prompt = _conversation_of(turns, row, name)
    if prompt.images and not images:
        raise TrainingError(f"{name} has {TEXTS_ONLY}")
    return prompt


def _conversation_of(turns: list[dict[str, Any]], row: Row, name: str) -> Conversation:
    turns, images = shown_images(system_turns(row, turns, name) + turns, row, name)
    tools, options = _objects(row, "tools", name), _options(row, name)
    return Conversation(turns, tools, options, images=images)


def system_turns(row: Row, turns: Sequence[Message], name: str) -> list[dict[str, Any]]:
    """Returns the turn of a row's `system`; none where it is empty, or the first of its turns."""
    system = row.get("system")
    if system is None or system == "":
        return []
    if not isinstance(system, str):
        raise TrainingError(
            f"{name}: `system` is {shown(system)}; a text is needed, the prompt's first turn: "
            "rename what is something else"
        )
    first = turns[0]
    if first["role"] == "system":
        if first.get("content") == system:
            return []
        raise TrainingError(
            f"{name} has a `system`, and its prompt begins with another turn of the system: leave "
            "one out"
        )
    return [{"role": "system", "content": system}]


def text_or_turns(value: Any, field: str, name: str, *, images: bool = False) -> TextOrTurns:
    """Returns the value of a field that has a text, as it is, or turns, as templates get them.

    Raises:
      TrainingError: it is empty, or neither; or it has images, which are not allowed.
    """
    if not isinstance(value, str) or not isinstance(_parsed(value), str):
        turns = [_turn(turn, i, name) for i, turn in enumerate(_listed(value, field, name))]
        if not images and any(images_in(turn.get("content")) for turn in turns):
            raise TrainingError(f"{name} has {TEXTS_ONLY}")
        return turns
    if not value.strip():
        raise TrainingError(f"{name}: `{field}` is empty")
    return value


def as_turns(content: TextOrTurns, role: str) -> list[dict[str, Any]]:
    """Returns turns as they are; of a text, the turn in which `role` says it."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def _options(row: Row, name: str) -> Mapping[str, Any]:
    options = _parsed(row.get("chat_template_kwargs")) or {}
    if not isinstance(options, Mapping):
        raise TrainingError(f"{name}: `chat_template_kwargs` is {shown(options)}, not an object")
    chosen = {option: value for option, value in options.items() if value is not None}
    another = ", or another name if it is not for the model"
    if documents := _objects(row, "documents", name, another):
        chosen["documents"] = documents
    return chosen


def _pair(prompt: str, completion: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _text(row: Row, field: str, name: str) -> str:
    text = row[field]
    if not isinstance(text, str) or not text:
        raise TrainingError(f"{name}: `{field}` is {shown(text)}; {NEEDED}")
    return text


def _parsed(value: Any) -> Any:
    """Returns a list or an object that stands as JSON in a text; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _listed(value: Any, field: str, name: str) -> Sequence[Any]:
    items = _parsed(value)
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise TrainingError(f"{name}: `{field}` is {shown(value)}; a list of turns is needed")
    return items


def _turns(messages: Any, field: str, name: str) -> list[dict[str, Any]]:
    turns = [_turn(turn, i, name) for i, turn in enumerate(_listed(messages, field, name))]
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise TrainingError(f"{name} has no assistant turn to learn from, only {', '.join(roles)}")
    if roles[0] == "assistant":
        raise TrainingError(
            f"{name} begins with an assistant turn; there is nothing that it answers"
        )
    if all(turn.get("weight") == 0 for turn in turns if turn["role"] == "assistant"):
        raise TrainingError(
            f"{name}: all assistant turns have the weight 0, and there is nothing to learn: leave "
            "the row out"
        )
    return turns


def _turn(turn: Any, index: int, name: str) -> dict[str, Any]:
    """Returns a turn without fields that are None: Parquet adds those that it lacks."""
    if not isinstance(turn, Mapping):
        raise TrainingError(f"{name}: turn {index} is {shown(turn)}; {_A_TURN}")
    role, content = turn.get("role"), turn.get("content")
    kept = {k: v for k, v in turn.items() if v is not None or k == "content"}
    if not isinstance(role, str):
        raise TrainingError(f"{name}: `role` of turn {index} is {shown(role)}; {_A_TURN}")
    if (usual := _ROLES.get(role.strip().lower(), role)) != role:
        raise TrainingError(
            f"{name}: `role` of turn {index} is {shown(role)}, which chat templates call "
            f"{_USUAL.get(usual, repr(usual))}"
        )
    _check_weight(kept, role, f"{name}: `weight` of turn {index}")
    if calls := _parsed(kept.pop("tool_calls", None)):
        kept["tool_calls"] = _calls(calls, role, f"{name}: `tool_calls` of turn {index}")
    if isinstance(content, list) and content and all(map(is_text, content)):
        content = kept["content"] = "\n".join(part["text"] for part in content)  # as servers do
    parts = content if isinstance(content, list) else ()
    if images_in(content) and all(is_text(part) or is_image(part) for part in parts):
        return kept
    if content is None and calls or role == "tool" and content is not None:
        return kept
    if not isinstance(content, str):
        raise TrainingError(f"{name}: `content` of turn {index} is {shown(content)}; {_A_TURN}")
    return kept


def _check_weight(turn: Message, role: str, what: str) -> None:
    weight = turn.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise TrainingError(f"{what} is {shown(weight)}: 0 (not learned) or 1 is needed")
    if "weight" in turn and role != "assistant":
        raise TrainingError(
            f"{what} belongs to the role {role!r}: only turns of the assistant are weighed, leave "
            "it out"
        )


def _calls(calls: Any, role: str, what: str) -> list[dict[str, Any]]:
    """Returns the calls of a turn; arguments that are JSON as text become objects.

    Servers do the same before they render a chat, since most templates write arguments as JSON: a
    text would be quoted twice.
    """
    if role != "assistant":
        raise TrainingError(f"{what} are of the role {role!r}; only an assistant calls tools")
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise TrainingError(f"{what} is {shown(calls)}; a list of calls is needed")
    parsed = []
    for call in calls:
        function = call.get("function") or call if isinstance(call, Mapping) else None
        if function is None or not isinstance(function.get("name"), str):
            raise TrainingError(
                f"{what} has {shown(call)}; a call needs `function` with `name` and `arguments`"
            )
        arguments = _parsed(function.get("arguments", {}))
        if not isinstance(arguments, Mapping):
            raise TrainingError(
                f"{what}: `arguments` of {function['name']} is {shown(function['arguments'])}; an "
                "object is needed, or the JSON of one"
            )
        made = {**function, "arguments": arguments}
        parsed.append({**call, "function": made} if call.get("function") else made)
    return parsed


def _objects(row: Row, field: str, name: str, remedy: str = "") -> list[Any] | None:
    """Returns a field that holds a list of objects; None where it is empty or missing."""
    objects = _parsed(row.get(field))
    if not objects:
        return None
    if not isinstance(objects, Sequence) or not all(isinstance(item, Mapping) for item in objects):
        raise TrainingError(
            f"{name}: `{field}` is {shown(row[field])}; a list of objects is needed{remedy}"
        )
    return list(objects)


def _sharegpt_turn(turn: Any, index: int, name: str) -> Any:
    """Returns a ShareGPT turn (`from`, `value`) with `role` and `content`; others unchanged."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    role, value = _ROLES.get(turn["from"]), turn.get("value")
    if role is None:
        raise TrainingError(
            f"{name}: `from` of turn {index} is {shown(turn['from'])}; one of "
            f"{', '.join(_ROLES)} is needed"
        )
    if role == "function_call":
        calls = _parsed(value)
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "content": None, "tool_calls": calls}
    return {"role": role, "content": value}


def check_text(text: str, name: str) -> None:
    """Raises TrainingError for a text that has half of a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half, around = text[error.start], text[max(error.start - 20, 0) : error.start + 20]
        raise TrainingError(
            f"{name} has {ascii(half)[1:-1]} in {ascii(around)}, one half of a surrogate pair, "
            "which is no character: write the whole character, or take it out"
        ) from None


def field_names(row: Row) -> str:
    """Returns the names of a row's fields, with what is invisible in them written out."""
    return ", ".join(f"`{repr(str(field))[1:-1]}`" for field in row) or "nothing"


def shown(value: Any) -> str:
    """Returns the beginning of a value's `repr`."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
