"""Reads the fields that require a format of the answer: a schema, a grammar, or a tool call."""

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
    """Returns the grammar that a request requires of its answers, or None.

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
        "guided_grammar": _read_lark_grammar,
    }
    grammars: dict[str, CompiledGrammar] = {}
    for name, reader in readers.items():
        if body.get(name) is not None:
            grammar = reader(body[name], name, compiler)
            if grammar is not None:
                grammars[name] = grammar
    call_grammar = _read_calls(body, compiler, template)
    if call_grammar is not None:
        grammars["tool_choice"] = call_grammar
    if not grammars:
        return None
    names = [*grammars]
    if len(names) > 1:
        raise HttpError(
            400,
            f"`{names[0]}` and `{names[1]}` both define the form of the answer. Pass only one of "
            "them.",
        )
    return grammars[names[0]]


def is_forced(body: Mapping[str, object]) -> bool:
    """Returns True if a chat must call a tool."""
    choice = body.get("tool_choice")
    return choice == "required" or isinstance(choice, dict)


def forced_form(body: Mapping[str, object], template: str) -> tuple[CallFormat, CallForm]:
    """Returns the format of the required tool calls, and the form in which they are written.

    It is the template's, or Hermes' where that is not known, or has no texts for the tools.
    """
    template_format = call_format(template)
    if template_format is not None:
        template_form = call_form(template_format.name, template)
        if has_form(template_form, _schemas_of_functions(body)):
            return template_format, template_form
    hermes = FORMATS["hermes"]
    return hermes, call_form(hermes.name, "")


@contextlib.contextmanager
def _raise_as_http_error(path: str) -> Iterator[None]:
    """Turns a GrammarError into an HttpError that names the path of the wrong value."""
    try:
        yield
    except GrammarError as error:
        error_path = ".".join([path, *error.path])[:500]
        raise HttpError(400, f"`{error_path}`: {error}", param=error_path) from None


def _read_format(value: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar | None:
    """Returns the grammar of OpenAI's `response_format`."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return _read_schema(_OBJECT, name, compiler)
    if not isinstance(value, dict) or kind != "json_schema":
        requirement = "Pass an object with the `type` text, json_object or json_schema."
        raise field_error(name, value, requirement)
    json_schema = value.get("json_schema")
    if not isinstance(json_schema, dict) or "schema" not in json_schema:
        raise field_error(f"{name}.json_schema", json_schema, "Pass an object with a `schema`.")
    return _read_schema(json_schema["schema"], f"{name}.json_schema.schema", compiler)


def _read_structured(value: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar | None:
    """Returns the grammar of vLLM's `structured_outputs`."""
    if not isinstance(value, dict):
        raise field_error(name, value, "Pass an object.")
    check_fields(value, STRUCTURED_OUTPUTS, f"`{name}`")
    readers = {
        "json": _read_schema,
        "regex": _read_regex,
        "choice": _read_choice,
        "grammar": _read_lark_grammar,
        "json_object": _read_object,
    }
    keys = [key for key in readers if value.get(key) not in (None, False)]
    if len(keys) != 1:
        raise field_error(name, value, f"Pass exactly one of {', '.join(readers)}.")
    (key,) = keys
    return readers[key](value[key], f"{name}.{key}", compiler)


def _read_object(value: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar:
    return _read_schema(_OBJECT, name, compiler)


def _read_schema(value: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar:
    """Returns the grammar of a JSON schema, which may be given as text."""
    schema = value
    if isinstance(value, str):
        try:
            schema = json.loads(value)
        except (ValueError, RecursionError):
            raise field_error(name, value, "Pass a JSON schema.") from None
    with _raise_as_http_error(name):
        return compiler.schema(schema)


def _read_regex(value: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar:
    with _raise_as_http_error(name):
        return compiler.regex(_require_text(value, name))


def _read_lark_grammar(value: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar:
    with _raise_as_http_error(name):
        return compiler.grammar(_require_text(value, name))


def _read_choice(value: object, name: str, compiler: GrammarCompiler) -> CompiledGrammar:
    if not isinstance(value, list) or not value:
        raise field_error(name, value, "Pass a list of texts.")
    with _raise_as_http_error(name):
        return compiler.choice([_require_text(text, name) for text in value])


def _require_text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise field_error(name, value, "Pass a text.")
    return value


def _read_calls(
    body: Mapping[str, object], compiler: GrammarCompiler, template: str
) -> CompiledGrammar | None:
    """Returns the grammar of an answer that must call tools; None for other answers."""
    choice = body.get("tool_choice")
    if not choice or choice in ("none", "auto"):
        return None
    functions = _schemas_of_functions(body)
    is_single_call = body.get("parallel_tool_calls") is False
    if isinstance(choice, dict) and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        if name not in functions:
            raise field_error(
                "tool_choice",
                name,
                f"Pass one of the functions of `tools`: {', '.join(functions) or 'none'}.",
            )
        callable_functions = {name: functions[name]}
        is_single_call = True
    elif choice == "required":
        callable_functions = functions
    else:
        requirement = "Pass none, auto, required, or an object with the `function` to call."
        raise field_error("tool_choice", choice, requirement)
    if not callable_functions:
        raise field_error("tool_choice", choice, "Pass `tools` to choose from.")
    for i, (name, parameters) in enumerate(functions.items()):
        if name in callable_functions:  # checks each schema by itself, for its path in a message
            with _raise_as_http_error(f"tools[{i}].function.parameters"):
                compiler.schema(parameters)
    _, form = forced_form(body, template)
    with _raise_as_http_error("tools"):
        grammar = CallGrammar(form, compiler)
        if is_single_call:
            return grammar.compiled(callable_functions, 1)
        return grammar.compiled(callable_functions)


def _schemas_of_functions(body: Mapping[str, object]) -> dict[str, Mapping[str, object]]:
    """Returns the parameter schemas of functions by their names."""
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        return {}
    parameters_of_function: dict[str, Mapping[str, object]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise field_error(f"tools[{i}]", shown(tool), "Pass a function with a `name`.")
        parameters = function.get("parameters") or _NO_PARAMETERS
        if not isinstance(parameters, Mapping):
            name = f"tools[{i}].function.parameters"
            raise field_error(name, parameters, "Pass a JSON schema as an object.")
        parameters_of_function[function["name"]] = parameters
    return parameters_of_function
