"""Samples of the engine heed penalties and limits of tokens, and change no row beside them."""

import numpy as np
import pytest

from tests.train.serve.engine.engines import VOCAB, begun, bits, sampled, text_of
from train.serve.protocol.limits import Penalties, TokenLimits
from train.serve.protocol.requests import RequestError

PROMPT = [3, 8, 8, 20, 5]
FIELDS = {"adapter": "one", "prompt": PROMPT, "max_tokens": 20, "temperature": 0.0}
LIMITS = [
    {"penalties": Penalties(repetition=1.4)},
    {"penalties": Penalties(frequency=0.8, presence=-0.4)},
    {"penalties": Penalties(repetition=0.7, presence=1.5), "min_p": 0.3, "temperature": 1.1},
    {"min_p": 0.5, "temperature": 1.6},
    {"limits": TokenLimits(biases={4: 3.0, 9: -50.0, 11: 1.5})},
    {"limits": TokenLimits(allowed=(2, 7, 9, 30, 36))},
    {"limits": TokenLimits(bad=((7,), (9, 2), (30, 30, 2)), allowed=(2, 7, 9, 30))},
    {"limits": TokenLimits(min_tokens=5, ends=frozenset({2, 9}), allowed=(2, 9, 14))},
]


class Reference:
    """Draws greedily with a request's limits, by the model itself and vLLM's formulas."""

    def __init__(self, world, fields):
        self.world, self.fields = world, fields

    def choices(self, drawn):
        """The tokens that may be drawn next: of temperature 0, the likeliest one."""
        fields = self.fields
        x = self.world.logits(fields["adapter"], [*fields["prompt"], *drawn])[-1].copy()
        limits, penalties = fields.get("limits", TokenLimits()), fields.get("penalties")
        if limits.allowed is not None:
            x[[i for i in range(VOCAB) if i not in limits.allowed]] = -np.inf
        for *run, last in limits.bad:
            if not run or drawn[-len(run) :] == run:
                x[last] = -np.inf
        if len(drawn) < limits.min_tokens:
            x[[*limits.ends]] = -np.inf
        for token, bias in limits.biases.items():
            x[token] += bias
        if penalties is not None:
            for token in {*fields["prompt"], *drawn}:
                x[token] *= penalties.repetition ** (-1 if x[token] > 0 else 1)
            for token in {*drawn}:
                x[token] -= penalties.frequency * drawn.count(token) + penalties.presence
        if not fields["temperature"]:
            return {int(x.argmax())}
        p = np.exp((x - x.max()) / fields["temperature"])
        return {*np.flatnonzero(p >= fields.get("min_p", 0.0) * (1 - 1e-5)).tolist()}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(LIMITS)))
def test_draws_by_vllms_formulas(world, engine, number):
    fields = {**FIELDS, **LIMITS[number], "seed": number}
    reference, plain = Reference(world, fields), {**FIELDS, "seed": number}
    (drawn,) = sampled(engine, **fields).completions
    tokens = drawn.tokens.tolist()
    assert len(tokens) == 20
    for n, token in enumerate(tokens):
        assert token in reference.choices(tokens[:n]), n
    plain["temperature"] = fields["temperature"]
    assert tokens != sampled(engine, **plain).completions[0].tokens.tolist()
    logps = world.logps("one", [*PROMPT, *tokens], fields["temperature"])[len(PROMPT) - 1 : -1]
    off = np.abs(drawn.logprobs - logps[np.arange(20), tokens]).max()
    assert off < 1e-5 * np.abs(logps).max(), "they are the model's own, whatever the limits"


@pytest.mark.slow
def test_rows_with_and_without_change_no_bit_of_each_other(engine):
    """Nothing compiles when limits come and go, either."""
    asked = [{**FIELDS, **limits, "seed": i, "n": 2} for i, limits in enumerate(LIMITS)]
    free = {**FIELDS, "temperature": 0.9, "n": 2}
    asked += [{**free, "top_p": (1.0, 0.8)[i], "seed": i} for i in (0, 1)]
    alone = [bits(sampled(engine, **fields)) for fields in asked]
    before = engine.status().compiled
    together = [begun(engine, **fields) for fields in asked]
    assert [bits(each.result(300)) for each in together] == alone
    assert engine.status().compiled == before
    assert len({str(each) for each in alone}) == len(alone)


