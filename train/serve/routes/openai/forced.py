"""Grammars of answers that have to call tools, in the form of the chat template."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_jax.models.sampling.grammar import (
    CompiledGrammar,
    GrammarCompiler,
    GrammarError,
    quoted,
)
from train.tools.forms import ArgumentForm, CallForm
from train.tools.schemas import resolved

_CALLS = 16  # of a forced answer, at most
_NAME = re.compile(r"[\w.-]+")
# Keywords of parameters whose arguments can be written one by one, and of texts without quotes.
_PLAIN = {"type", "properties", "required", "additionalProperties", "title", "description"}
_PLAIN |= {"$defs", "definitions", "$schema", "$id", "default", "examples", "strict"}
_ALWAYS = "(?s:.*)"


def has_form(form: CallForm, tools: Mapping[str, Mapping[str, Any]]) -> bool:
    """Returns False for tools whose calls a form has no texts for.

    Args:
      form: the form.
      tools: the schemas of the tools' parameters, by name.
    """
    names = [*tools]
    if form.arguments is None:
        return all(map(_NAME.fullmatch, names)) or "{name}" not in form.head
    schemas = [*tools.values()]
    if not all({*schema} <= _PLAIN and isinstance(_properties(schema), dict) for schema in schemas):
        return False
    keys = [key for schema in schemas for key in (*_properties(schema), *_required(schema))]
    return all(map(_NAME.fullmatch, [*names, *keys]))


def _properties(schema: Mapping[str, Any]) -> Any:
    return schema.get("properties") or {}


def _required(schema: Mapping[str, Any]) -> list[str]:
    keys = schema.get("required")
    return [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []


class CallGrammar:
    """Writes a grammar in Lark's notation."""

    def __init__(self, form: CallForm, compiler: GrammarCompiler) -> None:
        """Begins a grammar of a form."""
        self._form, self._compiler = form, compiler
        self._rules: list[str] = []

    def compiled(
        self, tools: Mapping[str, Mapping[str, Any]], most: int = _CALLS
    ) -> CompiledGrammar:
        """Returns the grammar of an answer.

        Args:
          tools: the schemas of the tools' parameters, by name.
          most: calls at most.
        """
        form = self._form
        calls = "call"
        if form.between is not None and most > 1:
            calls += f" ({self._text(form.between)} call){{0,{most - 1}}}"
        thoughts = ""
        if form.thoughts is not None:
            self._rules.append(f"thoughts: {self._text(form.thoughts[0])} thought")
            self._raw("thought", _ALWAYS, form.thoughts[1])
            thoughts = "thoughts?"
        names = " | ".join(f"call_{i}" for i in range(len(tools)))
        for i, (name, schema) in enumerate(tools.items()):
            arguments = self._arguments(f"call_{i}", schema)
            self._rules.append(
                f"call_{i}: {self._head(name)} {arguments} {self._text(form.tail.format())}"
            )
        start = f"start: {thoughts} {self._text(form.begin)} {calls} {self._text(form.end)}"
        return self._compiler.lark("\n".join([start, f"call: {names}", *self._rules]))

    def _text(self, text: str) -> str:
        return self._compiler.literal(text)

    def _head(self, name: str) -> str:
        """Returns the text before a tool's arguments; a name in JSON has no special tokens."""
        before, json_name, after = self._form.head.partition("{json}")
        head = self._text(before.format(name=name))
        return (
            f"{head} {quoted(json.dumps(name))} {self._text(after.format())}" if json_name else head
        )

    def _arguments(self, name: str, schema: Mapping[str, Any]) -> str:
        form = self._form.arguments
        if form is None:
            return f"%json {self._compiler.json_text(schema)}"
        properties, required = dict(_properties(schema)), _required(schema)
        properties |= {key: {} for key in required if key not in properties}
        keys = [*properties]
        between = self._text(form.between)
        # One more argument after others, and the first one: each goes on with those after its own.
        for i, key in enumerate(keys):
            item = f"{name}_value_{i}"
            self._value(item, key, properties[key], schema)
            for kind, begin in (("first", ""), ("more", between)):
                skip = "" if key in required else f" | {name}_{kind}_{i + 1}"
                self._rules.append(f"{name}_{kind}_{i}: {begin} {item} {name}_more_{i + 1}{skip}")
        self._rules += [f'{name}_{kind}_{len(keys)}: ""' for kind in ("first", "more")]
        return f"{name}_first_0"

    def _value(self, name: str, key: str, schema: Any, root: Mapping[str, Any]) -> None:
        """Adds the rule of an argument: a key and one of the kinds of its value."""
        form = self._form.arguments
        assert form is not None
        kinds = []
        for i, kind in enumerate(_kinds(schema, root) if form.is_raw else [schema]):
            own = f"{name}_{i}"
            texts = _texts(kind) if form.is_raw else None
            if texts is None:
                shared = {k: root[k] for k in ("$defs", "definitions") if k in root}
                whole = {**shared, **kind} if isinstance(kind, Mapping) else kind
                value = f"%json {self._compiler.json_text(whole)} {self._text(form.after)}"
            elif isinstance(texts, str):
                self._raw(f"{own}_text", texts, form.quote + form.after)
                value = f"{self._text(form.quote)} {own}_text"
            else:
                values = " | ".join(self._constant(text, form) for text in texts)
                value = f"({values}) {self._text(form.after)}"
            self._rules.append(f"{own}: {value}")
            kinds.append(own)
        before = self._text(form.before.format(key=key))
        self._rules.append(f"{name}: {before} ({' | '.join(kinds)})")

    def _constant(self, value: object, form: ArgumentForm) -> str:
        if not isinstance(value, str):
            return quoted(json.dumps(value, ensure_ascii=False))
        quote = self._text(form.quote)
        return f"{quote} {quoted(value)} {quote}"

    def _raw(self, name: str, pattern: str, end: str) -> None:
        """Adds the rule of a text up to another one, which it does not hold."""
        closing = self._text(end)
        if closing.startswith("<["):  # no text holds a special token
            self._rules.append(f"{name}: /{pattern}/ {closing}")
        else:
            self._rules.append(f"{name}[suffix={quoted(end)}]: /{pattern}/")


