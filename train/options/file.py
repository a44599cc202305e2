"""Options in a YAML file: those that `--config` names, and those that a run writes to its folder.

A file is flat: its keys are the names of the options, with hyphens or underscores, whatever groups
`--help` shows them in. Text stays as written (`token_cache: off` is the text "off", not false), and
`null` stands for an option that is not given. Numbers are YAML 1.2's, but for those that begin with
0, which are refused.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

import yaml

from lora_jax.core.paths import nearest
from train.console.errors import UserError, flag
from train.options.common import Options
from train.options.elsewhere import own_name

Config = TypeVar("Config", bound=Options)

_TAG = "tag:yaml.org,2002:"
_NEEDED = {
    bool: "true or false is needed",
    int: "a whole number is needed",
    float: "a number is needed",
    str: "a text is needed",
}
_NOT_IN_A_FILE = ("config",)
# Options that are no more, with the values that files of older runs have where nobody gave them.
_REMOVED: tuple[tuple[str, object], ...] = (("peft_experiments", []), ("peft_json", "false"))
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")
_MAX_VALUE_CHARS = 80  # characters of a value in messages


class _UnfitError(Exception):
    """A value does not fit its option; the message says what is needed."""


def parse_options_file(text: str, option: str, config: Config) -> tuple[Config, dict[str, int]]:
    """Returns the options, changed as a file says, and the line of each option in the file.

    Args:
      text: the file's content.
      option: the option that names the file, for messages.
      config: the options to begin with.

    Raises:
      UserError: the text is not YAML, or has a key or a value that no option takes.
    """
    kinds = kinds_of(config)
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    root = parse_yaml(text, option) or yaml.MappingNode(f"{_TAG}map", [])
    if not isinstance(root, yaml.MappingNode):
        raise UserError(
            f"{option}: options by their names are needed, a line each, such as 'rank: 8'"
        )
    for key, value, line in entries(root, option):
        name = key.replace("-", "_")
        location = f"{option}, line {line}"
        if (name, value.value) in _REMOVED:
            continue
        if name not in kinds:
            raise UserError(f"{location}: {_unknown(key, value, kinds, config)}")
        if name in lines:
            raise UserError(
                f"{location}: {key} is given twice, in line {lines[name]}, too: leave out one"
            )
        lines[name] = line
        values[name] = read_value(key, value, kinds[name], location)
    lines_with_values = {name: line for name, line in lines.items() if values[name] is not None}
    return replace_options(config, values), lines_with_values


def replace_options(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the options with new values, given by the names of their fields."""
    changes = {}
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        names = [option.name for option in dataclasses.fields(group) if option.name in values]
        group_values = {name: values[name] for name in names}
        changes[field.name] = dataclasses.replace(group, **group_values)
    return dataclasses.replace(config, **changes)


def as_yaml(config: Options, values: Mapping[str, Any], heading: str) -> str:
    """Returns options as a file that `parse_options_file` reads, under the names of their groups.

    Args:
      config: says which group an option is of.
      values: the options to write, as JSON has them.
      heading: the comment at the beginning.
    """
    blocks = ["".join(f"# {line}\n" for line in heading.splitlines())]
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        names = [option.name for option in dataclasses.fields(group) if option.name in values]
        if not names:
            continue
        title = (type(group).__doc__ or field.name).splitlines()[0]
        content = yaml.safe_dump(
            {name: values[name] for name in names},
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=False,
        )
        blocks.append(f"# {title}\n{content}")
    return "\n".join(block for block in blocks if block)


def entries(node: yaml.MappingNode, where: str) -> Iterator[tuple[str, yaml.Node, int]]:
    """Yields the keys, values and lines of a mapping.

    Raises:
      UserError: a key is no name.
    """
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{where}, line {line}: the name of an option is needed")
        yield key.value, value, line


