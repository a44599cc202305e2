"""Rows that call tools and wait: what they draw, whoever answers when, and how they end."""

import threading
from concurrent.futures import Future
from functools import cache

import jax
import numpy as np
import pytest

from lora_jax.models import Decoder, DecoderConfig, sample
from lora_jax.models.sampling.choice import row_keys
from lora_jax.models.sampling.prompts import pad_left
from lora_jax.models.sampling.text import StopTexts
from lora_jax.training.errors import Dropped
from lora_jax.training.layout import Layout, make_mesh
from lora_jax.training.run.stop import Stop
from tests.support import assert_close
from tests.train.tiny import CONFIG, decoder, tokenizer
from train.live.turns.episodes import Listener
from train.live.turns.programs import TurnPrograms, TurnRows
from train.live.turns.rows import TurnLimits, TurnRequest, tool_metrics
from train.live.turns.sampler import Drawing, TurnSampler
from train.tools.contract import EpisodeTurn, ToolAnswer, ToolCall

NEW, TOTAL = 36, 52
ENDS = [*range(100, 160), 258]
PROMPTS = [[7, 8, 9], [3], [7, 8, 9], [1, 2, 3, 4, 5, 6], [50] * 5]
NO_STOP = StopTexts(tokenizer(), ())


@cache
def drawing_key():
    return jax.random.key(5)


class Joints:
    """Answers are their bytes between two marks."""

    def cut(self, answer):
        return answer

    def render(self, answers, options, last):
        return [256, *(i for answer in answers for i in answer.content.encode()), 256]


class Talk:
    """An episode that counts its calls."""

    opening = lost = problem = None

    def __init__(self, host, number):
        self.host, self.number, self.n = host, number, 0

    def call(self, calls):
        self.n += 1
        names = [call.name for call in calls]
        answers = tuple(ToolAnswer(x, f"{self.number}.{self.n}", x == "bad") for x in names)
        turn = EpisodeTurn(answers)
        if (self.number, self.n) in self.host.losing:
            turn = EpisodeTurn((), f"row {self.number}: the tool look hung")
        return self.host.later(turn, self.number, self.n)

    def reward(self):
        return self.host.later(float(self.n), self.number, 9)

    def close(self):
        self.host.open_now.remove(self.number)


class Host:
    """Answers at once, or later in threads, by `delay` of a row and its turn."""

    tools, rewards = [], True

    def __init__(self, delay=lambda number, turn: 0, losing=(), openings=None):
        self.delay, self.losing, self.openings = delay, losing, openings or {}
        self.open_now, self.most = [], 0

    def later(self, value, number, turn):
        future, seconds = Future(), self.delay(number, turn)
        if seconds:
            threading.Timer(seconds, future.set_result, [value]).start()
        else:
            future.set_result(value)
        return future

    def open(self, rows, seeds=None, names=None):
        opened = []
        for row in rows:
            talk = Talk(self, row["number"])
            talk.opening = self.openings.get(row["number"])
            self.open_now.append(row["number"])
            self.most = max(self.most, len(self.open_now))
            opened.append(self.later(talk, row["number"], 0))
        return opened


def read(ids, before):
    """A turn calls a tool for each token that three divides, two at most."""
    n = sum(i % 3 == 0 for i in ids)
    calls = [ToolCall("look", {}), ToolCall("bad", {})][: min(n, 2)]
    return "".join(map(chr, ids)), calls


@pytest.fixture(scope="module")
def programs():
    model, params = decoder()
    params = jax.tree.map(lambda x: x * 0.5, params)
    made = TurnPrograms(model, model.apply, Layout.of(make_mesh(jax.devices()[:1]), model.config))
    made.chunk = 8
    return made, params


def draw(programs, host, *, places=3, read=read, key=None, stops=NO_STOP, stop=None, **limits):
    made, params = programs
    bounds = TurnLimits(**({"new_tokens": NEW, "total": TOTAL} | limits))
    drawing = Drawing(1.0, 1.0, None, ENDS)
    sampler = TurnSampler(made, drawing, bounds, stops, read, 259)
    asked = [
        TurnRequest(i, {"number": i, "prompt": "a"}, f"row {i}", p) for i, p in enumerate(PROMPTS)
    ]
    opened = lambda asked, row: [*asked.prompt, *row["prompt"].encode()]  # noqa: E731
    listener = Listener(host, Joints(), opened, stop or Stop())
    key = drawing_key() if key is None else key
    return sampler.draw(params, asked, key, listener, n_rows=places, max_prompt_tokens=6)


