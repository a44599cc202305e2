"""Masks of grammars, walked at random without a model: what ends is what was asked for."""

import importlib.util
import json
import random
import re
import subprocess

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from lora_jax.models.sampling.adjust import mask_words
from lora_jax.models.sampling.grammar import CompiledGrammar, GrammarCompiler, GrammarError
from tests.train.tiny import tokenizer

if importlib.util.find_spec("llguidance") is None:
    pytest.skip("the extra 'structured' has llguidance", allow_module_level=True)

TOKENIZER, EOS = tokenizer(), 258
VOCAB = len(TOKENIZER) + 6  # as many models have more logits than tokens
COMPILER = GrammarCompiler(TOKENIZER, VOCAB, [EOS])
CLOSING = {TOKENIZER(char, add_special_tokens=False)["input_ids"][0] for char in '"}]'} | {EOS}


def walks(grammars, seed, most=600):
    """Walks of grammars side by side: the texts that ended, None for those that did not."""
    rng = random.Random(seed)
    rows = {i: grammar.begin() for i, grammar in enumerate(grammars)}
    tokens, texts = {i: [] for i in rows}, [None] * len(rows)
    for _ in range(most):
        masks = np.full((len(grammars), mask_words(VOCAB)), 0xFFFFFFFF, np.uint32)
        CompiledGrammar.fill(rows, masks)
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :VOCAB]
        for i, row in [*rows.items()]:
            allowed = np.flatnonzero(bits[i]).tolist()
            ends = [token for token in allowed if token in CLOSING]
            token = rng.choice(ends if ends and rng.random() < 0.5 else allowed)
            if token != EOS:
                tokens[i].append(token)
                row.accept(token)
            if token == EOS or row.is_over:
                texts[i] = TOKENIZER.decode(tokens[i])
                del rows[i]
        if not rows:
            break
    return texts


def drawn_schema(rng, depth=0):
    """A schema of the parts that are supported."""
    kinds = ["integer", "number", "string", "pattern", "enum", "const", "boolean", "null", "format"]
    kinds += ["array", "object", "object", "anyOf", "tuple", "ref", "map"] * (depth < 3)
    kind = rng.choice(kinds)
    low = rng.randrange(-9, 20)
    inner = lambda: drawn_schema(rng, depth + 1)  # noqa: E731
    if kind in ("integer", "number"):
        limits = {"minimum": low, rng.choice(["maximum", "exclusiveMaximum"]): low + 9}
        return {"type": kind} | (limits if rng.random() < 0.7 else {})
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice([r"^[a-c]{2,4}$", r"^\d+-x?$", "(ab)+c"])}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "time", "uuid", "ipv4"])}
    if kind == "string":
        return {"type": "string", "minLength": low % 3, "maxLength": low % 3 + 5}
    if kind == "enum":
        return {"enum": rng.sample(["a", 'q"uote', 3, None, True, "ü"], 3)}
    if kind == "const":
        return {"const": rng.choice(["x y", 7, {"k": [1, "z"]}, False])}
    if kind == "array":
        return {"type": "array", "items": inner(), "minItems": low % 2, "maxItems": low % 2 + 2}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": 2}
    if kind == "anyOf":
        return {"anyOf": [inner(), inner()]}
    if kind == "map":
        return {"type": "object", "additionalProperties": inner(), "maxProperties": 3}
    if kind == "object":
        names = rng.sample(["a", "b", "c c", "ü", 'd"'], rng.randrange(1, 4))
        required = [name for name in names if rng.random() < 0.7]
        fields = {"properties": {name: inner() for name in names}, "required": required}
        return {"type": "object", "additionalProperties": False, **fields}
    return {"$ref": "#/$defs/node"} if kind == "ref" else {"type": kind}


def schemas(n, seed):
    rng = random.Random(seed)
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "v": {"const": 1}}}
    node |= {"required": ["v"], "additionalProperties": False}
    for _ in range(n):
        yield {**drawn_schema(rng), "$defs": {"node": node}}


def walked(n, seed):
    """The number of walks that ended, and that of those that another schema would refuse."""
    ended = strangers = 0
    before = {"type": "array", "minItems": 99}
    asked = list(schemas(n, seed))
    for first in range(0, n, 50):
        some = asked[first : first + 50]
        for schema, text in zip(some, walks([*map(COMPILER.schema, some)], first), strict=True):
            if text is None:
                continue
            value = json.loads(text)
            Draft202012Validator(schema).validate(value)
            strangers += not Draft202012Validator(before).is_valid(value)
            ended, before = ended + 1, schema
    return ended, strangers


