"""Constrained decoding: the tokens that a JSON schema, a regular expression or a grammar allows.

By the library llguidance (extra `structured`), whose masks cost a fraction of a millisecond each.
Integers in schemas that the library would change are refused.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from lora_jax.core.types import Tokenizer
from lora_jax.models.sampling.adjust import mask_words

MAX_CHARACTERS = 100_000  # characters of a grammar or schema
_MAX_NESTING = 100  # brackets in brackets, at most
_MAX_TRIED = 200  # parts of a schema that are tried to find the wrong one
_CONJUNCTIONS, _SECONDS = 8, 5  # patterns that are compiled without a look at the time
_QUICK = 30_000  # characters that are compiled so
_MULTIPLES = re.compile(r'"multipleOf": ?[\d.e+-]{5}')  # their time grows with the number
_WHITESPACE = r"[ \t\n\r]{1,20}"  # models that pad without end do so no longer than this
_NO_SCHEMAS = ("const", "enum", "default", "example", "x-guidance")
_MAX_ITEMS = 500  # of the parser at a place: the time of ambiguous grammars grows by their cube
_MAX_FORMATS = 100  # different ones in a schema
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_MAX_INTEGER = 2**63 - 1


class GrammarError(ValueError):
    """A grammar cannot be used.

    Attributes:
      path: keys of the part of a schema that is wrong; empty for the whole.
    """

    def __init__(self, problem: str, path: Sequence[str] = ()) -> None:
        """Takes a description of the problem, and its path in the schema."""
        super().__init__(problem)
        self.path = tuple(path)


class Constraint:
    """The tokens that a grammar allows next in one answer."""

    def __init__(self, matcher: Any, words: int) -> None:
        """Takes its own LLMatcher, and the number of words in its masks."""
        self.matcher, self.words = matcher, words

    @property
    def is_over(self) -> bool:
        """True once only the end of the answer is allowed."""
        return bool(self.matcher.is_stopped())

    def accept(self, token: int) -> None:
        """Advances by a token; raises GrammarError if it is not allowed, or at a limit."""
        if self.matcher.is_error() or not self.matcher.consume_token(token):
            raise GrammarError(
                f"The grammar does not allow this token: {_shorten(self.matcher.get_error())}"
            )


class CompiledGrammar:
    """A grammar for one tokenizer."""

    def __init__(self, matcher: Any, words: int) -> None:
        """Takes an unused LLMatcher, and the number of words in its masks."""
        self._matcher, self._words = matcher, words

    def begin(self) -> Constraint:
        """Returns the constraint of a new answer."""
        return Constraint(self._matcher.deep_copy(), self._words)

    @staticmethod
    def fill(rows: Mapping[int, Constraint], masks: np.ndarray) -> None:
        """Restricts masks, [rows, words] uint32, to the allowed tokens, in threads.

        One that reached a limit of its parser allows nothing: the library would end its text there.
        """
        matchers = [constraint.matcher for constraint in rows.values()]
        row_words = next(iter(rows.values())).words
        row_masks = np.zeros((len(rows), row_words), np.int32)
        indexed_matchers = [(matcher, i) for i, matcher in enumerate(matchers)]
        row_bytes = row_words * row_masks.itemsize
        _mask_executor().unsafe_compute_mask_ptr(
            indexed_matchers, row_masks.ctypes.data, row_bytes, len(rows)
        )
        row_masks[[matcher.is_error() for matcher in matchers]] = 0
        n_words = min(row_words, masks.shape[1])
        row_indices = list(rows)
        masks[row_indices, :n_words] &= row_masks[:, :n_words].view(np.uint32)
        masks[row_indices, n_words:] = 0


class GrammarCompiler:
    """Compiles grammars for a tokenizer; safe for use by several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Collection[int]) -> None:
        """Takes a fast tokenizer of transformers.

        Args:
          tokenizer: the model's.
          vocab: the number of the model's logits.
          ends: the tokens that end an answer.
        """
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._vocab, self._ends = vocab, sorted(ends)

    @functools.cached_property
    def _tokens(self) -> Any:
        """The vocabulary as llguidance's object, which takes a second to make."""
        try:
            import llguidance
        except ImportError:
            raise GrammarError(
                "Structured answers need the package llguidance. Run: "
                "pip install 'lora_jax[structured]'"
            ) from None
        backend = copy.copy(self._tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        size = max(self._vocab, len(self._tokenizer))
        ends = self._ends
        if not ends:
            # A token that no logit belongs to stands for the one that ends answers. llguidance
            # takes tokens of the tokenizer alone, whatever `n_vocab` is.
            names = [f"<|no logit {token}|>" for token in range(len(self._tokenizer), size + 1)]
            backend.add_special_tokens(names)
            ends = [backend.token_to_id(names[-1])]
            size = ends[0] + 1
        try:
            return llguidance.LLTokenizer(backend.to_str(), n_vocab=size, eos_token=ends)
        except ValueError as error:
            problem = "Structured answers are not possible with the model's tokenizer"
            raise GrammarError(f"{problem}: {_shorten(str(error))}") from None

    def prepare(self) -> None:
        """Reads the vocabulary now, so that the first grammar does not wait for it."""
        with self._lock:
            self._tokens  # noqa: B018

    def schema(self, schema: object) -> CompiledGrammar:
        """Returns the grammar of the JSON texts that match a schema.

        Raises:
          GrammarError: the schema has what is not supported, or describes nothing; its path says
            where.
        """
        if isinstance(schema, bool):
            if not schema:
                raise GrammarError(
                    "The JSON schema `false` allows no answer. Pass a schema that allows one."
                )
            schema = {}
        if not isinstance(schema, Mapping):
            raise GrammarError("The JSON schema is not an object. Pass a JSON object.")
        try:
            return self._compile_schema(schema)
        except GrammarError as error:
            if error.path:
                raise
            path, problem = self._wrong_part(schema, str(error))
            raise GrammarError(problem, path) from None

    def regex(self, pattern: str) -> CompiledGrammar:
        r"""Returns the grammar of a regular expression, in which \d means 0 to 9."""
        self.prepare()
        from llguidance import regex_to_lark

        _check_size(pattern)
        return self.lark(f"start: /{regex_to_lark(pattern, 'd')}/")

    def choice(self, texts: Sequence[str]) -> CompiledGrammar:
        """Returns the grammar that allows one of several texts."""
        return self.lark("start: " + " | ".join(map(quote_for_lark, texts)))

    def lark(self, grammar: str) -> CompiledGrammar:
        """Returns the grammar described in Lark's notation."""
        return self._compile("grammar_from_lark", grammar)

    def grammar(self, text: str) -> CompiledGrammar:
        """Returns the grammar described in Lark's notation or in llama.cpp's GBNF."""
        self.prepare()
        from llguidance.gbnf_to_lark import any_to_lark

        _check_size(text)
        for schema in find_schemas(text):
            _check_integers(schema)
        try:
            lark = any_to_lark(text)
        except Exception as error:
            raise GrammarError(_shorten(str(error))) from None
        return self.lark(lark)

    def literal(self, text: str) -> str:
        """Returns a text in Lark's notation, with special tokens by their ids."""
        return " ".join(self._literals(text)) or '""'

    def _literals(self, text: str) -> Iterator[str]:
        """Yields the quoted parts of a text, and its special tokens."""
        self.prepare()
        added: Mapping[str, int] = self._tokenizer.get_added_vocab()
        special = [name for name, i in added.items() if self._tokens.is_special_token(i)]
        names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
        for part in re.split(f"({names})", text) if names else [text]:
            if part:
                yield f"<[{added[part]}]>" if part in special else quote_for_lark(part)

    def json_text(self, schema: Mapping[str, object]) -> str:
        """Returns a schema in the form that llguidance reads.

        Its texts have some white space between tokens of JSON, not any. A format that is not known
        is left out: by JSON Schema, it restricts nothing.

        Raises:
          GrammarError: the schema is too large, or has an integer that the library would change.
        """
        _check_size(json.dumps(schema))
        _check_integers(schema)
        formats = {*_find_formats(schema)}
        if len(formats) > _MAX_FORMATS:
            raise GrammarError(
                f"The schema has {len(formats)} different formats, but at most {_MAX_FORMATS} are "
                "allowed. Use fewer formats."
            )
        unknown = {name for name in formats if not _is_known_format(name)}
        schema = _without_formats(schema, unknown) if unknown else schema
        options: dict[str, object] = {"whitespace_pattern": _WHITESPACE}
        schema_options = schema.get("x-guidance")
        if isinstance(schema_options, Mapping):
            options |= schema_options
        return json.dumps({**schema, "x-guidance": options})

    def _compile_schema(self, schema: Mapping[str, object]) -> CompiledGrammar:
        self.prepare()  # says how to install the library
        return self._compile("grammar_from_json_schema", self.json_text(schema))

    def _compile(self, form: str, text: str) -> CompiledGrammar:
        """Compiles a grammar, after checks of its size and time."""
        _check_size(text)
        self.prepare()
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = getattr(LLMatcher, form)(text)
        except ValueError as error:
            raise GrammarError(_shorten(str(error))) from None
        if _may_take_long(text):
            _check_time(grammar)
        max_items = None if form == "grammar_from_json_schema" else _MAX_ITEMS
        limits = LLParserLimits(verbose_errors=False, max_items_in_row=max_items)
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(_shorten(matcher.get_error()))
        return CompiledGrammar(matcher, mask_words(self._tokens.vocab_size))

    def _wrong_part(
        self, schema: Mapping[str, object], problem: str
    ) -> tuple[tuple[str, ...], str]:
        """Returns the path of the innermost invalid part of a schema, and the problem."""
        shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        path: tuple[str, ...] = ()
        part = schema
        n_tried = 0
        deadline = time.monotonic() + _SECONDS
        # Goes from part to part, as long as a part of the wrong part is wrong by itself.
        while True:
            for keys, subschema in subschemas(part):
                n_tried += 1
                is_over = n_tried > _MAX_TRIED or time.monotonic() > deadline
                if is_over or not isinstance(subschema, Mapping):
                    continue
                try:
                    self._compile_schema({**shared, **subschema})
                except GrammarError as error:
                    path = (*path, *keys)
                    part = subschema
                    problem = str(error)
                    break
            else:  # no part of this part is wrong by itself
                return path, problem


def _find_formats(part: Any) -> Iterator[str]:
    """Yields the format names in a part of a schema."""
    pairs: Iterable[tuple[object, Any]] = enumerate(part) if isinstance(part, list) else ()
    for key, inner in part.items() if isinstance(part, Mapping) else pairs:
        if key == "format" and isinstance(inner, str):
            yield inner
        elif key not in _NO_SCHEMAS:
            yield from _find_formats(inner)


def _is_known_format(name: str) -> bool:
    """Returns False for a string format that llguidance does not know."""
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "format": name}))
    return "Unknown format" not in LLMatcher.validate_grammar(grammar)