def facts(completions):
    return [
        (x.prompt, x.ids, x.is_own, x.messages, x.calls, x.failures, x.ended, x.earned, x.lost)
        for x in completions
    ]


@pytest.fixture(scope="module")
def drawn(programs):
    return draw(programs, Host())


def test_completions_have_turns_and_answers(drawn):
    assert max(len(x.turn_starts) for x in drawn) > 1 and sum(x.failures for x in drawn)
    for number, made in enumerate(drawn):
        roles = [turn["role"] for turn in made.messages]
        assert roles.count("assistant") == len(made.turn_starts)
        assert len(made.ids) == len(made.logps) == len(made.is_own) <= NEW
        tools = [turn for turn in made.messages if turn["role"] == "tool"]
        assert made.calls == len(tools) or not made.ended or made.calls > len(tools)
        assert all(turn["content"].startswith(f"{number}.") for turn in tools)
        text = bytes(i for i, own in zip(made.ids, made.is_own, strict=True) if not own and i < 256)
        assert text.decode() == "".join(turn["content"] for turn in tools)
        assert made.ended == (made.is_own[-1] and made.ids[-1] in ENDS)
    n = len(drawn)
    calls = sum(x.calls for x in drawn)
    assert tool_metrics(drawn) == {
        "tools/call_frequency": calls / n,
        "tools/failure_frequency": sum(x.failures for x in drawn) / calls,
        "tools/turns": sum(len(x.turn_starts) for x in drawn) / n,
        "tools/lost": 0.0,
    }


DELAYS = {
    "in turn": lambda number, turn: 0.002 * (number + turn),
    "backwards": lambda number, turn: 0.01 * (5 - number),
    "one waits for all": lambda number, turn: 0.5 * (number == 0 and turn == 1),
}


@pytest.mark.parametrize("way", DELAYS)
def test_rows_draw_the_same_bits_whoever_waits(programs, drawn, way):
    host = Host(DELAYS[way])
    again = draw(programs, host)
    assert facts(again) == facts(drawn) and not host.open_now and host.most <= 6
    for one, other in zip(drawn, again, strict=True):
        assert one.logps == other.logps
    other = draw(programs, Host(), key=jax.random.key(6))
    assert facts(other) != facts(drawn), "the control"


def test_a_row_that_waits_holds_no_other_up(programs):
    """All others are over, rows that come later in other places included, while one waits."""
    gate, over = threading.Event(), []

    class Gated(Host):
        def later(self, value, number, turn):
            future = Future()
            future.set_result(value)
            if number == 0 and turn == 1:
                future = Future()
                threading.Thread(
                    target=lambda: (gate.wait(20), future.set_result(value)), daemon=True
                ).start()
            if turn == 9:
                over.append(number)
                if set(over) >= {1, 2, 4}:  # row 3 has the place of row 0
                    gate.set()
            return future

    draw(programs, Gated(), read=lambda ids, before: ("", [ToolCall("look", {})]))
    assert gate.is_set() and over[-2:] == [0, 3]


