"""Renders chats with the model's own template, and refuses what the template would drop.

A template ignores a role, a field or a variable that it does not know. So what a chat has is looked
for in the text: as it stands, or by rendering the chat once more without it.
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
    "Give a model whose template knows tools, or a template that does (--chat-template FILE; in "
    "Python, tokenizer.chat_template)"
)
_MARK = "qzjxvk"  # stands in no text


class LeftOut(NamedTuple):
    """Counts turns with a field that the template shows in some turns only.

    Attributes:
      turns: turns that have the field.
      later: turns that the template shows with it, until other turns follow.
      never: turns that it shows without it.
    """

    turns: int
    later: int
    never: int


def template_of(tokenizer: Tokenizer, chat: Conversation) -> str:
    """Returns the chat template that renders a conversation; some models have one for tools."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    template: str = tokenizer.get_chat_template(None, chat.tools)
    return template


def tells_today(template: str) -> bool:
    """Returns True if a template tells the day on which it renders a chat."""
    return bool(_DATES.search(template)) and not template.startswith(_MACRO)


def with_date(template: str, day: datetime.date) -> str:
    """Returns a template that tells one day, whenever it renders a chat.

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
        raise TrainingError("the model's chat template tells no date")
    if template.startswith(_MACRO):  # told another day before
        template = template.partition(_END)[2]
    return f"{_MACRO}{{{{ {json.dumps(formats)}[format] }}}}{_END}{template}"


def marks_answers(template: str) -> bool:
    """Returns True if a template marks what the assistant says."""
    return _GENERATION.search(template) is not None


def render(
    chat: Conversation, n: int, tokenizer: Tokenizer, *, ask: bool = False, **how: Any
) -> Any:
    """Returns the first `n` turns as the template renders them.

    Args:
      chat: the turns, tools and variables.
      n: the number of turns.
      tokenizer: the model's.
      ask: adds what precedes an answer.
      how: further arguments of `apply_chat_template`.
    """
    turns, template = chat.messages[:n], template_of(tokenizer, chat)
    if _PARTS.search(template) and not _TEXTS.search(template):
        turns = [_content_as_parts(turn) for turn in turns]
    return tokenizer.apply_chat_template(
        turns,
        tools=chat.tools,
        add_generation_prompt=ask,
        **{**chat.options, "tokenize": False, **how},
    )


def _content_as_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """Returns a turn whose content, if it is a text, is a list with one part."""
    if not isinstance(turn.get("content"), str):
        return turn
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]}


def render_prompt(chat: Conversation, tokenizer: Tokenizer) -> str:
    """Returns the turns of a chat up to the beginning of the answer to the last.

    Raises:
      TrainingError: the template drops something of the chat.
    """
    n = len(chat.messages)
    check_variables(chat, template_of(tokenizer, chat))
    text: str = render(chat, n, tokenizer, ask=True)
    if needs_check(chat):
        rendered = Rendered(chat, n, text, tokenizer, ask=True)
        rendered.check(n)
        rendered.left_out(n, {})
    return text


def check_variables(chat: Conversation, template: str) -> None:
    """Raises TrainingError for a variable of a chat that its template does not read."""
    read = _variables(template) if chat.options else frozenset()
    for name in chat.options:
        if name in _SET_HERE:
            raise TrainingError(
                f"`chat_template_kwargs` has `{name}`, which comes from the row itself: leave it "
                "out there"
            )
        if name in read:
            continue
        if name == "documents":
            raise TrainingError(
                "the model's chat template does not read `documents`: write them into a turn, or "
                "leave the field out"
            )
        others = ", ".join(sorted(read - {*_SET_HERE})) or "none"
        raise TrainingError(
            f"the model's chat template does not read `{name}` of `chat_template_kwargs`: correct "
            f"the name or leave it out (variables that it reads: {others})"
        )


def check_template(template: str) -> None:
    """Raises TrainingError for a text that is no chat template.

    >>> from lora_jax.training.data.templates import check_template
    >>> check_template("{% if %}")
    Traceback (most recent call last):
        ...
    lora_jax.training.errors.TrainingError: line 1 is no Jinja: Expected an expression, got \