def _without_formats(part: Any, names: Collection[str]) -> Any:
    """Returns a part of a schema without these formats."""
    if isinstance(part, list):
        return [_without_formats(inner, names) for inner in part]
    if not isinstance(part, Mapping):
        return part
    return {
        key: inner if key in _NO_SCHEMAS else _without_formats(inner, names)
        for key, inner in part.items()
        if not (key == "format" and isinstance(inner, str) and inner in names)
    }


def quote_for_lark(text: str) -> str:
    """Returns a text as a quoted string in Lark's notation."""
    return json.dumps(text, ensure_ascii=False)


def _check_integers(schema: Mapping[str, object]) -> None:
    """Raises GrammarError for an integer that llguidance would change."""
    for number, path in rounded_integers(schema):
        raise GrammarError(
            f"{number} cannot be represented exactly: numbers of a schema are read as doubles, "
            "which round integers beyond 2^53. Use a string or a smaller number.",
            path,
        )


def _check_size(text: str) -> None:
    """Raises GrammarError for a text that is too long or too deeply nested."""
    if len(text) > MAX_CHARACTERS:
        raise GrammarError(
            f"The grammar or schema has {len(text):,} characters, but at most "
            f"{MAX_CHARACTERS:,} are allowed. Use a shorter one."
        )
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    if deepest > _MAX_NESTING:
        raise GrammarError(
            f"Brackets of the grammar or schema are nested {deepest} deep, but at most "
            f"{_MAX_NESTING} levels are allowed. Use fewer levels."
        )