def test_what_ends_validates():
    ended, strangers = walked(50, 0)
    assert ended > 45 and strangers > 25, (ended, strangers)


@pytest.mark.slow
def test_what_ends_of_hundreds_validates():
    ended, strangers = walked(300, 1)
    assert ended > 270 and strangers > 150, (ended, strangers)


def test_formats_that_are_not_known_restrict_nothing():
    schema = {"type": "object", "properties": {"p": {"type": "string", "format": "path"}}}
    schema["properties"]["format"] = {"type": "string", "format": "password", "maxLength": 2}
    schema |= {"required": ["p", "format"], "additionalProperties": False}
    (text,) = walks([COMPILER.schema(schema)], 4)
    Draft202012Validator(schema).validate(json.loads(text))


def test_many_formats_are_refused_at_once():
    fields = {f"p{i}": {"type": "string", "format": f"x{i}"} for i in range(1500)}
    with pytest.raises(GrammarError, match="1500 different formats, but at most 100"):
        COMPILER.schema({"properties": fields})


def test_a_parser_at_its_limit_ends_no_answer():
    ambiguous = COMPILER.grammar('start: s\ns: s s | "a" | s s s | ')
    stuck, other = ambiguous.begin(), COMPILER.regex("ab").begin()
    (letter,) = TOKENIZER("a", add_special_tokens=False)["input_ids"]
    with pytest.raises(GrammarError, match="does not allow this token.*is 500"):
        for _ in range(200):
            stuck.accept(letter)
    masks = np.full((2, mask_words(VOCAB)), 0xFFFFFFFF, np.uint32)
    CompiledGrammar.fill({0: stuck, 1: other}, masks)
    assert masks.any(axis=1).tolist() == [False, True]
    with pytest.raises(GrammarError, match="does not allow this token"):
        stuck.accept(EOS)


def test_other_grammars():
    regex, words = r"[a-c]{3}-\d+", ["yes", "no", 'may"be', "yesterday"]
    gbnf, lark = 'root ::= "x" ("y" | "z")+', 'start: "x" NAME\nNAME: /[a-z]{2}/'
    made = [COMPILER.regex(regex), COMPILER.choice(words), COMPILER.grammar(gbnf)]
    made += [COMPILER.grammar(lark)]
    for seed in range(20):
        a, b, c, d = walks(made, seed)
        assert re.fullmatch(regex, a), a
        assert b in words
        assert re.fullmatch("x[yz]+", c) and re.fullmatch("x[a-z]{2}", d)


@pytest.mark.parametrize(
    ("schema", "path", "problem"),
    [
        ({"properties": {"a": {"items": {"uniqueItems": True}}}}, "properties.a.items", "unique"),
        ({"anyOf": [{"type": "null"}, {"not": {}}]}, "anyOf.1", "not"),
        ({"$defs": {"a": {"type": "strin"}}, "$ref": "#/$defs/a"}, "$defs.a", "strin"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "", "minimum"),
        ({"items": {"type": "string", "pattern": "(?=a)b"}}, "items", "look-ahead"),
        ({"$ref": "#/$defs/none"}, "", "does not exist"),
        (False, "", "allows no answer"),
        ([1], "", "an object"),
        ({"enum": ["x" * 100_001]}, "", "at most 100,000 are allowed"),
    ],
)
def test_a_schema_that_cannot_be_is_named_by_its_path(schema, path, problem):
    with pytest.raises(GrammarError, match=problem) as caught:
        COMPILER.schema(schema)
    assert ".".join(caught.value.path) == path


def allows(grammar, text):
    """Returns whether a text is a whole answer of a grammar."""
    row, tokens = grammar.begin(), TOKENIZER(text, add_special_tokens=False)["input_ids"]
    try:
        for token in tokens:
            row.accept(token)
    except GrammarError:
        return False
    return row.is_over or row.matcher.is_accepting()