'end of statement block'
    """
    jinja2 = _jinja2()
    try:
        jinja2.Environment(extensions=_EXTENSIONS).from_string(_TAGS.sub("", template))
        read = _variables(template)
    except jinja2.TemplateSyntaxError as error:
        raise TrainingError(f"line {error.lineno} is no Jinja: {error.message}") from error
    if "messages" not in read:
        raise TrainingError(
            "the chat template does not read `messages`, so that all chats would be the same text: "
            "give a template of Jinja that renders them"
        )


@functools.lru_cache(maxsize=8)
def _variables(template: str) -> frozenset[str]:
    """Returns the names that a template looks up outside itself."""
    jinja2 = _jinja2()
    tree = jinja2.Environment(extensions=_EXTENSIONS).parse(_TAGS.sub("", template))
    return frozenset(jinja2.meta.find_undeclared_variables(tree))


def _jinja2() -> ModuleType:
    try:
        import jinja2
        import jinja2.meta
    except ImportError:
        raise ImportError(
            "a chat template needs the package jinja2: pip install 'lora_jax[models]'"
        ) from None
    return jinja2


def check_without_template(chat: Conversation, name: str) -> None:
    """Raises TrainingError for what only a template could show, if the model has none."""
    fields = [
        field for turn in chat.messages for fields in _FIELDS for field in _fields_in(turn, fields)
    ]
    if names := [*(["tools"] if chat.tools else []), *chat.options, *fields]:
        raise TrainingError(
            f"{name} has `{names[0]}`, and the model has no chat template to show it: leave the "
            "field out, or give a model that was made for chats"
        )


class Rendered(NamedTuple):
    """Turns of a chat as the template renders them.

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
        """Raises TrainingError if the text lacks calls, tools, or what one of `n` turns says."""
        for turn in self.chat.messages[:n]:
            check_calls(turn, self.text)
        self._check_tools()
        for index, turn in enumerate(self.chat.messages[:n]):
            self._check_said(index, turn)

    def _check_tools(self) -> None:
        tools = self.chat.tools or []
        names = {i: name for i, tool in enumerate(tools) if isinstance(name := _name(tool), str)}
        hidden = [name for name in names.values() if name not in self.text]
        for name in hidden or self._hidden_tools(names):
            where = "not in" if hidden else "only there where a turn says it, in"
            raise TrainingError(
                f"the model's chat template shows no tools: {name!r} is {where} "
                f"{shown(self.text)}. {_TOOLS_REMEDY}, or rows without `tools`"
            )

    def _hidden_tools(self, names: Mapping[int, str]) -> list[str]:
        """Returns the tools, of those whose name is in the text, that the template does not show.

        A name may stand in a turn as well, or in the template. With others, which stand nowhere, it
        tells whether it shows the tools.
        """
        chat, tools = self.chat, list(self.chat.tools or ())
        other = template_of(self.tokenizer, chat) + repr((chat.messages, chat.options))
        if not any(name in other for name in names.values()):
            return []
        new = {i: f"{_MARK}{i}_{name}" for i, name in names.items()}
        for i, name in new.items():
            function = tools[i].get("function")
            renamed = {"function": {**function, "name": name}} if function else {"name": name}
            tools[i] = {**tools[i], **renamed}
        try:
            text = render(chat._replace(tools=tools), self.end, self.tokenizer, ask=self.ask)
        except Exception:  # what a template refuses, it has read
            return []
        return [names[i] for i, name in new.items() if name not in text]

    def _check_said(self, index: int, turn: Message) -> None:
        """Raises TrainingError if the text of a turn is missing that is no assistant's."""
        text, role = turn.get("content"), turn["role"]
        if role == "assistant" or not isinstance(text, str) or not text.strip():
            return
        is_long = len(text.strip()) >= _LONG
        if is_long and self._has(text) or role == "user" and not is_long:
            return
        if self._differs({index: {**turn, "content": text + _CHANGE}}):
            return
        remedy = _TOOLS_REMEDY
        if role != "tool":
            remedy = (
                "Put it into the first user turn, or give a model whose template knows this role"
            )
        raise TrainingError(
            f"the model's chat template shows no turns of the role {role!r} here: {shown(text)} is "
            f"not in {shown(self.text)}. {remedy}"
        )

    def left_out(self, n: int, texts: Mapping[int, str]) -> dict[str, LeftOut]:
        """Returns the fields of `n` turns that the template shows in some turns only.

        Args:
          n: the number of turns that are looked at.
          texts: for turns by their index, the text that ends with the turn, as far as it is known.

        Raises:
          TrainingError: the template shows a field in no turn.
        """
        counts = {}
        for fields in _FIELDS:
            turns = {i: self._fields_of(i, fields) for i in range(n)}
            turns = {index: names for index, names in turns.items() if names}
            hidden = self._without(turns)
            if not hidden:
                continue
            never = [i for i in hidden if self._upto(i, texts)._without({i: turns[i]})]
            first, (field, *_) = next(iter(turns.items()))
            if len(never) == len(turns):
                raise TrainingError(
                    f"the model's chat template does not show `{field}` (of turn {first}: "
                    f"{shown(self.chat.messages[first][field])}): leave the field out, write it "
                    "into `content`, or give a model whose template shows it"
                )
            counts[field] = LeftOut(len(turns), len(hidden) - len(never), len(never))
        return counts

    def _upto(self, index: int, texts: Mapping[int, str]) -> "Rendered":
        """Returns the turns up to one, as they are rendered when no others follow."""
        text = texts.get(index) or render(self.chat, index + 1, self.tokenizer)
        return self._replace(end=index + 1, text=text, ask=False)

    def _fields_of(self, index: int, fields: Iterable[str]) -> list[str]:
        turn = self.chat.messages[index]
        if turn["role"] == "tool" and turn.get("name") in _called_names(self.chat.messages[:index]):
            return []  # the name is that of a call, which is shown
        return _fields_in(turn, fields)

    def _without(self, turns: Mapping[int, list[str]]) -> list[int]:
        """Returns the turns whose fields are not in the text."""
        messages = self.chat.messages
        texts = [messages[i][field] for i, fields in turns.items() for field in fields]
        unseen = {
            index: {name: value for name, value in messages[index].items() if name not in fields}
            for index, fields in turns.items()
            if not any(
                texts.count(messages[index][field]) == 1
                and self._has(messages[index][field], _LONG)
                for field in fields
            )
        }
        if not unseen or not self._differs(unseen):
            return [*unseen]
        if len(unseen) == 1:
            return []
        return [index for index, turn in unseen.items() if not self._differs({index: turn})]

    def _has(self, content: Any, least: int = 0) -> bool:
        """Returns True if a text stands in the rendered one, as it is or as JSON has it."""
        if not isinstance(content, str) or len(content.strip()) < least:
            return False
        if content.strip() in self.text:
            return True
        escaped = (json.dumps(content, ensure_ascii=only)[1:-1] for only in (True, False))
        return any(form in self.text for form in escaped)

    def _differs(self, turns: Mapping[int, Message]) -> bool:
        """Returns True if the text is another one with other turns in some places."""
        messages = [dict(turns.get(i, turn)) for i, turn in enumerate(self.chat.messages)]
        chat = self.chat._replace(messages=messages)
        try:
            text: str = render(chat, self.end, self.tokenizer, ask=self.ask)
        except Exception:  # what a template refuses, it has read
            return True
        return text.rstrip() != self.text.rstrip()