def _may_take_long(text: str) -> bool:
    """Returns True for texts that may take long to compile, by simple heuristics."""
    patterns = text.count("pattern") + text.count('"format"') + text.count("&")
    return patterns > _CONJUNCTIONS or len(text) > _QUICK or bool(_MULTIPLES.search(text))


def _check_time(grammar: str) -> None:
    """Compiles a grammar in another process; raises GrammarError if that takes too long.

    The intersection of many expressions can take for ever, and no thread can be ended. The other
    process ends itself if a kill of this one leaves it behind.
    """
    code = (
        f"import signal; getattr(signal, 'alarm', int)({_SECONDS + 1})\n"
        "import sys; from llguidance import LLMatcher as M, LLTokenizer as T\n"
        "M(T('byte'), sys.stdin.read(), log_level=0)"
    )
    command = [sys.executable, "-c", code]
    try:
        process = subprocess.run(
            command, input=grammar.encode(), timeout=_SECONDS, capture_output=True
        )
    except subprocess.TimeoutExpired:
        raise GrammarError(
            f"Compiling the grammar takes more than {_SECONDS} seconds. Use fewer patterns that "
            "apply together, fewer properties, or a smaller multipleOf."
        ) from None
    if process.returncode < 0:  # a signal ended it
        raise GrammarError(
            "The process that compiles the grammar ended. Use fewer or smaller patterns."
        )


