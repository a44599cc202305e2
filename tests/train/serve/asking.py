"""Holds requests of other clients: models of answers, tools, and a server that draws at random."""

import dataclasses
import enum

import pydantic

from tests.train.serve.scripted import TOKENIZER, ScriptedEngine, ids, serving
from tests.train.serve.walking import walk
from tests.train.tiny import CHATML, tokenizer

SAID = "Grüße, ∑ of all."
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"city": "Köln"}}\n</tool_call>'
TEMPLATE = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + CHATML
MODEL = "tiny/base"


class Unit(enum.Enum):
    DEGREES = "°C"
    KELVIN = "K"


class Day(pydantic.BaseModel):
    """A day."""

    name: str = pydantic.Field(max_length=5)
    unit: Unit
    high: int | None


class Weather(pydantic.BaseModel):
    """The weather at a place."""

    place: str = pydantic.Field(max_length=4)
    days: list[Day] = pydantic.Field(max_length=2)
    kind: Day | Unit


# What llguidance has no grammar for.
IMPOSSIBLE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


def answer(sample, index):
    """Draws what was asked for; calls a tool where a question says so, and tells its answer."""
    prompt = TOKENIZER.decode(sample.prompt)
    if "SAY " in prompt:
        return ids(prompt.partition("SAY ")[2].partition(" END")[0])
    if sample.limits.grammar is not None:
        return walk(sample, index)
    if "CALL" in prompt:
        return ids(SAID if "22 degrees" in prompt else CALL)
    return ids(SAID)


def served():
    """Serves the engine; yields its address."""
    engine = ScriptedEngine(answer)
    engine.facts = dataclasses.replace(engine.facts, max_length=4000)
    return serving(engine, tokenizer=tokenizer(TEMPLATE))
