"""A command's help: `--help` explains the options that most people need, `--help-all` all of them.

The texts are the strings below the fields of dataclasses. They are wrapped here, once, to the width
of the terminal.
"""

import ast
import dataclasses
import functools
import inspect
import itertools
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
_MAX_COLUMNS = 100
_TEXT_COLUMN = 24  # the column of an option's text
_TYPE_NAMES = {int: "INT", float: "FLOAT", str: "TEXT"}
_MAX_SHORT_CHARS = (
    160  # characters of a text in --help; --help-all has the sentences after them, too
)
_DEFAULT = "By default "  # a text with it tells the default itself


class HelpPage(NamedTuple):
    """The facts of a command's help besides its options: the attribute `HELP` of a class.

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
    """Returns True if a command line asks for help."""
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
        columns = min(_MAX_COLUMNS, shutil.get_terminal_size((80, 24)).columns)
        print(help_text(kind, script, HELP_ALL in args, columns, default))
        sys.exit(0)


def option_forms(kind: type, default: Any = None) -> dict[str, str]:
    """Returns the form of the value of each option by its flag: {"--rank": "INT", "--full": ""}.

    Args:
      kind, default: see `show_help`.
    """
    forms = {}
    for _, rows in _option_groups(kind, default):
        for row in rows:
            flag, _, form = row.head.partition(" ")
            forms[flag] = form
    return forms


def help_text(kind: type, script: str, everything: bool, columns: int, default: Any = None) -> str:
    """Returns the help of a command.

    Args:
      kind, script, default: see `show_help`.
      everything: whether to explain all options, or those of `HELP` alone.
      columns: the width of the terminal.
    """
    page: HelpPage = kind.HELP  # type: ignore[attr-defined]
    needed_names = page.first.split()
    rows_by_name: dict[str, _Row] = {}
    further_groups: dict[str, list[_Row]] = {}
    for title, rows in _option_groups(kind, default):
        for row in rows:
            rows_by_name[row.name] = row
            if row.name not in needed_names:
                further_groups.setdefault(title, []).append(row)
    needed_rows = [rows_by_name[name] for name in needed_names]
    if not everything:
        needed_rows = [row._replace(text=_shorten_text(row.text)) for row in needed_rows]
    sections = [
        f"usage: {program(script)} [options]",
        textwrap.fill(_one_line(kind.__doc__), columns),
        _format_section("The options that most people need", needed_rows, columns),
    ]
    if everything:
        for title, further_rows in further_groups.items():
            sections.append(_format_section(title, further_rows, columns))
    elif further_groups:
        sections.append(_list_names(further_groups, columns))
    example = program(script, *shlex.split(page.example))
    sections.append(f"An example:\n  {example}")
    return "\n\n".join(sections)


def _shorten_text(text: str) -> str:
    """Returns a text's first sentences, and the sentences about defaults."""
    first_sentence, *sentences = re.split(r"(?<=[.)]) (?=[A-Z(])", text)
    short_text = [first_sentence]
    n_chars = len(first_sentence)
    for sentence in sentences:
        n_chars += len(sentence)
        is_about_default = sentence.startswith((_DEFAULT, "("))
        if is_about_default or n_chars < _MAX_SHORT_CHARS:
            short_text.append(sentence)
    return " ".join(short_text)


def _format_section(title: str, rows: Sequence[_Row], columns: int) -> str:
    """Returns a title, and the options below it."""
    lines = [f"{title}:"]
    for row in rows:
        lines += _format_option(row, columns)
    return "\n".join(lines)


def _format_option(row: _Row, columns: int) -> Iterator[str]:
    """Yields the lines of an option: its head, with its text beside or below it."""
    indent = " " * _TEXT_COLUMN
    fold = functools.partial(
        textwrap.wrap, width=columns, break_on_hyphens=False, break_long_words=False
    )
    head = f"  {row.head}"
    if len(head) + 2 <= _TEXT_COLUMN:
        yield from fold(row.text, initial_indent=head.ljust(_TEXT_COLUMN), subsequent_indent=indent)
    else:
        yield from fold(head, subsequent_indent="      ")
        yield from fold(row.text, initial_indent=indent, subsequent_indent=indent)


