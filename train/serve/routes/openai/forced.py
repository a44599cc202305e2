"""Grammars for answers that must call tools, in the format of the chat template."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_jax.models.sampling.grammar import (
    CompiledGrammar,
    GrammarCompiler,
    GrammarError,
    quote_for_lark,
)
from train.tools.forms import ArgumentForm, CallForm
from train.tools.schemas import resolve_reference

_MAX_CALLS = 16  # of a forced answer
_NAME = re.compile(r"[\w.-]+")
# Keywords of parameters whose arguments can be written one by one, and of texts without quotes.
_PLAIN_KEYWORDS = {"type", "properties", "required", "additionalProperties", "title"}
_PLAIN_KEYWORDS |= {"description", "$defs", "definitions", "$schema", "$id", "default"}
_PLAIN_KEYWORDS |= {"examples", "strict"}
_ANY_TEXT = "(?s:.*)"


def has_form(form: CallForm, tools: Mapping[str, Mapping[str, Any]]) -> bool:
    """Returns True if a call form can write all names and argument values of the tools.

    Args:
      form: the form.
      tools: the schemas of the tools' parameters, by name.
    """
    has_plain_names = all(_NAME.fullmatch(name) for name in tools)
    if form.arguments is None:
        return has_plain_names or "{name}" not in form.head
    for schema in tools.values():
        is_plain = {*schema} <= _PLAIN_KEYWORDS and isinstance(_argument_schemas(schema), dict)
        if not is_plain:
            return False
        keys = [*_argument_schemas(schema), *_required_arguments(schema)]
        if not all(_NAME.fullmatch(key) for key in keys):
            return False
    return has_plain_names


def _argument_schemas(schema: Mapping[str, Any]) -> Any:
    """Returns the schemas of a tool's arguments by their names."""
    return schema.get("properties") or {}


def _required_arguments(schema: Mapping[str, Any]) -> list[str]:
    """Returns the names of a tool's required arguments."""
    keys = schema.get("required")
    if not isinstance(keys, list):
        return []
    return [key for key in keys if isinstance(key, str)]


class CallGrammar:
    """Writes a grammar of tool calls in Lark's notation."""

    def __init__(self, form: CallForm, compiler: GrammarCompiler) -> None:
        """Creates a grammar without rules."""
        self._form = form
        self._compiler = compiler
        self._rules: list[str] = []

    def compiled(
        self, tools: Mapping[str, Mapping[str, Any]], max_calls: int = _MAX_CALLS
    ) -> CompiledGrammar:
        """Compiles the grammar of an answer that calls tools.

        Args:
          tools: the schemas of the tools' parameters, by name.
          max_calls: calls at most.
        """
        form = self._form
        calls = "call"
        if form.between is not None and max_calls > 1:
            calls += f" ({self._quote_text(form.between)} call){{0,{max_calls - 1}}}"
        thoughts = ""
        if form.thoughts is not None:
            thoughts_start, thoughts_end = form.thoughts
            self._rules.append(f"thoughts: {self._quote_text(thoughts_start)} thought")
            self._add_raw_text("thought", _ANY_TEXT, thoughts_end)
            thoughts = "thoughts?"
        call_names = [f"call_{i}" for i in range(len(tools))]
        tail = self._quote_text(form.tail.format())
        for call_name, (tool_name, schema) in zip(call_names, tools.items(), strict=True):
            arguments = self._add_argument_rules(call_name, schema)
            self._rules.append(f"{call_name}: {self._call_beginning(tool_name)} {arguments} {tail}")
        start = (
            f"start: {thoughts} {self._quote_text(form.begin)} {calls} {self._quote_text(form.end)}"
        )
        call = f"call: {' | '.join(call_names)}"
        return self._compiler.lark("\n".join([start, call, *self._rules]))

    def _quote_text(self, text: str) -> str:
        """Returns a text in the grammar's notation; it may contain special tokens."""
        return self._compiler.literal(text)

    def _call_beginning(self, name: str) -> str:
        """Returns the grammar of a call up to the tool's arguments."""
        prefix, json_marker, suffix = self._form.head.partition("{json}")
        head = self._quote_text(prefix.format(name=name))
        if not json_marker:
            return head
        return f"{head} {quote_for_lark(json.dumps(name))} {self._quote_text(suffix.format())}"

    def _add_argument_rules(self, call_name: str, schema: Mapping[str, Any]) -> str:
        """Adds the rules of a call's arguments, and returns their rule name or a JSON schema."""
        form = self._form.arguments
        if form is None:
            return f"%json {self._compiler.json_text(schema)}"
        schema_of_key = dict(_argument_schemas(schema))
        required_keys = _required_arguments(schema)
        for key in required_keys:
            schema_of_key.setdefault(key, {})
        separator = self._quote_text(form.between)
        # first_i: arguments from the i-th on, of which none came before; more_i: after others.
        for i, (key, value_schema) in enumerate(schema_of_key.items()):
            value_rule = f"{call_name}_value_{i}"
            self._add_value(value_rule, key, value_schema, schema)
            for kind, begin in (("first", ""), ("more", separator)):
                rule = f"{call_name}_{kind}_{i}: {begin} {value_rule} {call_name}_more_{i + 1}"
                if key not in required_keys:
                    rule += f" | {call_name}_{kind}_{i + 1}"
                self._rules.append(rule)
        for kind in ("first", "more"):
            self._rules.append(f'{call_name}_{kind}_{len(schema_of_key)}: ""')
        return f"{call_name}_first_0"

    def _add_value(self, rule: str, key: str, schema: Any, root: Mapping[str, Any]) -> None:
        """Adds the rule of an argument: its name, and a value of one of the allowed kinds."""
        form = self._form.arguments
        assert form is not None
        kinds = [*_alternative_schemas(schema, root)] if form.is_raw else [schema]
        kind_rules = [f"{rule}_{i}" for i in range(len(kinds))]
        for kind_rule, kind in zip(kind_rules, kinds, strict=True):
            value = self._value_rule_body(kind_rule, kind, root, form)
            self._rules.append(f"{kind_rule}: {value}")
        key_text = self._quote_text(form.before.format(key=key))
        self._rules.append(f"{rule}: {key_text} ({' | '.join(kind_rules)})")

    def _value_rule_body(
        self, rule: str, schema: Any, root: Mapping[str, Any], form: ArgumentForm
    ) -> str:
        """Returns the body of a rule for a schema's values, and adds the rules that it uses."""
        texts = _allowed_texts(schema) if form.is_raw else None
        if texts is None:
            definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
            if isinstance(schema, Mapping):
                schema = {**definitions, **schema}
            return f"%json {self._compiler.json_text(schema)} {self._quote_text(form.after)}"
        if isinstance(texts, str):  # a regular expression
            self._add_raw_text(f"{rule}_text", texts, form.quote + form.after)
            return f"{self._quote_text(form.quote)} {rule}_text"
        constants = " | ".join(self._write_constant(text, form) for text in texts)
        return f"({constants}) {self._quote_text(form.after)}"

    def _write_constant(self, value: object, form: ArgumentForm) -> str:
        """Returns a constant in the grammar: a quoted text, or JSON for other values."""
        if not isinstance(value, str):
            return quote_for_lark(json.dumps(value, ensure_ascii=False))
        quote = self._quote_text(form.quote)
        return f"{quote} {quote_for_lark(value)} {quote}"

    def _add_raw_text(self, rule: str, pattern: str, end: str) -> None:
        """Adds the rule of a text that ends at the end text and does not contain it."""
        end_text = self._quote_text(end)
        is_special_token = end_text.startswith("<[")  # which no text holds
        if is_special_token:
            self._rules.append(f"{rule}: /{pattern}/ {end_text}")
        else:
            self._rules.append(f"{rule}[suffix={quote_for_lark(end)}]: /{pattern}/")


