"""The fields that say what form an answer has: JSON, a schema, a grammar, a call of a tool."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lora_jax.models.sampling.grammar import (
    CompiledGrammar,
    GrammarCompiler,
    GrammarError,
)
from lora_jax.training.data.turns import shown
from train.serve.routes.errors import HttpError
from train.serve.routes.openai.fields import check_fields, field_error
from train.serve.routes.openai.forced import CallGrammar, has_form
from train.serve.routes.openai.table import STRUCTURED_OUTPUTS
from train.tools.calls import call_format
from train.tools.formats import FORMATS, CallFormat
from train.tools.forms import CallForm, call_form

_OBJECT: Mapping[str, object] = {"type": "object"}
_NO_PARAMETERS: Mapping[str, object] = {**_OBJECT, "additionalProperties": False}


def read_grammar(
    body: Mapping[str, object], compiler: GrammarCompiler, template: str
) -> CompiledGrammar | None:
    """Returns the grammar of the answers that a request asks for; None for any answers.

    Args:
      body: the fields of the request.
      compiler: the compiler of grammars.
      template: the chat template, in whose form calls are that the request asks for.

    Raises:
      HttpError: a grammar or schema cannot be, or several fields ask for different ones.
    """
    readers: dict[str, Callable[[Any, str, GrammarCompiler], CompiledGrammar | None]] = {
        "response_format": _read_format,
        "structured_outputs": _read_structured,
        "guided_json": _read_schema,
        "guided_regex": _read_regex,
        "guided_choice": _read_choice,
        "guided_grammar": _read_text,
    }
    grammars: dict[str, CompiledGrammar] = {}
    for name, reader in readers.items():
        if body.get(name) is not None:
            grammar = reader(body[name], name, compiler)
            if grammar is not None:
                grammars[name] = grammar
    if (calls := _read_calls(body, compiler, template)) is not None:
        grammars["tool_choice"] = calls
    if len(grammars) > 1:
        first, second, *_ = grammars
        raise HttpError(400, f"`{first}` and `{second}` both say what an answer is: give one")
    return next(iter(grammars.values()), None)


def is_forced(body: Mapping[str, object]) -> bool:
    """Returns True if a chat has to call a tool."""
    choice = body.get("tool_choice")
    return choice == "required" or isinstance(choice, dict)


def forced_form(body: Mapping[str, object], template: str) -> tuple[CallFormat, CallForm]:
    """Returns the format of calls that a chat has to make, and how they are written.

    It is the template's, or Hermes' where that is not known, or has no texts for the tools.
    """
    known, usual = call_format(template), FORMATS["hermes"]
    if known is not None and has_form(call_form(known.name, template), _functions(body)):
        return known, call_form(known.name, template)
    return usual, call_form(usual.name, "")


@contextlib.contextmanager
def _as_http(path: str) -> Iterator[None]:
    """Raises a GrammarError as HttpError, with the path of what is wrong."""
    try:
        yield
    except GrammarError as error:
        place = ".".join([path, *error.path])
        raise HttpError(400, f"`{place[:500]}`: {error}", param=place[:500]) from None


def _read_format(given: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar | None:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _read_schema(_OBJECT, name, compiler)
    if not isinstance(given, dict) or kind != "json_schema":
        needed = "an object with the `type` text, json_object or json_schema is needed"
        raise field_error(name, given, needed)
    holder = given.get("json_schema")
    if not isinstance(holder, dict) or "schema" not in holder:
        raise field_error(f"{name}.json_schema", holder, "an object with a `schema` is needed")
    return _read_schema(holder["schema"], f"{name}.json_schema.schema", compiler)


def _read_structured(given: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar | None:
    if not isinstance(given, dict):
        raise field_error(name, given, "an object is needed")
    check_fields(given, STRUCTURED_OUTPUTS, f"`{name}`")
    readers = {
        "json": _read_schema,
        "regex": _read_regex,
        "choice": _read_choice,
        "grammar": _read_text,
        "json_object": _read_object,
    }
    asked = [key for key in readers if given.get(key) not in (None, False)]
    if len(asked) != 1:
        raise field_error(name, given, f"exactly one of {', '.join(readers)} is needed")
    return readers[asked[0]](given[asked[0]], f"{name}.{asked[0]}", compiler)


def _read_object(given: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar:
    return _read_schema(_OBJECT, name, compiler)


def _read_schema(given: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar:
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            raise field_error(name, given, "a JSON schema is needed") from None
    with _as_http(name):
        return compiler.schema(given)


def _read_regex(given: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar:
    with _as_http(name):
        return compiler.regex(_text(given, name))


def _read_text(given: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar:
    with _as_http(name):
        return compiler.grammar(_text(given, name))


def _read_choice(given: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar:
    if not isinstance(given, list) or not given:
        raise field_error(name, given, "a list of texts is needed")
    with _as_http(name):
        return compiler.choice([_text(text, name) for text in given])


def _text(given: object, name: str) -> str:
    if not isinstance(given, str) or not given:
        raise field_error(name, given, "a text is needed")
    return given


def _read_calls(
    body: Mapping[str, object], compiler: GrammarCompiler, template: str
) -> CompiledGrammar | None:
    """Returns the grammar of an answer that has to call tools; None for others."""
    choice = body.get("tool_choice")
    if not choice or choice in ("none", "auto"):
        return None
    needed = "none, auto, required, or an object with the `function` to call, is needed"
    tools, one = _functions(body), body.get("parallel_tool_calls") is False
    if isinstance(choice, dict) and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        if name not in tools:
            raise field_error("tool_choice", name, f"`tools` has {', '.join(tools) or 'none'}")
        tools, one = {name: tools[name]}, True
    elif choice != "required":
        raise field_error("tool_choice", choice, needed)
    if not tools:
        raise field_error("tool_choice", choice, "give `tools` to choose from")
    for i, (name, parameters) in enumerate(_functions(body).items()):
        if name in tools:
            with _as_http(f"tools[{i}].function.parameters"):
                compiler.schema(parameters)
    _, form = forced_form(body, template)
    with _as_http("tools"):
        grammar = CallGrammar(form, compiler)
        return grammar.compiled(tools, 1) if one else grammar.compiled(tools)


def _functions(body: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    """Returns the schemas of functions' parameters, by the functions' names."""
    tools = body.get("tools") or []
    found: dict[str, Mapping[str, object]] = {}
    for i, tool in enumerate(tools if isinstance(tools, list) else ()):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise field_error(f"tools[{i}]", shown(tool), "a function with a `name` is needed")
        parameters = function.get("parameters") or _NO_PARAMETERS
        if not isinstance(parameters, Mapping):
            name = f"tools[{i}].function.parameters"
            raise field_error(name, parameters, "a JSON schema, an object, is needed")
        found[function["name"]] = parameters
    return found