def _list_names(groups: dict[str, list[_Row]], columns: int) -> str:
    """Returns the names of options by their groups, without explanations."""
    paragraphs = [f"More options, which {HELP_ALL} explains:"]
    for title, rows in groups.items():
        flags = " ".join(row.head.split()[0] for row in rows)
        paragraph = textwrap.fill(
            f"{title}: {flags}",
            columns,
            initial_indent="  ",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        paragraphs.append(paragraph)
    return "\n".join(paragraphs)


def _option_groups(kind: type, default: Any) -> Iterator[tuple[str, Iterator[_Row]]]:
    """Yields the titles of the groups of options, and their rows."""
    hints = typing.get_type_hints(kind)
    has_groups = any(dataclasses.is_dataclass(hint) for hint in hints.values())
    if not has_groups:
        yield "Further options", _option_rows(kind, default)
        return
    for field in dataclasses.fields(kind):
        group_default = getattr(default, field.name, None)
        group: Any = hints[field.name] if group_default is None else type(group_default)
        title = _one_line(group.__doc__).split(":")[0].rstrip(".")
        yield title, _option_rows(group, group_default)


def _option_rows(kind: type, default: Any) -> Iterator[_Row]:
    """Yields a row for each option of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        value_kind, annotations = _unwrap_annotation(hints[field.name])
        value = field.default if default is None else getattr(default, field.name)
        # Annotations may hold the text and the form of a value, as `tyro` takes them.
        text = _one_line(_first_annotation(annotations, "help") or _text_below(kind, field.name))
        form = _first_annotation(annotations, "metavar") or _form(value_kind)
        name = field.name.replace("_", "-")
        is_positional = any("Positional" in repr(annotation) for annotation in annotations)
        if is_positional:
            dots = form.split()[-1] if " " in form else ""
            head = f"{name.upper()} {dots}".strip()
        elif value_kind is bool:
            head = f"--no-{name}" if field.default is True else f"--{name}"
        else:
            head = f"--{name} {form}"
        is_changed = value != field.default
        yield _Row(field.name, head, text + _shown_default(text, value, is_changed))


def _first_annotation(annotations: Sequence[Any], attribute: str) -> str | None:
    """Returns an attribute of the first annotation that defines it, or None."""
    for annotation in annotations:
        value: str | None = getattr(annotation, attribute, None)
        if value:
            return value
    return None


def _shown_default(text: str, value: Any, is_changed: bool) -> str:
    """Returns an option's default in parentheses; "" if its text names it or it has none."""
    if value is dataclasses.MISSING:
        return " (required)"
    if isinstance(value, bool) or value in (None, (), ""):
        return ""
    tells_default = _DEFAULT.lower() in text.lower()
    if tells_default and not is_changed:
        return ""
    default = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f" (default: {default})"


def _unwrap_annotation(kind: Any) -> tuple[Any, list[Any]]:
    """Returns a type without None and annotations, and the removed annotations."""
    annotations: list[Any] = []
    while True:
        origin = typing.get_origin(kind)
        arguments = typing.get_args(kind)
        if origin is typing.Annotated:
            kind = arguments[0]
            annotations += arguments[1:]
        elif origin in (typing.Union, types.UnionType):
            kind = [argument for argument in arguments if argument is not type(None)][0]
        else:
            return kind, annotations


def _form(kind: Any) -> str:
    """Returns the form of a value: "INT", "{a,b}", "TEXT ..."."""
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin is Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if origin is tuple:
        item_kinds = [argument for argument in arguments if argument is not Ellipsis]
        forms = [_form(_unwrap_annotation(item_kind)[0]) for item_kind in item_kinds]
        return f"{forms[0]} ..." if Ellipsis in arguments else " ".join(forms)
    return _TYPE_NAMES.get(kind, "TEXT")


def _text_below(kind: type, name: str) -> str:
    """Returns the string below a field, which a base class may declare."""
    for owner in kind.__mro__:
        text = _texts(owner).get(name)
        if text:
            return text
    return ""


@functools.cache
def _texts(kind: type) -> dict[str, str]:
    """Returns the strings below the fields of a class, by the fields' names."""
    class_node = _classes(kind.__module__).get(kind.__name__)
    if class_node is None:
        return {}
    texts = {}
    for field, below in itertools.pairwise(class_node.body):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if not isinstance(below, ast.Expr) or not isinstance(below.value, ast.Constant):
            continue
        if isinstance(below.value.value, str):
            texts[field.target.id] = below.value.value
    return texts


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Returns the classes in a module's source by name; {} without the source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
