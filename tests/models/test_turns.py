"""Completions of several turns: the rows' independence, and what each token's probability is."""

from functools import cache

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models import sample
from lora_jax.models.sampling.choice import row_keys
from lora_jax.models.sampling.prompts import pad_left
from lora_jax.models.sampling.turns import DrawingRows, turn_key
from lora_jax.training.layout import Layout, make_mesh
from tests.models import tiny
from tests.support import assert_close, lorafied, with_random_factors
from train.live.turns.programs import BLOCK, TurnPrograms, make_sampling

pytestmark = pytest.mark.slow  # tests/train/live/test_turns.py shows most of it, and runs
NEW, ROWS, LENGTH = 9, 3, 40
PROMPTS = [tiny.tokens(7 + i, 1, n)[0].tolist() for i, n in enumerate((6, 2, 5))]
EOS = [5, 29, 35, 44]
ANSWERS = [[[9, 8, 7], [6]], [[11] * 13, [3, 2]], [[1, 2], [4, 5, 6]]]  # of each row, by turns


@cache
def keys():
    """Returns the key of each row."""
    return row_keys(jax.random.key(3), np.arange(ROWS))


class Driver:
    """Draws turns of rows, one of which may wait while the others draw."""

    def __init__(self, made, temperature=0.8):
        self.model, self.params, apply = made
        self.programs = TurnPrograms(self.model, apply, Layout.of(MESH, self.model.config))
        self.programs.chunk = 4
        self.temperature = temperature
        self.reset()

    def reset(self):
        self.rows = self.programs.empty(ROWS, LENGTH)
        self.ids = [list(prompt) for prompt in PROMPTS]
        self.logps, self.begun = [[] for _ in range(ROWS)], [0] * ROWS
        self.prefills = 0

    def begin(self, row, answer=None):
        turn, key = self.begun[row], turn_key(keys()[row], self.begun[row])
        sampling = make_sampling(self.model.config.vocab_size, self.temperature, 1.0, None, key)
        if answer is None:
            logits, cache = self.rows.prefill(self.params, self.ids[row])
        else:
            n = len(self.ids[row]) - 1  # the newest token is not in the cache
            new = [self.ids[row][-1], *answer]
            logits, cache = self.rows.extend(self.params, row, n, new)
            self.ids[row] += answer
        drawn = self.rows.begin(row, logits, cache, sampling)
        self.note(row, drawn.ids, drawn.logps)
        self.begun[row] = turn + 1
        self.left[row] = NEW - 1

    left = [0] * ROWS

    def note(self, row, ids, logps):
        self.ids[row] += np.asarray(ids).tolist()
        self.logps[row].append(np.asarray(logps))

    def decode(self, drawing, until=BLOCK):
        """Draws of some rows until they have stopped."""
        drawing = [row for row in drawing if self.goes_on(row)]
        while drawing:
            active = DrawingRows(
                np.isin(np.arange(ROWS), drawing), np.array(self.left, np.int32), EOS, until
            )
            active = active._replace(ends=np.array(EOS, np.int32), until=np.int32(until))
            block = self.rows.decode(self.params, active)
            n = int(block.steps)
            for row in drawing:
                self.note(row, block.ids[row, :n], block.logps[row, :n])
                self.left[row] -= n
            assert not np.asarray(block.ids)[:, n:].any()
            drawing = [row for row in drawing if self.goes_on(row)]

    def goes_on(self, row):
        return self.left[row] > 0 and self.ids[row][-1] not in EOS


MESH = make_mesh(jax.devices()[:1])


@pytest.fixture(scope="module", params=["llama3", "qwen3.5"])
def driver(request):
    model, plain = tiny.decoder(request.param)
    linear = ["in_proj_qkv", "in_proj_b"] if model.config.linear_layers else []
    targets = ["q_proj", "v_proj", "down_proj", *linear]
    rules = [lj.LoraRule(targets=targets, rank=3, alpha=5)]
    params = with_random_factors(lorafied(plain, rules))
    return Driver((model, params, lj.adapt(model.apply)))


def test_one_turn_is_that_of_sample(driver):
    # Keys of length one enlarge the rounding of linear layers.
    tolerance = 1e-5 if driver.model.config.linear_layers else 1e-6
    driver.reset()
    for row in range(ROWS):
        driver.begin(row)
    driver.decode(range(ROWS))
    want = sample(
        *(driver.model, driver.params, *pad_left(PROMPTS, 6, 0)),
        max_new_tokens=NEW,
        temperature=0.8,
        key=keys(),
        eos_token_id=EOS,
        apply=lj.adapt(driver.model.apply),
    )
    for row, n in enumerate(want.lengths.tolist()):
        assert driver.ids[row][len(PROMPTS[row]) :] == want.tokens[row, :n].tolist()
        assert_close(np.concatenate(driver.logps[row]), np.asarray(want.logps[row, :n]), tolerance)


def conversations(driver, order, until):
    """Three turns of each row; those in `order` go on one after the other, the first at once."""
    driver.reset()
    for row in range(ROWS):
        driver.begin(row)
    if order is None:  # as a barrier would have it
        driver.decode(range(ROWS), until)
        for turn in range(2):
            for row in range(ROWS):
                driver.begin(row, ANSWERS[row][turn])
            driver.decode(range(ROWS), until)
    else:
        for row in order:
            driver.decode([row], until)
            for turn in range(2):
                driver.begin(row, ANSWERS[row][turn])
                driver.decode([row], until)
    return [list(ids) for ids in driver.ids], [np.concatenate(x) for x in driver.logps]


def test_rows_draw_the_same_bits_whoever_waits(driver):
    together = conversations(driver, None, BLOCK)
    for order, until in (([0, 1, 2], BLOCK), ([2, 0, 1], 2), (None, 3)):
        ids, logps = conversations(driver, order, until)
        assert ids == together[0]
        for own, other in zip(logps, together[1], strict=True):
            np.testing.assert_array_equal(own, other)
    assert len({tuple(ids) for ids in together[0]}) == ROWS


def test_log_probabilities_are_those_of_whole_rows_over_turns(driver):
    ids, logps = conversations(driver, [1, 2, 0], BLOCK)
    for row in range(ROWS):
        own, at = [], len(PROMPTS[row])
        spans = iter(ANSWERS[row])
        while at < len(ids[row]):
            own.append(at)
            at += 1
            if at < len(ids[row]) and _ends(ids[row], own, at):
                at += len(next(spans))
        logits = tiny.run(driver.model, lj.merge(driver.params), np.array([ids[row]]))[0]
        scores = np.asarray(logits, np.float64) / 0.8
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        want = [scores[at - 1, ids[row][at]] for at in own]
        assert len(want) == len(logps[row])
        assert_close(logps[row], np.array(want), 1e-5)


def _ends(ids, own, at):
    """Returns True where a turn is over before token `at`."""
    run = 0
    for before in range(len(own)):
        same = before and own[before] == own[before - 1] + 1
        run = run + 1 if same else 1
    return ids[at - 1] in EOS or run == NEW
