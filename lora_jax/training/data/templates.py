"""Renders chats with the model's own template, and rejects content that the template would omit.

A template ignores a role, a field or a variable that it does not know. So what a chat has is looked
for in the text: as it stands, or by rendering the chat once more without it.

A field of a turn has several names of one meaning; `_FIELDS` lists the names of each meaning. A
name is hidden, and so is a turn with a field, if the template does not show it.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from lora_jax.core.types import Tokenizer
from lora_jax.training.data.rows import Conversation
from lora_jax.training.data.turns import Message, shown
from lora_jax.training.errors import TrainingError

# The tags of Jinja by which a template marks what the assistant says.
_GENERATION = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
_TAGS = re.compile(r"{%[-+]?\s*(end)?generation\s*[-+]?%}")
# A template's call for the date of today; and a macro that takes its place.
_DATES = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# Of a template that reads parts of a turn's content, and no content that is a text.
_PARTS, _TEXTS = re.compile(r"""['"]image['"]"""), re.compile(r"\bis\s+string\b")
_MACRO, _END = "{%- macro strftime_now(format) -%}", "{%- endmacro -%}"
_EXTENSIONS = ("jinja2.ext.loopcontrols",)
_SET_HERE = ("messages", "tools", "add_generation_prompt")
# Fields of a turn, by what they mean. transformers takes names of one meaning for each other.
_FIELDS = (("reasoning_content", "reasoning", "thinking"), ("name",), ("function_call",))
_LONG = 20  # characters of a text that is hardly in a rendered chat by chance
_CHANGE = " And so on."
_TOOLS_REMEDY = (
    "Use a model whose template shows tools, a template that does (--chat-template FILE; in "
    "Python, tokenizer.chat_template)"
)
_MARK = "qzjxvk"  # stands in no text


class LeftOut(NamedTuple):
    """Counts of turns with a field that the template shows only in some turns.

    Attributes:
      turns: turns that have the field.
      later: turns that the template shows with it, until other turns follow.
      never: turns that it shows without it.
    """

    turns: int
    later: int
    never: int


def template_of(tokenizer: Tokenizer, chat: Conversation) -> str:
    """Returns the chat template for a conversation; some models have a second one for tools."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    template: str = tokenizer.get_chat_template(None, chat.tools)
    return template


def tells_today(template: str) -> bool:
    """Returns True if a template includes the date on which it is rendered."""
    return bool(_DATES.search(template)) and not template.startswith(_MACRO)


def with_date(template: str, day: datetime.date) -> str:
    """Returns a template with a fixed date in place of the current one.

    Some templates tell the date (gpt-oss's, Llama 3.1's). With today's, rows become other tokens on
    another day, and a run that is resumed then goes on with other rows.

    Args:
      template: the chat template.
      day: the day to tell.

    Raises:
      TrainingError: the template tells no date.

    >>> import datetime, jinja2
    >>> from lora_jax.training.data.templates import with_date
    >>> template = with_date('Today is {{ strftime_now("%d %b %Y") }}.', datetime.date(2025, 8, 5))
    >>> jinja2.Template(template).render()
    'Today is 05 Aug 2025.'
    """
    formats = {match[2]: day.strftime(match[2]) for match in _DATES.finditer(template)}
    if not formats:
        raise TrainingError(
            "the model's chat template shows no date, so a date has no effect. Remove the date."
        )
    if template.startswith(_MACRO):  # told another day before
        template = template.partition(_END)[2]
    return f"{_MACRO}{{{{ {json.dumps(formats)}[format] }}}}{_END}{template}"


def marks_answers(template: str) -> bool:
    """Returns True if a template marks the assistant's text as generated."""
    return _GENERATION.search(template) is not None


def render(
    chat: Conversation, n: int, tokenizer: Tokenizer, *, ask: bool = False, **how: Any
) -> Any:
    """Returns the first `n` turns as rendered by the template.

    Args:
      chat: the turns, tools and variables.
      n: the number of turns.
      tokenizer: the model's.
      ask: adds what precedes an answer.
      how: further arguments of `apply_chat_template`.
    """
    turns = chat.messages[:n]
    template = template_of(tokenizer, chat)
    reads_only_parts = _PARTS.search(template) and not _TEXTS.search(template)
    if reads_only_parts:
        turns = [_content_as_parts(turn) for turn in turns]
    return tokenizer.apply_chat_template(
        turns,
        tools=chat.tools,
        add_generation_prompt=ask,
        **{**chat.options, "tokenize": False, **how},
    )