def _kinds(schema: Any, root: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the schemas of which a value has one, without references at their top."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        yield schema
        return
    for union in ("anyOf", "oneOf"):
        if isinstance(schema.get(union), list) and not {"type", "properties"} & {*schema}:
            for choice in schema[union]:
                yield from _kinds(choice, root)
            return
    if isinstance(kinds := schema.get("type"), list):
        for kind in kinds:
            yield {**schema, "type": kind}
        return
    yield schema


def _texts(schema: Any) -> Sequence[object] | str | None:
    """Returns the values that are allowed, or the expression of the texts; None for JSON."""
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("enum"), list):
        return list(schema["enum"])
    if schema.get("type") != "string":
        return None
    least, most = schema.get("minLength") or 0, schema.get("maxLength")
    if "pattern" not in schema:
        return f"(?s:.{{{least},{'' if most is None else most}}})"
    if least or most is not None:
        raise GrammarError("`pattern` beside a length: say the length in the pattern", ())
    from llguidance import regex_to_lark

    pattern = str(schema["pattern"])
    is_anchored = pattern.startswith("^") or pattern.endswith("$")
    if "|" in pattern and is_anchored and not re.fullmatch(r"\^\(.*\)\$", pattern):
        raise GrammarError("a pattern with `|` and `^` or `$`: write ^(…|…)$", ())
    begin = "" if pattern.startswith("^") else _ALWAYS
    end = "" if pattern.endswith("$") and not pattern.endswith("\\$") else _ALWAYS
    core = pattern.removeprefix("^")
    core = core[:-1] if not end else core
    return str(regex_to_lark(f"{begin}(?:{core}){end}", "d"))