def _shorten(problem: str) -> str:
    """Returns the first lines of an error message."""
    lines = [line.strip() for line in problem.split("<state>")[0].splitlines() if line.strip()]
    return " ".join(lines)[:300] or "The grammar allows nothing more."


@functools.cache
def _mask_executor() -> Any:
    """Returns the thread pool that computes masks."""
    import llguidance

    return llguidance.LLExecutor()


def subschemas(schema: Mapping[str, object]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yields the schemas inside a schema, with their keys."""
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, Mapping):
            for name, inner in value.items():
                yield (key, name), inner
        elif key in _IN_LISTS and isinstance(value, list):
            for i, inner in enumerate(value):
                yield (key, str(i)), inner
        elif isinstance(value, Mapping) and key not in _NO_SCHEMAS:
            yield (key,), value


def find_schemas(grammar: str) -> Iterator[Mapping[str, object]]:
    """Yields the schemas inside a Lark grammar; skips those that cannot be parsed."""
    for text in grammar.split("%json")[1:]:
        with contextlib.suppress(ValueError):
            schema, _ = json.JSONDecoder().raw_decode(text.lstrip())
            if isinstance(schema, Mapping):
                yield schema


def rounded_integers(
    schema: Mapping[str, object], path: tuple[str, ...] = ()
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields each integer of a schema that llguidance would round, and its path."""
    for key in ("const", "enum", *_BOUNDS):
        for number in _find_integers(schema.get(key)):
            if not _is_exact(number, key):
                yield number, (*path, key)
    for keys, inner in subschemas(schema):
        if isinstance(inner, Mapping):
            yield from rounded_integers(inner, (*path, *keys))


def _is_exact(number: int, key: str) -> bool:
    """Returns True if llguidance keeps an integer at a schema key unchanged.

    The library reads doubles, and writes the shortest digits that name one. It clips the bounds of
    integers to 64 bits, and takes 1 off an exclusive bound once that is a double.
    """
    size = abs(number)
    is_exclusive = key.startswith("exclusive")
    max_size = _MAX_INTEGER + 1 if is_exclusive else _MAX_INTEGER
    is_clipped_bound = key in _BOUNDS and size >= max_size
    if size < 2**53 or is_clipped_bound:
        return True
    if is_exclusive or size > _MAX_INTEGER:
        return False
    return Decimal(repr(float(number))) == number


def _find_integers(value: object) -> Iterator[int]:
    """Yields the integers in a JSON value."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _find_integers(inner)
    elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        yield int(value)