def needs_check(chat: Conversation) -> bool:
    """Returns True if a chat has more than turns of a user and an assistant, who say texts."""
    return bool(chat.tools) or any(
        turn["role"] not in ("user", "assistant")
        or "tool_calls" in turn
        or any(_fields_in(turn, fields) for fields in _FIELDS)
        for turn in chat.messages
    )


def check_calls(turn: Message, text: str) -> None:
    """Raises TrainingError if the rendered turn lacks one of its calls."""
    for call in turn.get("tool_calls", ()):
        name = (call.get("function") or call)["name"]
        if name not in text:
            raise TrainingError(
                f"the model's chat template shows no tool calls: {name!r} is not in "
                f"{shown(text)}. {_TOOLS_REMEDY}, or rows without calls"
            )


def _fields_in(turn: Message, fields: Iterable[str]) -> list[str]:
    """Returns the names, among `fields`, that a turn has."""
    return [field for field in fields if turn.get(field)]


def _name(call: Mapping[str, Any]) -> Any:
    """Returns the name of a tool, or of a call of one."""
    return (call.get("function") or call).get("name")


def _called_names(turns: Iterable[Message]) -> set[str]:
    calls = (call for turn in turns for call in turn.get("tool_calls", ()))
    return {(call.get("function") or call)["name"] for call in calls}
