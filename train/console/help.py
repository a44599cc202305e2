"""A command's help: `--help` explains the options that most people need, `--help-all` all of them.

The texts are the strings below the fields of dataclasses. They are wrapped here, once, to the width
of the terminal.
"""

import ast
import dataclasses
import functools
import inspect
import re
import shlex
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from train.console.program import program

HELP, HELP_ALL = ("-h", "--help"), "--help-all"
_MOST_COLUMNS = 100
_TEXT_AT = 24  # the column of an option's text
_NAMES = {int: "INT", float: "FLOAT", str: "TEXT"}
_MOST_SHOWN = 160  # characters of a text in --help; --help-all has the sentences after them, too
_DEFAULT = "By default "  # a text with it tells the default itself


class HelpPage(NamedTuple):
    """The facts of a command's help that its options do not tell: the attribute `HELP` of a class.

    Attributes:
      first: names of the options that most people need, ten at most, in the order of the page,
        separated by spaces.
      example: a command line, without the words that start the script.
    """

    first: str
    example: str


class _Row(NamedTuple):
    """An option on the page: its name, its head (the flag and its value), and its text."""

    name: str
    head: str
    text: str


def asks_for_help(args: Sequence[str]) -> bool:
    """Returns True if a command line asks for help, in the place of any work."""
    return not {*HELP, HELP_ALL}.isdisjoint(args)


def show_help(kind: type, args: Sequence[str], script: str, default: Any = None) -> None:
    """Prints the help of a command and exits with code 0, if a command line asks for it.

    Args:
      kind: a dataclass of options, or of parts with them; its `HELP` says which come first.
      args: the command line.
      script: its module: "train.sft".
      default: an instance, whose values are shown as the defaults; None for those of the classes.
    """
    if asks_for_help(args):
        columns = min(_MOST_COLUMNS, shutil.get_terminal_size((80, 24)).columns)
        print(help_text(kind, script, HELP_ALL in args, columns, default))
        sys.exit(0)


def help_text(kind: type, script: str, everything: bool, columns: int, default: Any = None) -> str:
    """Returns the help of a command.

    Args:
      kind, script, default: see `show_help`.
      everything: whether to explain all options, or those of `HELP` alone.
      columns: the width of the terminal.
    """
    page: HelpPage = kind.HELP  # type: ignore[attr-defined]
    first = page.first.split()
    groups = {title: list(rows) for title, rows in _groups(kind, default)}
    by_name = {row.name: row for rows in groups.values() for row in rows}
    rest = {
        title: more
        for title, rows in groups.items()
        if (more := [row for row in rows if row.name not in first])
    }
    most_needed = [by_name[name] for name in first]
    if not everything:
        most_needed = [row._replace(text=_shortened(row.text)) for row in most_needed]
    parts = [
        f"usage: {program(script)} [options]",
        textwrap.fill(_one_line(kind.__doc__), columns),
        _section("The options that most people need", most_needed, columns),
    ]
    if everything:
        parts += [_section(title, rows, columns) for title, rows in rest.items()]
    elif rest:
        parts.append(_list_names(rest, columns))
    words = program(script, *shlex.split(page.example))
    return "\n\n".join([*parts, f"An example:\n  {words}"])


def _shortened(text: str) -> str:
    """Returns a text's first sentences, and those about defaults."""
    first, *others = re.split(r"(?<=[.)]) (?=[A-Z(])", text)
    kept, length = [first], len(first)
    for sentence in others:
        length += len(sentence)
        if length < _MOST_SHOWN or sentence.startswith((_DEFAULT, "(")):
            kept.append(sentence)
    return " ".join(kept)


def _section(title: str, rows: Sequence[_Row], columns: int) -> str:
    return "\n".join([f"{title}:", *(line for row in rows for line in _lines(row, columns))])