def parse_yaml(text: str, option: str) -> yaml.Node | None:
    """Returns the root of a YAML file; None for an empty one.

    Args:
      text: the file's content.
      option: the option that names it, for messages.

    Raises:
      UserError: the text is not YAML; names the line.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)  # refuses characters that no YAML has
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{option}, line {line}: not YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{option}, line {line}: not YAML: the character {error.character:#x} has no place in "
            "it; take it out"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{option}: not YAML: {error}") from error
    except RecursionError:
        line = loader.line + 1 if loader else 1
        raise UserError(
            f"{option}, line {line}: lists or groups stand in each other too deeply: an option "
            "takes a value or a list of values"
        ) from None


def kinds_of(config: Options) -> dict[str, Any]:
    """Returns the type of each option that may stand in a file, by its name."""
    kinds: dict[str, Any] = {}
    for group in dataclasses.fields(config):
        kinds |= typing.get_type_hints(type(getattr(config, group.name)), include_extras=True)
    return {name: kind for name, kind in kinds.items() if name not in _NOT_IN_A_FILE}


def _unknown(key: str, value: yaml.Node, kinds: Mapping[str, Any], config: Options) -> str:
    """Returns the message for a key that is no option of a file."""
    groups = [field.name for field in dataclasses.fields(config)]
    if key in groups and isinstance(value, yaml.MappingNode):
        return f"{key} is no option: a file of options has no groups, write its keys one level up"
    if key.replace("-", "_") in _NOT_IN_A_FILE:
        return f"{flag(key)} names this file and cannot stand in it: leave it out"
    return no_such_option(key, kinds)


def no_such_option(key: str, known: Collection[str]) -> str:
    """Returns the message for a key of a file that is no option, with the likely one.

    Args:
      key: the key as it stands there.
      known: the names of the options.
    """
    name = key.replace("-", "_")
    option = own_name(name, known)
    if option:
        return f"there is no option {key}: it is {option} here"
    return f"there is no option {key}; the nearest is {nearest(name, known, n=1)[0]}"


def read_value(key: str, node: yaml.Node, kind: Any, where: str) -> Any:
    """Returns the value of an option, of its type; raises a UserError for another one."""
    try:
        return _converted(node, kind)
    except _UnfitError as error:
        raise UserError(f"{where}: {key} is {_shown(node)}: {error}") from None


def _converted(node: yaml.Node, kind: Any) -> Any:
    """Returns the value of a node, of the type that an option has.

    Raises:
      _UnfitError: it is of another type.
    """
    annotations: list[Any] = []
    if typing.get_origin(kind) is typing.Annotated:
        kind, *annotations = typing.get_args(kind)
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if node.tag == f"{_TAG}null":
            return None
        (value_kind,) = [argument for argument in arguments if argument is not type(None)]
        if annotations:
            value_kind = typing.Annotated[value_kind, *annotations]
        return _converted(node, value_kind)
    if origin is tuple:
        return _tuple_value(node, arguments[0])
    if origin is Literal:
        return _choice(node, arguments)
    for annotation in annotations:
        choices = getattr(annotation, "choices", None)
        if choices:
            return _choice(node, choices)
    return _scalar_value(node, kind)


def _tuple_value(node: yaml.Node, kind: Any) -> tuple[Any, ...]:
    """Returns the values of a list, or one value as a list of one, as on the command line."""
    if isinstance(node, yaml.SequenceNode):
        return tuple(_converted(item, kind) for item in node.value)
    words = node.value.split() if isinstance(node, yaml.ScalarNode) else []
    if len(words) > 1:
        raise _UnfitError(f"a list is needed, [{', '.join(words)}] or [{json.dumps(node.value)}]")
    return (_converted(node, kind),)


def _choice(node: yaml.Node, choices: tuple[str, ...]) -> str:
    """Returns a text that is one of those that an option takes."""
    text = _scalar_value(node, str)
    if text not in choices:
        raise _UnfitError(f"one of {', '.join(choices)} is needed")
    return text


def _scalar_value(node: yaml.Node, kind: type) -> Any:
    """Returns the value of a node that is a text, a number, or true or false."""
    if not isinstance(node, yaml.ScalarNode) or node.tag == f"{_TAG}null":
        raise _UnfitError(_NEEDED[kind])
    if kind is str:
        return node.value
    is_quoted = node.style is not None  # text in quotes is not a number
    if kind in (int, float) and not is_quoted:
        return _number(node.value, kind)
    if kind in (int, bool) and node.tag == f"{_TAG}{kind.__name__}":
        return yaml.SafeLoader("").construct_object(node)
    raise _UnfitError(_NEEDED[kind])


def _number(text: str, kind: type) -> int | float:
    """Returns a number, as YAML 1.2 has it.

    YAML 1.1 takes 1e-3 for a text, .inf for a number, 010 for 8, and 1:30 for 90.
    """
    if _LEADING_ZERO.fullmatch(text):
        raise _UnfitError(
            f"{_NEEDED[kind]} that does not begin with 0, which some take for the octal "
            f"system: write {_ZEROS.sub('', text)}"
        )
    try:
        if kind is int:
            return int(text, 0)
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        raise _UnfitError(_NEEDED[kind]) from None


def _shown(node: yaml.Node) -> str:
    """Returns a value as it stands in a file, for messages."""
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if not isinstance(node, yaml.ScalarNode):
        return "a group of keys"
    is_quoted = bool(node.style)
    text = repr(node.value) if is_quoted else node.value or "nothing"
    if len(text) <= _MAX_VALUE_CHARS:
        return text
    return f"{text[: _MAX_VALUE_CHARS - 3]}..."


def value_of(config: Options, name: str) -> object:
    """Returns the value of an option by its name."""
    for group in vars(config).values():
        if hasattr(group, name):
            return getattr(group, name)
    raise KeyError(name)
