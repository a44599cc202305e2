"""Converts tool arguments that a model wrote as plain text to the types of the JSON schema."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Tools = Sequence[Mapping[str, Any]]
_MAX_REFERENCES = 8  # one after the other
_TYPE_NAMES = {bool: "boolean", int: "integer", float: "number", type(None): "null"}


def convert_arguments(name: str, texts: Mapping[str, str], tools: Tools) -> dict[str, Any]:
    """Returns arguments in the types of the tool's schema, as transformers does.

    Args:
      name: the tool's name.
      texts: the arguments as they were written.
      tools: schemas of all tools. An argument that none has stays a text.

    >>> from train.tools.schemas import convert_arguments
    >>> properties = {"n": {"type": "integer"}, "zip": {"type": "string"}}
    >>> tool = {"function": {"name": "f", "parameters": {"properties": properties}}}
    >>> convert_arguments("f", {"n": "7", "zip": "8001"}, [tool])
    {'n': 7, 'zip': '8001'}
    """
    schema = _parameters_schema(name, tools)
    properties = schema.get("properties") or {}
    arguments = {}
    for argument, text in texts.items():
        types = _allowed_types(properties.get(argument), schema)
        arguments[argument] = _convert_text(text, types)
    return arguments


def _parameters_schema(name: str, tools: Tools) -> Mapping[str, Any]:
    """Returns the schema of a tool's parameters; {} for an unknown tool."""
    for tool in tools:
        function = tool.get("function") or tool
        if function.get("name") == name:
            return function.get("parameters") or {}
    return {}


def resolve_reference(schema: Any, root: Mapping[str, Any]) -> Any:
    """Returns a schema after following its reference into the definitions of `root`.

    >>> from train.tools.schemas import resolve_reference
    >>> resolve_reference({"$ref": "#/$defs/n"}, {"$defs": {"n": {"type": "integer"}}})
    {'type': 'integer'}
    """
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str):
            return schema
        _, section, name = [*reference.split("/"), "", ""][:3]  # of "#/section/name"
        definitions = root.get(section) if reference.startswith("#/") else None
        schema = definitions.get(name) if isinstance(definitions, Mapping) else None
    return schema


def _allowed_types(schema: Any, root: Mapping[str, Any]) -> list[str]:
    """Returns the types that a schema allows, in order; [] if it names none."""
    schema = resolve_reference(schema, root)
    if not isinstance(schema, Mapping):
        return []
    types = _declared_types(schema) or _value_types(schema)
    for union in ("anyOf", "oneOf"):
        for choice in schema.get(union) or ():
            types += _allowed_types(choice, root)
    if schema.get("nullable"):
        types.append("null")
    return types


def _declared_types(schema: Mapping[str, Any]) -> list[str]:
    """Returns the types in the field `type`."""
    declared = schema.get("type")
    names = declared if isinstance(declared, list) else [declared]
    return [name for name in names if isinstance(name, str)]


def _value_types(schema: Mapping[str, Any]) -> list[str]:
    """Returns the types of the values in `const` or `enum`."""
    values = [schema["const"]] if "const" in schema else schema.get("enum") or ()
    return [_TYPE_NAMES[type(value)] for value in values if type(value) in _TYPE_NAMES]


def _convert_text(text: str, types: Sequence[str]) -> Any:
    """Converts a text to the first type that it fits; returns the text if none fits."""
    for name in types:
        if name not in _READERS:
            continue
        try:
            return _READERS[name](text)
        except ValueError:
            continue
    return text


def _read_integer(text: str) -> int:
    """Returns an integer, also from a text like "7.0"; raises a ValueError for other numbers."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _read_number(text: str) -> int | float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("JSON has no such number")
    return int(number) if number.is_integer() and "." not in text else number


def _word_reader(values: Mapping[str, Any]) -> Callable[[str], Any]:
    """Returns a function that converts certain words to their values."""

    def read(text: str) -> Any:
        word = text.strip().lower()
        if word not in values:
            raise ValueError(f"{word} is another type's")
        return values[word]

    return read


def _json_reader(kind: type) -> Callable[[str], Any]:
    """Returns a function that parses JSON values of a type."""

    def read(text: str) -> Any:
        value = json.loads(text)
        if not isinstance(value, kind):
            raise ValueError("another type")
        return value

    return read


_READERS: dict[str, Callable[[str], Any]] = {
    "integer": _read_integer,
    "number": _read_number,
    "boolean": _word_reader({"true": True, "1": True, "false": False, "0": False}),
    "null": _word_reader({"null": None, "none": None}),
    "object": _json_reader(dict),
    "array": _json_reader(list),
}
