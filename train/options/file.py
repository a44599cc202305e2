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
_MOST_SHOWN = 80  # characters of a value in messages


class _Unfit(Exception):
    """A value does not fit its option; the message says what is needed."""


def parse_options_file(text: str, asked: str, config: Config) -> tuple[Config, dict[str, int]]:
    """Returns the options, changed as a file says, and the line of each option in the file.

    Args:
      text: the file's content.
      asked: the option that names the file, for messages.
      config: the options to begin with.

    Raises:
      UserError: the text is not YAML, or has a key or a value that no option takes.
    """
    kinds = kinds_of(config)
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    root = parse_yaml(text, asked) or yaml.MappingNode(f"{_TAG}map", [])
    if not isinstance(root, yaml.MappingNode):
        raise UserError(
            f"{asked}: options by their names are needed, a line each, such as 'rank: 8'"
        )
    for key, value, line in entries(root, asked):
        name, where = key.replace("-", "_"), f"{asked}, line {line}"
        if (name, value.value) in _REMOVED:
            continue
        if name not in kinds:
            raise UserError(f"{where}: {_unknown(key, value, kinds, config)}")
        if name in lines:
            raise UserError(
                f"{where}: {key} is given twice, in line {lines[name]}, too: leave out one"
            )
        lines[name] = line
        values[name] = read_value(key, value, kinds[name], where)
    given = {name: line for name, line in lines.items() if values[name] is not None}
    return replace_options(config, values), given


def replace_options(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns the options with new values, given by the names of their fields."""
    changed = {}
    for group in dataclasses.fields(config):
        part = getattr(config, group.name)
        own = {field.name for field in dataclasses.fields(part)}
        changed[group.name] = dataclasses.replace(
            part, **{name: value for name, value in values.items() if name in own}
        )
    return dataclasses.replace(config, **changed)


def as_yaml(config: Options, values: Mapping[str, Any], heading: str) -> str:
    """Returns options as a file that `parse_options_file` reads, under the names of their groups.

    Args:
      config: says which group an option is of.
      values: the options to write, as JSON has them.
      heading: the comment at the beginning.
    """
    blocks = ["".join(f"# {line}\n" for line in heading.splitlines())]
    for group in dataclasses.fields(config):
        part = getattr(config, group.name)
        names = [field.name for field in dataclasses.fields(part) if field.name in values]
        title = (type(part).__doc__ or group.name).splitlines()[0]
        written = yaml.safe_dump(
            {name: values[name] for name in names},
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=False,
        )
        blocks.append(f"# {title}\n{written}" if names else "")
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


def parse_yaml(text: str, asked: str) -> yaml.Node | None:
    """Returns the root of a YAML file; None for an empty one.

    Args:
      text: the file's content.
      asked: the option that names it, for messages.

    Raises:
      UserError: the text is not YAML; names the line.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)  # refuses characters that no YAML has
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{asked}, line {line}: not YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            f"{asked}, line {line}: not YAML: the character {error.character:#x} has no place in "
            "it; take it out"
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{asked}: not YAML: {error}") from error
    except RecursionError:
        line = loader.line + 1 if loader else 1
        raise UserError(
            f"{asked}, line {line}: lists or groups stand in each other too deeply: an option "
            "takes a value or a list of values"
        ) from None


def kinds_of(config: Options) -> dict[str, Any]:
    """Returns the type of each option that may stand in a file, by its name."""
    kinds: dict[str, Any] = {}
    for group in dataclasses.fields(config):
        kinds |= typing.get_type_hints(type(getattr(config, group.name)), include_extras=True)
    return {name: kind for name, kind in kinds.items() if name not in _NOT_IN_A_FILE}


def _unknown(key: str, value: yaml.Node, kinds: Mapping[str, Any], config: Options) -> str:
    groups = [group.name for group in dataclasses.fields(config)]
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
    if own := own_name(name, known):
        return f"there is no option {key}: it is {own} here"
    return f"there is no option {key}; the nearest is {nearest(name, known, n=1)[0]}"


def read_value(key: str, node: yaml.Node, kind: Any, where: str) -> Any:
    """Returns the value of an option, of its type; raises a UserError for another one."""
    try:
        return _converted(node, kind)
    except _Unfit as error:
        raise UserError(f"{where}: {key} is {_shown(node)}: {error}") from None


def _converted(node: yaml.Node, kind: Any) -> Any:
    """Returns the value of a node, of the type that an option has.

    Raises:
      _Unfit: it is of another type.
    """
    extras: tuple[Any, ...] = ()
    if typing.get_origin(kind) is typing.Annotated:
        kind, *rest = typing.get_args(kind)
        extras = tuple(rest)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if node.tag == f"{_TAG}null":
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _converted(node, typing.Annotated[kind, *extras] if extras else kind)
    if origin is tuple:
        # One value is a list of one, as on the command line.
        if isinstance(node, yaml.ScalarNode) and len(words := node.value.split()) > 1:
            raise _Unfit(f"a list is needed, [{', '.join(words)}] or [{json.dumps(node.value)}]")
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return tuple(_converted(item, arguments[0]) for item in nodes)
    if origin is Literal:
        return _one_of(node, arguments)
    if choices := next((c for c in (getattr(x, "choices", None) for x in extras) if c), None):
        return _one_of(node, choices)
    return _plain(node, kind)


def _one_of(node: yaml.Node, choices: tuple[str, ...]) -> str:
    text = _plain(node, str)
    if text not in choices:
        raise _Unfit(f"one of {', '.join(choices)} is needed")
    return text


def _plain(node: yaml.Node, kind: type) -> Any:
    if not isinstance(node, yaml.ScalarNode) or node.tag == f"{_TAG}null":
        raise _Unfit(_NEEDED[kind])
    if kind is str:
        return node.value
    is_plain = node.style is None  # text in quotes is not a number
    if kind in (int, float) and is_plain:
        # YAML 1.1 takes 1e-3 for a text, .inf for a number, 010 for 8, and 1:30 for 90.
        if _LEADING_ZERO.fullmatch(node.value):
            raise _Unfit(
                f"{_NEEDED[kind]} that does not begin with 0, which some take for the octal "
                f"system: write {_ZEROS.sub('', node.value)}"
            )
        try:
            if kind is int:
                return int(node.value, 0)
            return float(node.value.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            raise _Unfit(_NEEDED[kind]) from None
    if kind in (int, bool) and node.tag == f"{_TAG}{kind.__name__}":
        return yaml.SafeLoader("").construct_object(node)
    raise _Unfit(_NEEDED[kind])


def _shown(node: yaml.Node) -> str:
    """Returns a value as it stands in a file, for messages."""
    if isinstance(node, yaml.ScalarNode):
        text = repr(node.value) if node.style else node.value or "nothing"
        return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
    return "a list" if isinstance(node, yaml.SequenceNode) else "a group of keys"


def value_of(config: Options, name: str) -> object:
    """Returns the value of an option by its name."""
    return next(getattr(part, name) for part in vars(config).values() if hasattr(part, name))
