"""Options in a YAML file: the file of `--config`, and the file that a run writes to its folder.

A file is flat: its keys are the names of the options, with hyphens or underscores, without the
groups of `--help`. Text stays as written (`token_cache: off` is the text "off", not false), and
`null` stands for an option that is not given. Numbers follow YAML 1.2, except that numbers with a
leading 0 are refused.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

import yaml

from lora_jax.core.paths import most_similar
from train.console.errors import UserError, flag
from train.options.common import Options
from train.options.elsewhere import own_name

Config = TypeVar("Config", bound=Options)

_TAG = "tag:yaml.org,2002:"
_REMEDY_BY_KIND = {
    bool: "Write true or false",
    int: "Write a whole number",
    float: "Write a number",
    str: "Write a text",
}
_NOT_IN_A_FILE = ("config",)
# Options that were removed, with their defaults, which files of older runs contain.
_REMOVED_DEFAULTS: tuple[tuple[str, object], ...] = (
    ("peft_experiments", []),
    ("peft_json", "false"),
)
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_LEADING_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")
_MAX_VALUE_CHARS = 80  # characters of a value in messages


class _UnfitError(Exception):
    """The value of an option has the wrong type. The message is an instruction without a period."""


def parse_options_file(text: str, option: str, config: Config) -> tuple[Config, dict[str, int]]:
    """Returns the options with the values of a file, and the line of each option in the file.

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
    root = parse_yaml(text, option)
    if root is None:
        root = yaml.MappingNode(f"{_TAG}map", [])
    if not isinstance(root, yaml.MappingNode):
        raise UserError(
            f"{option} does not map names of options to values. Write one option per line, such "
            "as 'rank: 8'."
        )
    for key, value, line in entries(root, option):
        name = key.replace("-", "_")
        location = f"{option}, line {line}"
        if (name, value.value) in _REMOVED_DEFAULTS:
            continue
        if name not in kinds:
            raise UserError(f"{location}: {_unknown_key_message(key, value, kinds, config)}")
        if name in lines:
            raise UserError(
                f"{location}: {key} is already set in line {lines[name]}. Remove one of the two "
                "lines."
            )
        lines[name] = line
        values[name] = read_value(key, value, kinds[name], location)
    lines_with_values = {name: line for name, line in lines.items() if values[name] is not None}
    return replace_options(config, values), lines_with_values