def _content_as_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """Returns a turn with its text content as a list of one part."""
    if not isinstance(turn.get("content"), str):
        return turn
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def render_prompt(chat: Conversation, tokenizer: Tokenizer) -> str:
    """Returns a chat rendered up to the start of the answer to its last turn.

    Raises:
      TrainingError: the template drops something of the chat.
    """
    n_turns = len(chat.messages)
    check_variables(chat, template_of(tokenizer, chat))
    text: str = render(chat, n_turns, tokenizer, ask=True)
    if needs_check(chat):
        rendered = Rendered(chat=chat, end=n_turns, text=text, tokenizer=tokenizer, ask=True)
        rendered.check(n_turns)
        rendered.left_out(n_turns, {})
    return text


def check_variables(chat: Conversation, template: str) -> None:
    """Raises TrainingError for a chat's variable that the template does not use."""
    if not chat.options:
        return
    template_variables = _variables(template)
    for name in chat.options:
        if name in _SET_HERE:
            raise TrainingError(
                f"`chat_template_kwargs` has `{name}`, which comes from the row itself. Remove it "
                "from `chat_template_kwargs`."
            )
        if name in template_variables:
            continue
        if name == "documents":
            raise TrainingError(
                "the model's chat template does not read `documents`. Write the documents into a "
                "turn, or remove the field."
            )
        alternatives = ", ".join(sorted(template_variables - {*_SET_HERE})) or "none"
        raise TrainingError(
            f"the model's chat template does not read `{name}` of `chat_template_kwargs`. Correct "
            f"the name, or remove it. The template reads these variables: {alternatives}."
        )


def check_template(template: str) -> None:
    """Raises TrainingError for a text that is not a valid chat template.

    >>> from lora_jax.training.data.templates import check_template
    >>> check_template("{% if %}")
    Traceback (most recent call last):
        ...
    lora_jax.training.errors.TrainingError: line 1 of the chat template is not valid Jinja \
(Expected an expression, got 'end of statement block'). Correct the template.
    """
    jinja2 = _jinja2()
    try:
        jinja2.Environment(extensions=_EXTENSIONS).from_string(_TAGS.sub("", template))
        template_variables = _variables(template)
    except jinja2.TemplateSyntaxError as error:
        raise TrainingError(
            f"line {error.lineno} of the chat template is not valid Jinja ({error.message}). "
            "Correct the template."
        ) from error
    if "messages" not in template_variables:
        raise TrainingError(
            "the chat template does not read `messages`, so all chats would become the same text. "
            "Give a Jinja template that renders `messages`."
        )


@functools.lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    """Returns the undeclared variables of a template."""
    jinja2 = _jinja2()
    tree = jinja2.Environment(extensions=_EXTENSIONS).parse(_TAGS.sub("", template))
    return frozenset(jinja2.meta.find_undeclared_variables(tree))


def _jinja2() -> ModuleType:
    """Returns the package jinja2; an ImportError says how to install it."""
    try:
        import jinja2
        import jinja2.meta
    except ImportError:
        raise ImportError(
            "chat templates need the package jinja2, which is not installed. Run pip install "
            "'lora_jax[models]'"
        ) from None
    return jinja2


def check_without_template(chat: Conversation, name: str) -> None:
    """Raises TrainingError for fields that need a template, if the model has none."""
    template_names = ["tools"] if chat.tools else []
    template_names += chat.options
    for turn in chat.messages:
        for field_names in _FIELDS:
            template_names += _fields_in(turn, field_names)
    if template_names:
        raise TrainingError(
            f"{name} has `{template_names[0]}`, but the model has no chat template to show it. "
            "Remove the field, or use a model that was made for chats."
        )