BIG, INT64 = 1176432598712345678, 2**63


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"enum": [BIG, BIG + 1]}, "enum"),
        ({"enum": [2**53 + 1]}, "enum"),
        ({"const": -BIG}, "const"),
        ({"const": {"a": [1, {"b": BIG}]}}, "const"),
        ({"type": "integer", "const": INT64}, "const"),
        ({"type": "integer", "const": 1e300}, "const"),
        ({"const": 10**400}, "const"),
        ({"type": "integer", "maximum": BIG}, "maximum"),
        ({"type": ["integer", "null"], "exclusiveMinimum": 2**53}, "exclusiveMinimum"),
        ({"type": "integer", "exclusiveMinimum": 2**53 + 1}, "exclusiveMinimum"),
        ({"type": "integer", "exclusiveMaximum": INT64 - 1}, "exclusiveMaximum"),
        ({"type": "number", "minimum": 2**53 + 1}, "minimum"),
        ({"exclusiveMaximum": 2**60}, "exclusiveMaximum"),
        ({"properties": {"enum": {"items": {"const": BIG}}}}, "properties.enum.items.const"),
        ({"properties": {"default": {"const": BIG}}}, "properties.default.const"),
        ({"$defs": {"a": {"enum": [BIG]}}, "items": {"$ref": "#/$defs/a"}}, "$defs.a.enum"),
    ],
)
def test_an_integer_that_would_be_another_one_is_refused(schema, path):
    with pytest.raises(GrammarError, match="cannot be represented exactly") as caught:
        COMPILER.schema(schema)
    assert ".".join(caught.value.path) == path
    with pytest.raises(GrammarError, match="cannot be represented exactly"):
        COMPILER.grammar(f'start: "x" %json {json.dumps(schema)}')


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [2**53, -(2**53), 2**53 - 1, 10**16, True, 7.0]},
        {"type": "integer", "minimum": 0, "maximum": INT64 - 1},
        {"type": "integer", "minimum": 0, "exclusiveMaximum": INT64},
        {"type": "integer", "minimum": 2**53 - 1, "maximum": 10**18},
        {"type": "integer", "exclusiveMinimum": 1 - 2**53, "exclusiveMaximum": 2**53 - 1},
        {"type": "number", "minimum": -(2**53), "maximum": 10**16},
        {"type": "integer", "default": BIG, "examples": [BIG]},
    ],
)
def test_integers_that_can_be_kept_are(schema):
    grammar, validator = COMPILER.schema(schema), Draft202012Validator(schema)
    edges = [0, 7, 2**53, 10**16, 10**18, INT64]
    numbers = [sign * edge + step for sign in (1, -1) for edge in edges for step in (-1, 0, 1)]
    for number in numbers:
        assert allows(grammar, str(number)) == validator.is_valid(number), number


@pytest.mark.parametrize("vocab", [len(TOKENIZER), VOCAB])
def test_a_model_without_a_token_that_ends_answers(vocab):
    """Its users could ask for no schema and no grammar; no logit may end an answer."""
    row = GrammarCompiler(TOKENIZER, vocab, ()).regex("[0-9]{1,2}").begin()
    digits = [TOKENIZER(digit, add_special_tokens=False)["input_ids"][0] for digit in "0123456789"]
    for _ in range(2):
        masks = np.full((1, mask_words(vocab)), 0xFFFFFFFF, np.uint32)
        CompiledGrammar.fill({0: row}, masks)
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[0, :vocab]
        assert np.flatnonzero(bits).tolist() == sorted(digits)
        row.accept(digits[7])
    assert row.is_over and len(TOKENIZER) == VOCAB - 6


def test_a_grammar_that_cannot_be():
    for make, text, problem in (
        (COMPILER.regex, "(", "unclosed group"),
        (COMPILER.grammar, "start: nobody", "unknown name"),
        (COMPILER.grammar, "nonsense {{{", "Expected"),
        (COMPILER.lark, "start: " + "(" * 200 + '"a"' + ")" * 200, "nested 200 deep"),
    ):
        with pytest.raises(GrammarError, match=problem):
            make(text)
    constraint = COMPILER.regex("ab").begin()
    with pytest.raises(GrammarError, match="does not allow this token"):
        constraint.accept(TOKENIZER("b", add_special_tokens=False)["input_ids"][0])


PATTERNS = [{"type": "string", "pattern": f"a.{{{i}}}b.*c"} for i in range(50)]


@pytest.mark.parametrize(
    "schema",
    [
        pytest.param({"allOf": PATTERNS}, id="patterns"),
        pytest.param(
            {"type": "integer", "multipleOf": 9_999_991}, id="a multiple", marks=pytest.mark.slow
        ),
    ],
)
def test_a_grammar_that_takes_for_ever_is_ended(schema, monkeypatch):
    monkeypatch.setattr("lora_jax.models.sampling.grammar._SECONDS", 1)
    with pytest.raises(GrammarError, match="more than 1 seconds"):
        COMPILER.schema(schema)


@pytest.mark.slow
def test_a_grammar_that_nobody_waits_for_ends_by_itself(monkeypatch):
    run = subprocess.run
    monkeypatch.setattr("lora_jax.models.sampling.grammar._SECONDS", 0)
    monkeypatch.setattr(subprocess, "run", lambda *args, **how: run(*args, **how | {"timeout": 60}))
    with pytest.raises(GrammarError, match="process that compiles the grammar ended"):
        COMPILER.schema({"allOf": PATTERNS})