def _alternative_schemas(schema: Any, root: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the alternatives of a schema (anyOf, oneOf, several types) without references."""
    schema = resolve_reference(schema, root)
    if not isinstance(schema, Mapping):
        yield schema
        return
    has_own_type = bool({"type", "properties"} & {*schema})
    for keyword in ("anyOf", "oneOf"):
        is_union = isinstance(schema.get(keyword), list) and not has_own_type
        if is_union:
            for choice in schema[keyword]:
                yield from _alternative_schemas(choice, root)
            return
    json_types = schema.get("type")
    if isinstance(json_types, list):
        for json_type in json_types:
            yield {**schema, "type": json_type}
        return
    yield schema


def _allowed_texts(schema: Any) -> Sequence[object] | str | None:
    """Returns the allowed constants, or a regular expression of texts; None for other JSON."""
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("enum"), list):
        return list(schema["enum"])
    if schema.get("type") != "string":
        return None
    min_length = schema.get("minLength") or 0
    max_length = schema.get("maxLength")
    if "pattern" not in schema:
        return f"(?s:.{{{min_length},{'' if max_length is None else max_length}}})"
    if min_length or max_length is not None:
        raise GrammarError(
            "`pattern` cannot be combined with a length. Write the length into the pattern.", ()
        )
    return _search_expression(str(schema["pattern"]))


def _search_expression(pattern: str) -> str:
    """Returns Lark's regular expression of all texts that contain a match of a pattern."""
    from llguidance import regex_to_lark

    is_anchored = pattern.startswith("^") or pattern.endswith("$")
    if "|" in pattern and is_anchored and not re.fullmatch(r"\^\(.*\)\$", pattern):
        raise GrammarError(
            "a pattern with `|` and `^` or `$` is ambiguous. Write ^(…|…)$ instead.", ()
        )
    prefix = "" if pattern.startswith("^") else _ANY_TEXT
    core = pattern.removeprefix("^")
    suffix = _ANY_TEXT
    ends_at_anchor = pattern.endswith("$") and not pattern.endswith("\\$")
    if ends_at_anchor:
        core = core[:-1]
        suffix = ""
    return str(regex_to_lark(f"{prefix}(?:{core}){suffix}", "d"))