def _lines(row: _Row, columns: int) -> Iterator[str]:
    """Yields the lines of an option: its head, and its text beside or below it."""
    indent = " " * _TEXT_AT
    fold = functools.partial(
        textwrap.wrap, width=columns, break_on_hyphens=False, break_long_words=False
    )
    head = f"  {row.head}"
    if len(head) + 2 <= _TEXT_AT:
        yield from fold(row.text, initial_indent=head.ljust(_TEXT_AT), subsequent_indent=indent)
    else:
        yield from fold(head, subsequent_indent="      ")
        yield from fold(row.text, initial_indent=indent, subsequent_indent=indent)


def _list_names(groups: dict[str, list[_Row]], columns: int) -> str:
    """Returns the names of options by their groups, without explanations."""
    paragraphs = [
        textwrap.fill(
            f"{title}: {' '.join(row.head.split()[0] for row in rows)}",
            columns,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        for title, rows in groups.items()
    ]
    return "\n".join([f"More options, which {HELP_ALL} explains:", *paragraphs])


def _groups(kind: type, default: Any) -> Iterator[tuple[str, Iterator[_Row]]]:
    """Yields the titles of the groups of options, and their rows."""
    hints = typing.get_type_hints(kind)
    parts = {name: part for name, part in hints.items() if dataclasses.is_dataclass(part)}
    if not parts:
        yield "Further options", _rows(kind, default)
        return
    for field in dataclasses.fields(kind):
        own = getattr(default, field.name, None)
        part: Any = type(own) if own is not None else parts[field.name]
        yield _one_line(part.__doc__).split(":")[0].rstrip("."), _rows(part, own)


def _rows(kind: type, default: Any) -> Iterator[_Row]:
    """Yields a row for each option of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        plain, extras = _unwrapped(hints[field.name])
        own = field.default if default is None else getattr(default, field.name)
        name = field.name.replace("_", "-")
        # Annotations may hold the text and the form of a value, as `tyro` takes them.
        text = next((x.help for x in extras if getattr(x, "help", None)), None)
        text = _one_line(text or _text_below(kind, field.name))
        form = next((x.metavar for x in extras if getattr(x, "metavar", None)), _form(plain))
        if any("Positional" in repr(extra) for extra in extras):
            head = f"{name.upper()} {form.split()[-1] if ' ' in form else ''}".strip()
        elif plain is bool:
            head = f"--no-{name}" if field.default is True else f"--{name}"
        else:
            head = f"--{name} {form}"
        yield _Row(field.name, head, text + _shown_default(text, own, own != field.default))


def _shown_default(text: str, value: Any, changed: bool) -> str:
    """Returns an option's default in parentheses; "" where its text tells it or there is none."""
    if value is dataclasses.MISSING:
        return " (required)"
    if isinstance(value, bool) or value in (None, (), ""):
        return ""
    if not changed and _DEFAULT.lower() in text.lower():
        return ""
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f" (default: {shown})"


def _unwrapped(kind: Any) -> tuple[Any, list[Any]]:
    """Returns a type without None and annotations, and these annotations."""
    extras: list[Any] = []
    while True:
        if typing.get_origin(kind) is typing.Annotated:
            kind, *more = typing.get_args(kind)
            extras += more
        elif typing.get_origin(kind) in (typing.Union, types.UnionType):
            kind = next(each for each in typing.get_args(kind) if each is not type(None))
        else:
            return kind, extras


def _form(kind: Any) -> str:
    """Returns the form of a value: "INT", "{a,b}", "TEXT ..."."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if origin is tuple:
        forms = [_form(_unwrapped(each)[0]) for each in arguments if each is not Ellipsis]
        return f"{forms[0]} ..." if Ellipsis in arguments else " ".join(forms)
    return _NAMES.get(kind, "TEXT")


def _text_below(kind: type, name: str) -> str:
    """Returns the string below a field; below that of a class above, where it has none."""
    return next((text for each in kind.__mro__ if (text := _texts(each).get(name))), "")


@functools.cache
def _texts(kind: type) -> dict[str, str]:
    """Returns the strings below the fields of a class, by the fields' names."""
    nodes = _classes(kind.__module__).get(kind.__name__)
    pairs = zip(nodes.body, nodes.body[1:], strict=False) if nodes else ()
    return {
        field.target.id: below.value.value
        for field, below in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Returns the classes of a module, by name; none where its source is not there."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