ROPE = {"rope_type": "longrope", "rope_theta": 300.0, "original_max_position_embeddings": TOTAL}
ROPE |= {"factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(("fields", "more"), [({}, 0), ({"rope_parameters": ROPE}, 8)])
def test_a_token_sees_no_slots_that_stay_empty(fields, more):
    """Room for the last chunk of a row is in that chunk's own cache; keys may depend on it."""
    model = Decoder(DecoderConfig.from_hf(CONFIG | fields))
    made = TurnPrograms(model, model.apply, Layout.of(make_mesh(jax.devices()[:1]), model.config))
    made.chunk = 8
    rows = made.empty(3, TOTAL)
    assert rows._arrays.cache.positions.shape == (3, TOTAL + more)
    copied = rows._functions.copy_cache(rows._arrays, np.int32(2), np.int32(5))
    assert copied.key.shape == rows._functions.empty_cache().key.shape
    assert copied.max_len == TOTAL + 8 and (np.asarray(copied.positions[0, 5:]) == -1).all()


@pytest.mark.slow
def test_one_turn_is_that_of_sample(programs):
    made, params = programs
    mine = draw(programs, Host(), read=lambda ids, before: ("", []))
    ids, mask = pad_left(PROMPTS, 6, 0)
    keys = row_keys(drawing_key(), np.arange(len(PROMPTS)))
    want = sample(
        *(made._model, params, ids, mask), max_new_tokens=NEW, key=keys, eos_token_id=ENDS
    )
    for number, n in enumerate(want.lengths.tolist()):
        assert mine[number].ids == want.tokens[number, :n].tolist()
        assert_close(np.array(mine[number].logps), np.asarray(want.logps[number, :n]), 1e-6)


def test_a_lost_row_ends_alone(programs, drawn):
    calling = next(i for i, x in enumerate(drawn) if x.calls)
    lost = draw(programs, Host(losing={(calling, 1)}))
    assert lost[calling].lost == f"row {calling}: the tool look hung"
    assert lost[calling].earned.value is None and lost[calling].is_own.count(False) == 0
    rest = [i for i in range(len(PROMPTS)) if i != calling]
    assert [facts(lost)[i] for i in rest] == [facts(drawn)[i] for i in rest]
    assert tool_metrics(lost)["tools/lost"] == 1 / len(PROMPTS)


def test_openings_belong_to_the_prompt(programs, drawn):
    opened = draw(programs, Host(openings={1: "zz", 3: "y" * 60}))
    assert [turns.opening for turns in opened] == ["", "zz", "", "y" * 60, ""]
    assert opened[1].prompt == [3, *b"azz"] and opened[1].ids != drawn[1].ids
    assert "the prompt has 67 tokens and leaves no room" in opened[3].lost
    assert opened[3].messages == [{"role": "assistant", "content": ""}], "rewards read the last"
    assert [facts(opened)[i] for i in (0, 2, 4)] == [facts(drawn)[i] for i in (0, 2, 4)]


def test_rows_have_their_caches_once(programs, monkeypatch):
    """A block of tokens writes into them: two of them may be more than a device has room for."""
    decode, were_taken = TurnRows.decode, []

    def note(rows, *args):
        cache = max(jax.tree.leaves(rows._arrays), key=lambda array: array.nbytes)
        block = decode(rows, *args)
        were_taken.append(cache.is_deleted())
        return block

    monkeypatch.setattr(TurnRows, "decode", note)
    draw(programs, Host())
    assert were_taken and all(were_taken)


def test_limits(programs):
    always = lambda ids, before: ("", [ToolCall("look", {})])  # noqa: E731
    turns = draw(programs, Host(), read=always, turns=2)
    assert max(len(x.turn_starts) for x in turns) == 2 and not any(
        len(x.turn_starts) > 2 for x in turns
    )
    free = draw(programs, Host(), read=always)
    for made in free:  # what would not fit is left out, and what fits exactly is there
        left = NEW - len(made.ids)
        assert (left < 5 and made.ended) or (left == 0 and not made.ended)


def test_a_text_ends_a_completion(programs, drawn):
    pieces = {chr(i) for x in drawn for i in x.turn if 48 < i < 100}
    stop = tokenizer().decode([ord(sorted(pieces)[0])])
    stops = StopTexts(tokenizer(), (stop,))
    made = draw(programs, Host(), stops=stops, read=lambda ids, before: ("", []))
    cut = [x for x in made if stop in tokenizer().decode(x.ids)]
    assert cut and all(x.ended and tokenizer().decode(x.ids).endswith(stop) for x in cut)
    assert all(stop not in x.text for x in cut)


def test_a_signal_drops_the_draw_while_a_row_waits(programs):
    stop, host = Stop(), Host(lambda number, turn: 3600 if turn == 1 else 0)
    stop.signal = 15
    with pytest.raises(Dropped):
        draw(programs, host, stop=stop)
    assert not host.open_now