def replace_options(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the options with new values for some of their fields."""
    changes = {}
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        names = [option.name for option in dataclasses.fields(group) if option.name in values]
        group_values = {name: values[name] for name in names}
        changes[field.name] = dataclasses.replace(group, **group_values)
    return dataclasses.replace(config, **changes)


def as_yaml(config: Options, values: Mapping[str, Any], heading: str) -> str:
    """Returns the text of an options file, in which comments name the groups of options.

    Args:
      config: the options, for their groups.
      values: the values to write, as JSON values.
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
      UserError: a key is not a name.
    """
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(
                f"{where}, line {line} has no name of an option before the colon. Write a line "
                "such as 'rank: 8'."
            )
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
        raise UserError(
            f"{option}, line {line} is not valid YAML: {error.problem}. Correct this line."
        ) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{option}, line {line} is not valid YAML: it contains the character "
            f"{error.character:#x}, which YAML does not allow. Remove this character."
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{option} is not valid YAML: {error}. Correct the file.") from error
    except RecursionError:
        line = loader.line + 1 if loader else 1
        raise UserError(
            f"{option}, line {line}: lists or groups are nested too deeply. Write a value or a "
            "list of values for each option."
        ) from None


def kinds_of(config: Options) -> dict[str, Any]:
    """Returns the type of each option that a file may contain, by its name."""
    kinds: dict[str, Any] = {}
    for group in dataclasses.fields(config):
        kinds |= typing.get_type_hints(type(getattr(config, group.name)), include_extras=True)
    return {name: kind for name, kind in kinds.items() if name not in _NOT_IN_A_FILE}


def _unknown_key_message(
    key: str, value: yaml.Node, kinds: Mapping[str, Any], config: Options
) -> str:
    """Returns the message for a key that is not an option of a file."""
    groups = [field.name for field in dataclasses.fields(config)]
    if key in groups and isinstance(value, yaml.MappingNode):
        return (
            f"{key} is not an option. A file of options has no groups. Write the keys of {key} one "
            "level up."
        )
    if key.replace("-", "_") in _NOT_IN_A_FILE:
        return f"{flag(key)} names this file and cannot be set in it. Remove this line."
    return no_such_option(key, kinds)


def no_such_option(key: str, known: Collection[str]) -> str:
    """Returns the message for a key of a file that is not an option, with the most similar option.

    Args:
      key: the key in the file.
      known: the names of the options.
    """
    name = key.replace("-", "_")
    option = own_name(name, known)
    if option:
        return f"There is no option {key}. Use {option}."
    return f"There is no option {key}. The nearest option is {most_similar(name, known, n=1)[0]}."


def read_value(key: str, node: yaml.Node, kind: Any, where: str) -> Any:
    """Returns the value of an option; raises a UserError for a value of another type."""
    try:
        return _parse_node(node, kind)
    except _UnfitError as error:
        raise UserError(f"{where}: {key} is {_format_node(node)}. {error}.") from None


def _parse_node(node: yaml.Node, kind: Any) -> Any:
    """Returns the value of a YAML node in the type of an option.

    Raises:
      _UnfitError: the value has another type.
    """
    annotations: list[Any] = []
    if typing.get_origin(kind) is typing.Annotated:
        kind, *annotations = typing.get_args(kind)
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    # An optional value: null, or a value of the other type.
    if origin in (Union, types.UnionType):
        if node.tag == f"{_TAG}null":
            return None
        (value_kind,) = [argument for argument in arguments if argument is not type(None)]
        if annotations:
            value_kind = typing.Annotated[value_kind, *annotations]
        return _parse_node(node, value_kind)
    if origin is tuple:
        return _parse_list(node, arguments[0])
    if origin is Literal:
        return _parse_choice(node, arguments)
    # An option with its own parser on the command line, such as --remat.
    for annotation in annotations:
        parse_words = getattr(annotation, "instance_from_str", None)
        if parse_words is not None:
            try:
                return parse_words([_parse_scalar(node, str)])
            except ValueError as error:
                raise _UnfitError(str(error)) from None
    return _parse_scalar(node, kind)


def _parse_list(node: yaml.Node, kind: Any) -> tuple[Any, ...]:
    """Returns the values of a list. A single value is a list of one, as on the command line."""
    if isinstance(node, yaml.SequenceNode):
        return tuple(_parse_node(item, kind) for item in node.value)
    # `layers: 1 2` is one text in YAML, but two values on the command line.
    words = node.value.split() if isinstance(node, yaml.ScalarNode) else []
    if len(words) > 1:
        raise _UnfitError(f"Write a list, [{', '.join(words)}] or [{json.dumps(node.value)}]")
    return (_parse_node(node, kind),)


def _parse_choice(node: yaml.Node, choices: tuple[str, ...]) -> str:
    """Returns the text of a node, which must be one of the choices of an option."""
    text = _parse_scalar(node, str)
    if text not in choices:
        raise _UnfitError(f"Write one of {', '.join(choices)}")
    return text


def _parse_scalar(node: yaml.Node, kind: type) -> Any:
    """Returns the value of a node that is a text, a number, or true or false."""
    if not isinstance(node, yaml.ScalarNode) or node.tag == f"{_TAG}null":
        raise _UnfitError(_REMEDY_BY_KIND[kind])
    if kind is str:
        return node.value
    is_quoted = node.style is not None  # text in quotes is not a number
    if kind in (int, float) and not is_quoted:
        return _parse_number(node.value, kind)
    if kind in (int, bool) and node.tag == f"{_TAG}{kind.__name__}":
        return yaml.SafeLoader("").construct_object(node)
    raise _UnfitError(_REMEDY_BY_KIND[kind])


def _parse_number(text: str, kind: type) -> int | float:
    """Returns a number according to YAML 1.2.

    YAML 1.1 takes 1e-3 for a text, .inf for a number, 010 for 8, and 1:30 for 90.
    """
    if _LEADING_ZERO.fullmatch(text):
        raise _UnfitError(
            f"{_REMEDY_BY_KIND[kind]} without a leading 0, such as "
            f"{_LEADING_ZEROS.sub('', text)}, because some programs read {text} as an octal number"
        )
    try:
        if kind is int:
            return int(text, 0)
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        raise _UnfitError(_REMEDY_BY_KIND[kind]) from None


def _format_node(node: yaml.Node) -> str:
    """Returns the value of a node for messages, as in the file and shortened."""
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