class Rendered(NamedTuple):
    """Turns of a chat with their rendered text.

    Attributes:
      chat: the chat.
      end: the number of turns that are rendered.
      text: the text that they become.
      tokenizer: the model's.
      ask: whether the beginning of an answer follows them.
    """

    chat: Conversation
    end: int
    text: str
    tokenizer: Tokenizer
    ask: bool = False

    def check(self, n: int) -> None:
        """Raises TrainingError if the text omits calls, tools, or the content of a turn."""
        for turn in self.chat.messages[:n]:
            check_calls(turn, self.text)
        self._check_tools()
        for index, turn in enumerate(self.chat.messages[:n]):
            self._check_content_shown(index, turn)

    def _check_tools(self) -> None:
        """Raises TrainingError if the text omits the name of a tool."""
        name_of_tool = {}
        for index, tool in enumerate(self.chat.tools or []):
            name = _name(tool)
            if isinstance(name, str):
                name_of_tool[index] = name
        missing_names = [name for name in name_of_tool.values() if name not in self.text]
        if missing_names:
            hidden_name, where = missing_names[0], "not in"
        else:
            hidden_names = self._hidden_tools(name_of_tool)
            if not hidden_names:
                return
            hidden_name, where = hidden_names[0], "only there where a turn says it, in"
        raise TrainingError(
            f"the model's chat template shows no tools: {hidden_name!r} is {where} "
            f"{shown(self.text)}. {_TOOLS_REMEDY}, or rows without `tools`."
        )

    def _hidden_tools(self, name_of_tool: Mapping[int, str]) -> list[str]:
        """Returns tools whose names occur in the text, but not because the template shows them.

        A name may stand in a turn as well, or in the template. With others, which stand nowhere, it
        tells whether it shows the tools.
        """
        chat = self.chat
        text_without_tools = template_of(self.tokenizer, chat) + repr((chat.messages, chat.options))
        if not any(name in text_without_tools for name in name_of_tool.values()):
            return []
        unique_names = {index: f"{_MARK}{index}_{name}" for index, name in name_of_tool.items()}
        tools = list(chat.tools or ())
        for index, unique_name in unique_names.items():
            tools[index] = _renamed_tool(tools[index], unique_name)
        try:
            text = render(chat._replace(tools=tools), self.end, self.tokenizer, ask=self.ask)
        except Exception:  # what a template refuses, it has read
            return []
        return [
            name_of_tool[index]
            for index, unique_name in unique_names.items()
            if unique_name not in text
        ]

    def _check_content_shown(self, index: int, turn: Message) -> None:
        """Raises TrainingError if the text omits the content of a non-assistant turn."""
        text = turn.get("content")
        role = turn["role"]
        if role == "assistant" or not isinstance(text, str) or not text.strip():
            return
        is_long = len(text.strip()) >= _LONG
        if role == "user" and not is_long:
            return  # all templates show users' turns
        if is_long and self._contains(text):
            return
        changed_turn = {**turn, "content": text + _CHANGE}
        if self._depends_on({index: changed_turn}):
            return
        remedy = _TOOLS_REMEDY
        if role != "tool":
            remedy = (
                "Put it into the first user turn, or give a model whose template knows this role"
            )
        raise TrainingError(
            f"the model's chat template does not show this turn of the role {role!r}: "
            f"{shown(text)} is not in {shown(self.text)}. {remedy}"
        )

    def left_out(self, n: int, texts: Mapping[int, str]) -> dict[str, LeftOut]:
        """Returns the fields that the template shows only in some of the first `n` turns.

        Args:
          n: the number of turns that are looked at.
          texts: for turns by their index, the text that ends with the turn, as far as it is known.

        Raises:
          TrainingError: the template shows a field in no turn.
        """
        counts = {}
        for field_names in _FIELDS:
            fields_of_turn = {}
            for index in range(n):
                fields = self._fields_of(index, field_names)
                if fields:
                    fields_of_turn[index] = fields
            hidden_turns = self._turns_without_fields(fields_of_turn)
            if not hidden_turns:
                continue
            # Some templates show a field until other turns follow.
            never_shown = []
            for index in hidden_turns:
                rendered = self._render_up_to(index, texts)
                if rendered._turns_without_fields({index: fields_of_turn[index]}):
                    never_shown.append(index)
            first_turn = min(fields_of_turn)
            field = fields_of_turn[first_turn][0]
            if len(never_shown) == len(fields_of_turn):
                raise TrainingError(
                    f"the model's chat template does not show `{field}` of turn {first_turn} "
                    f"({shown(self.chat.messages[first_turn][field])}). Remove the field, write it "
                    "into `content`, or use a model whose template shows it."
                )
            counts[field] = LeftOut(
                turns=len(fields_of_turn),
                later=len(hidden_turns) - len(never_shown),
                never=len(never_shown),
            )
        return counts

    def _render_up_to(self, index: int, texts: Mapping[int, str]) -> "Rendered":
        """Returns the turns up to `index`, rendered without the later turns."""
        text = texts.get(index) or render(self.chat, index + 1, self.tokenizer)
        return self._replace(end=index + 1, text=text, ask=False)

    def _fields_of(self, index: int, field_names: Iterable[str]) -> list[str]:
        """Returns the subset of `field_names` that the template must show for a turn."""
        turn = self.chat.messages[index]
        if turn["role"] == "tool" and turn.get("name") in _called_names(self.chat.messages[:index]):
            return []  # the name is that of a call, which is shown
        return _fields_in(turn, field_names)

    def _turns_without_fields(self, fields_of_turn: Mapping[int, list[str]]) -> list[int]:
        """Returns the indices of turns whose fields are missing in the text."""
        messages = self.chat.messages
        values = [
            messages[index][field] for index, fields in fields_of_turn.items() for field in fields
        ]
        turns_without_fields = {}
        for index, fields in fields_of_turn.items():
            turn = messages[index]
            # A long value that only this turn has is surely its own.
            is_in_text = any(
                values.count(turn[field]) == 1 and self._contains(turn[field], _LONG)
                for field in fields
            )
            if not is_in_text:
                turns_without_fields[index] = {
                    name: value for name, value in turn.items() if name not in fields
                }
        if not turns_without_fields:
            return []
        if not self._depends_on(turns_without_fields):
            return [*turns_without_fields]
        if len(turns_without_fields) == 1:
            return []
        return [
            index
            for index, turn in turns_without_fields.items()
            if not self._depends_on({index: turn})
        ]

    def _contains(self, content: Any, min_characters: int = 0) -> bool:
        """Returns True if the rendered text contains a text, directly or as JSON."""
        if not isinstance(content, str) or len(content.strip()) < min_characters:
            return False
        if content.strip() in self.text:
            return True
        ascii_json = json.dumps(content)[1:-1]
        unicode_json = json.dumps(content, ensure_ascii=False)[1:-1]
        return ascii_json in self.text or unicode_json in self.text

    def _depends_on(self, changed_turns: Mapping[int, Message]) -> bool:
        """Returns True if changing some turns changes the rendered text."""
        messages = []
        for index, turn in enumerate(self.chat.messages):
            messages.append(dict(changed_turns.get(index, turn)))
        chat = self.chat._replace(messages=messages)
        try:
            text: str = render(chat, self.end, self.tokenizer, ask=self.ask)
        except Exception:  # what a template refuses, it has read
            return True
        return text.rstrip() != self.text.rstrip()


