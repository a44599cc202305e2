"""Arguments that a model wrote as bare texts, by the types of a tool's JSON schema."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Tools = Sequence[Mapping[str, Any]]
_REFERENCES = 8  # one after the other
_NAMES = {bool: "boolean", int: "integer", float: "number", type(None): "null"}


def with_types(name: str, texts: Mapping[str, str], tools: Tools) -> dict[str, Any]:
    """Returns arguments with the types that the tool's schema has, as transformers gives them.

    Args:
      name: the tool's name.
      texts: the arguments as they were written.
      tools: schemas of all tools. An argument that none has stays a text.

    >>> from train.tools.schemas import with_types
    >>> properties = {"n": {"type": "integer"}, "zip": {"type": "string"}}
    >>> tool = {"function": {"name": "f", "parameters": {"properties": properties}}}
    >>> with_types("f", {"n": "7", "zip": "8001"}, [tool])
    {'n': 7, 'zip': '8001'}
    """
    root = _parameters(name, tools)
    properties = root.get("properties") or {}
    return {key: _typed(text, _types(properties.get(key), root)) for key, text in texts.items()}


def _parameters(name: str, tools: Tools) -> Mapping[str, Any]:
    for tool in tools:
        function = tool.get("function") or tool
        if function.get("name") == name:
            return function.get("parameters") or {}
    return {}


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """Returns a schema, or the one among the definitions of `root` that it refers to.

    >>> from train.tools.schemas import resolved
    >>> resolved({"$ref": "#/$defs/n"}, {"$defs": {"n": {"type": "integer"}}})
    {'type': 'integer'}
    """
    for _ in range(_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str):
            return schema
        _, place, name = [*reference.split("/"), "", ""][:3]
        definitions = root.get(place) if reference.startswith("#/") else None
        schema = definitions.get(name) if isinstance(definitions, Mapping) else None
    return schema


def _types(schema: Any, root: Mapping[str, Any]) -> list[str]:
    """Returns the types that a schema allows, in order; [] where it says none."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return []
    own = schema.get("type")
    names = [name for name in (own if isinstance(own, list) else [own]) if isinstance(name, str)]
    if not names:
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        names = [_NAMES[type(value)] for value in values or () if type(value) in _NAMES]
    for union in ("anyOf", "oneOf"):
        names += [name for choice in schema.get(union) or () for name in _types(choice, root)]
    return [*names, "null"] if schema.get("nullable") else names


def _typed(text: str, types: Sequence[str]) -> Any:
    for name in types:
        try:
            if name in _READ:
                return _READ[name](text)
        except ValueError:
            continue
    return text


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _number(text: str) -> int | float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("JSON has no such number")
    return int(number) if number.is_integer() and "." not in text else number


def _word(words: Mapping[str, Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if (word := text.strip().lower()) not in words:
            raise ValueError(f"{word} is another type's")
        return words[word]

    return read


def _json(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = json.loads(text)
        if not isinstance(value, kind):
            raise ValueError("another type")
        return value

    return read


_READ: dict[str, Callable[[str], Any]] = {
    "integer": _integer,
    "number": _number,
    "boolean": _word({"true": True, "1": True, "false": False, "0": False}),
    "null": _word({"null": None, "none": None}),
    "object": _json(dict),
    "array": _json(list),
}
