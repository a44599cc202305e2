"""Reads rows of a data set, in any of the usual forms, as conversations.

A row is a chat (``messages``, with ``tools`` where there are some), a pair (``prompt``,
``completion``), ShareGPT's ``conversations``, Alpaca's ``instruction``, ``input`` and ``output``,
or a plain ``text``. A ``system`` beside turns is the first of them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.training.data.image_parts import IMAGES, TEXTS_ONLY, images_in, shown_images
from lora_jax.training.data.turns import (
    Message,
    as_list,
    parse_json,
    read_turn,
    read_turns,
    sharegpt_turn,
    shown,
)
from lora_jax.training.errors import TrainingError

Row = Mapping[str, Any]
TextOrTurns = str | list[dict[str, Any]]  # a text, or turns

NEEDED = (
    "a row needs `messages` (a list of turns with `role` and `content`), `prompt` and "
    "`completion`, `conversations` (ShareGPT), `instruction` and `output` (Alpaca), or `text`"
)
FORMS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("prompt", "completion"),
    ("conversations",),
    ("instruction", "output"),
    ("text",),
)


class PlacedRow(dict[str, Any]):
    """A row with its origin: `place` is a file and a line, as text or convertible to text."""

    __slots__ = ("place",)
    place: tuple[str, object]


def replace_values(row: Row, values: Mapping[str, Any]) -> Row:
    """Returns a row with other values and the same origin."""
    made = PlacedRow(values)
    if not isinstance(row, PlacedRow):
        return dict(made)
    made.place = row.place
    return made


class Conversation(NamedTuple):
    """The variables of a chat template: messages, tools and options.

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
    """Returns a row's name for messages: its file and line, or its number in `source`."""
    if isinstance(row, PlacedRow):
        return ", ".join(map(str, row.place))
    return f"{source}, row {number}"


def conversation(row: Row, name: str) -> Conversation:
    """Returns the conversation of a row, which errors call `name`.

    Raises:
      TrainingError: fields are missing or of the wrong type, or no assistant turn is there.
    """
    form = _form_of(row, name)
    if form == ("text",):
        if row.get(IMAGES):
            raise TrainingError(
                f"{name} has images and a `text`, but only turns can show images. Use `messages` "
                "in place of `text`."
            )
        return Conversation([], text=_text(row, "text", name))
    if form == ("messages",):
        messages = read_turns(row["messages"], "messages", name)
    elif form == ("conversations",):
        turns = []
        for index, turn in enumerate(as_list(row["conversations"], "conversations", name)):
            turns.append(sharegpt_turn(turn, index, name))
        messages = read_turns(turns, "conversations", name)
    elif form == ("instruction", "output"):
        prompt = _text(row, "instruction", name)
        if row.get("input"):
            prompt = f"{prompt}\n\n{_text(row, 'input', name)}"
        messages = _pair(prompt, _text(row, "output", name))
    elif isinstance(row["prompt"], str):
        messages = _pair(_text(row, "prompt", name), _text(row, "completion", name))
    else:  # the prompt and the completion are lists of turns
        prompt_turns = as_list(row["prompt"], "prompt", name)
        completion_turns = as_list(row["completion"], "completion", name)
        messages = read_turns([*prompt_turns, *completion_turns], "prompt", name)
    return _conversation_of(messages, row, name)


def _form_of(row: Row, name: str) -> tuple[str, ...]:
    """Returns the first of `FORMS` whose fields a row has; raises TrainingError without one."""
    for form in FORMS:
        if all(row.get(field) is not None for field in form):
            return form
    for form in FORMS:
        if row.keys() >= {*form}:
            check_nulls(row, form, name)
    raise TrainingError(f"{name} has {field_names(row)}; {NEEDED}")


def check_nulls(row: Row, fields: Sequence[str], name: str) -> None:
    """Raises TrainingError if one of these fields is null."""
    for field in fields:
        if field in row and row[field] is None:
            raise TrainingError(f"{name}: `{field}` is null. Fill it in, or remove the row.")


def check_rows(
    rows: Iterable[Row],
    source: str,
    read: Callable[[Row, str], Conversation] = conversation,
    needed: str = NEEDED,
) -> None:
    """Checks that every row can be used.

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
    """Returns the turns that the model should answer: a row's ``messages`` or ``prompt``.

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
            f"{name} has {field_names(row)}, but a row needs `prompt` (a text), or `messages` (a "
            "list of turns with `role` and `content`). Rename the fields."
        )
    value = row[field] if field == "prompt" else as_list(row[field], field, name)
    turns = as_turns(text_or_turns(value, field, name, images=images), "user")
    if turns[-1]["role"] == "assistant":
        raise TrainingError(
            f"{name} ends with an assistant's turn, so there is nothing to answer. Remove that "
            "turn."
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
    """Returns the turn of a row's `system`, or none if it is empty or already a turn."""
    system = row.get("system")
    if system is None or system == "":
        return []
    if not isinstance(system, str):
        raise TrainingError(
            f"{name}: `system` is {shown(system)}, but it must be a text, which becomes the "
            "prompt's first turn. Rename the field if it is something else."
        )
    first = turns[0]
    if first["role"] == "system":
        if first.get("content") == system:
            return []
        raise TrainingError(
            f"{name} has a `system`, but its prompt begins with another system turn. Remove one of "
            "them."
        )
    return [{"role": "system", "content": system}]


def text_or_turns(value: Any, field: str, name: str, *, images: bool = False) -> TextOrTurns:
    """Returns a field's value as a text, or as turns for a chat template.

    Raises:
      TrainingError: it is empty, or neither; or it has images, which are not allowed.
    """
    if not isinstance(value, str) or not isinstance(parse_json(value), str):
        turns = [read_turn(turn, i, name) for i, turn in enumerate(as_list(value, field, name))]
        if not images and any(images_in(turn.get("content")) for turn in turns):
            raise TrainingError(f"{name} has {TEXTS_ONLY}")
        return turns
    if not value.strip():
        raise TrainingError(f"{name}: `{field}` is empty. Fill it in, or remove the row.")
    return value


def as_turns(content: TextOrTurns, role: str) -> list[dict[str, Any]]:
    """Returns turns unchanged, and a text as one turn of `role`."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def _options(row: Row, name: str) -> Mapping[str, Any]:
    """Returns a row's `chat_template_kwargs`, checked."""
    options = parse_json(row.get("chat_template_kwargs")) or {}
    if not isinstance(options, Mapping):
        raise TrainingError(
            f"{name}: `chat_template_kwargs` is {shown(options)}, but it must be an object. "
            "Correct or remove it."
        )
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


def _objects(row: Row, field: str, name: str, remedy: str = "") -> list[Any] | None:
    """Returns a field's list of objects; None if it is empty or missing."""
    objects = parse_json(row.get(field))
    if not objects:
        return None
    if not isinstance(objects, Sequence) or not all(isinstance(item, Mapping) for item in objects):
        raise TrainingError(
            f"{name}: `{field}` is {shown(row[field])}; a list of objects is needed{remedy}"
        )
    return list(objects)


def check_text(text: str, name: str) -> None:
    """Raises TrainingError for a text with half a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half, around = text[error.start], text[max(error.start - 20, 0) : error.start + 20]
        raise TrainingError(
            f"{name} has {ascii(half)[1:-1]} in {ascii(around)}, which is one half of a surrogate "
            "pair and no character. Write the whole character, or remove it."
        ) from None


def field_names(row: Row) -> str:
    """Returns the names of a row's fields, with invisible characters escaped."""
    return ", ".join(f"`{repr(str(field))[1:-1]}`" for field in row) or "nothing"
