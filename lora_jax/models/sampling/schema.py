"""Schemas within schemas and grammars, and the integers in them that llguidance would change."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from decimal import Decimal

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NO_SCHEMAS = ("const", "default", "example", "x-guidance")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LARGEST = 2**63 - 1


def subschemas(schema: Mapping[str, object]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yields the schemas in a schema with their keys."""
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, Mapping):
            for name, inner in value.items():
                yield (key, name), inner
        elif key in _IN_LISTS and isinstance(value, list):
            for i, inner in enumerate(value):
                yield (key, str(i)), inner
        elif isinstance(value, Mapping) and key not in _NO_SCHEMAS:
            yield (key,), value


def schemas_in(grammar: str) -> Iterator[Mapping[str, object]]:
    """Yields the schemas in a grammar of Lark's notation; skips those that cannot be read."""
    for text in grammar.split("%json")[1:]:
        with contextlib.suppress(ValueError):
            schema, _ = json.JSONDecoder().raw_decode(text.lstrip())
            if isinstance(schema, Mapping):
                yield schema


def rounded_integers(
    schema: Mapping[str, object], path: tuple[str, ...] = ()
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields each integer of a schema that llguidance would change, and its path."""
    for key in ("const", "enum", *_BOUNDS):
        for number in _integers(schema.get(key)):
            if not _is_exact(number, key):
                yield number, (*path, key)
    for keys, inner in subschemas(schema):
        if isinstance(inner, Mapping):
            yield from rounded_integers(inner, (*path, *keys))


def _is_exact(number: int, key: str) -> bool:
    """Returns True if llguidance keeps an integer at a key of a schema as it is.

    The library reads doubles, and writes the shortest digits that name one. It clips the bounds of
    integers to 64 bits, and takes 1 off an exclusive bound once that is a double.
    """
    size, is_exclusive = abs(number), key.startswith("exclusive")
    if size < 2**53 or (key in _BOUNDS and size >= _LARGEST + is_exclusive):
        return True
    return size <= _LARGEST and not is_exclusive and Decimal(repr(float(number))) == number


def _integers(value: object) -> Iterator[int]:
    """Yields the integers in a value of JSON."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _integers(inner)
    elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        yield int(value)