def test_min_tokens_hold_back_ends_and_stop_texts(engine):
    fields = {**FIELDS, "limits": TokenLimits(allowed=(2, 9, 14))}
    free = sampled(engine, **fields).completions[0].tokens.tolist()
    ends, stop = frozenset({free[0]}), (text_of(free[:1]),)
    assert len(sampled(engine, **fields, stop_ids=ends).completions[0].tokens) == 1
    assert len(sampled(engine, **fields, stop=stop).completions[0].tokens) == 1
    limits = TokenLimits(allowed=(2, 9, 14), min_tokens=6, ends=ends)
    held = sampled(engine, **{**fields, "limits": limits}, stop_ids=ends).completions[0]
    assert len(held.tokens) > 6 or not held.stopped
    assert free[0] not in held.tokens[:6]
    later = TokenLimits(allowed=(2, 9, 14), min_tokens=6)
    held = sampled(engine, **{**fields, "limits": later}, stop=stop).completions[0]
    assert len(held.tokens) == next(i for i in range(6, 20) if free[i] == free[0]) + 1


def test_limits_that_make_no_sense_are_refused(engine):
    for limits, problem in (
        ({"limits": TokenLimits(allowed=())}, "allowed tokens is empty"),
        ({"limits": TokenLimits(allowed=(VOCAB,))}, "an id outside 0 to 36"),
        ({"limits": TokenLimits(bad=((),))}, "a bad word is empty"),
        ({"limits": TokenLimits(biases={1: np.inf})}, "not finite"),
        ({"penalties": Penalties(repetition=0.0)}, "Pass a number above 0"),
        ({"min_p": 1.5}, "from 0 to 1"),
        ({"limits": TokenLimits(allowed=(7,), bad=((7,),))}, "after 0 tokens no token may follow"),
        ({"limits": TokenLimits(allowed=(7, 8), bad=((7, 7), (7, 8), (8,)))}, "after 1 tokens"),
    ):
        with pytest.raises(RequestError, match=problem):
            sampled(engine, **{**FIELDS, **limits})


class Alternating:
    """A grammar of even and odd tokens in turns, of which six are all."""

    def begin(self):
        return Turns()

    def fill(self, rows, masks):
        for place, row in rows.items():
            masks[place] &= np.uint32(0x55555555 << row.n % 2 & 0xFFFFFFFF)


class Turns:
    def __init__(self):
        self.n = 0

    @property
    def is_over(self):
        return self.n == 6

    def accept(self, token):
        if token == 4 and self.n == 2:
            raise ValueError("no 4 here")
        self.n += 1


def test_a_grammar_masks_its_rows_alone(engine):
    asked = [{**FIELDS, "temperature": 1.5, "seed": i, "n": 2} for i in range(6)]
    for fields in asked[::2]:
        fields["limits"] = TokenLimits(grammar=Alternating(), allowed=(5, 8, 9, 20, 31))
    # Their rows come before some with a grammar.
    asked = [{**asked[1], "limits": TokenLimits(bad=((3,),))}, *asked]
    alone = [sampled(engine, **fields) for fields in asked]
    together = [begun(engine, **fields) for fields in asked]
    assert [bits(each.result(300)) for each in together] == [bits(each) for each in alone]
    for drawn in alone[1::2]:
        for completion in drawn.completions:
            assert completion.stopped and (completion.tokens % 2 == [0, 1, 0, 1, 0, 1]).all()
    assert all(len(c.tokens) == 20 and not c.stopped for d in alone[::2] for c in d.completions)
    stuck = {**FIELDS, "limits": TokenLimits(grammar=Alternating(), allowed=(4, 7))}
    with pytest.raises(RequestError, match="after 3 tokens: no 4 here"):
        sampled(engine, **stuck)