def needs_check(chat: Conversation) -> bool:
    """Returns True unless a chat has only plain user and assistant texts."""
    if chat.tools:
        return True
    for turn in chat.messages:
        is_plain_role = turn["role"] in ("user", "assistant")
        has_fields = any(_fields_in(turn, field_names) for field_names in _FIELDS)
        if not is_plain_role or "tool_calls" in turn or has_fields:
            return True
    return False


def check_calls(turn: Message, text: str) -> None:
    """Raises TrainingError if the rendered turn omits one of its calls."""
    for call in turn.get("tool_calls", ()):
        name = (call.get("function") or call)["name"]
        if name not in text:
            raise TrainingError(
                f"the model's chat template shows no tool calls: {name!r} is not in "
                f"{shown(text)}. {_TOOLS_REMEDY}, or rows without calls."
            )


def _fields_in(turn: Message, fields: Iterable[str]) -> list[str]:
    """Returns the subset of `fields` that a turn has."""
    return [field for field in fields if turn.get(field)]


def _name(call: Mapping[str, Any]) -> Any:
    """Returns the name of a tool, or of a tool call."""
    return (call.get("function") or call).get("name")


def _renamed_tool(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a tool with another name."""
    function = tool.get("function")
    if function:
        return {**tool, "function": {**function, "name": name}}
    return {**tool, "name": name}


def _called_names(turns: Iterable[Message]) -> set[str]:
    """Returns the names of the tools that these turns call."""
    names = set()
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            names.add((call.get("function") or call)["name"])
    return names
