"""Prompts take over what others ran, where that changes no bit."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.bank.writing import add_slots
from lora_jax.models.layers.cache import init_cache
from lora_jax.models.sampling.blocks import take_row_block
from lora_jax.models.sampling.slots import empty_rows
from lora_jax.training.layout import layout_of_one_device
from tests.train.tiny import decoder
from train.serve.engine.prefixes import PrefixScope, PrefixStore
from train.serve.engine.programs import SamplingPrograms
from train.serve.engine.prompts import PromptRunner
from train.serve.engine.rows import RunningRows
from train.serve.engine.sizes import Sizes

SIZES = Sizes(max_length=256, tokens=256, sequences=2, chunk=16)  # caches of 128 and of 256
FAST = dataclasses.replace(SIZES, fast_prompts=True)
MODEL = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=2)
BLOCK = SimpleNamespace(size=10, recurrent=None)


class Unread:
    """Gives caches of the right length, and computes nothing."""

    chunk = SIZES.chunk
    round_up = SamplingPrograms.round_up

    has_memory = False

    def __init__(self, depends_on_cache_length=False):
        self.depends_on_cache_length, self.lengths = depends_on_cache_length, []

    def prompt_cache(self, length):
        return init_cache(MODEL, 1, self.round_up(length))

    grow = lambda self, cache, length: self.prompt_cache(length)  # noqa: E731
    copy_chunk = lambda self, cache, first: BLOCK  # noqa: E731
    put_block = lambda self, cache, first, block: cache  # noqa: E731

    def extend(self, tree, slot, ids, n, cache):
        self.lengths.append(cache.positions.shape[1])
        return None, cache


class Weights:
    """Stands for an adapter's arrays."""


def job(ids, owner="", adapter=None, active=0):
    request = SimpleNamespace(prompt=ids, client=SimpleNamespace(owner=owner))
    return SimpleNamespace(
        request=request, adapter=adapter, slot=0, active_start=active, path=(owner, "", "a", None)
    )


def ran(runner, job):
    """Runs a prompt to its end; returns it."""
    prompt = runner.begin(job)
    while not prompt.is_done:
        runner.run([prompt], None)
    return prompt


@pytest.mark.parametrize(("n", "cached"), [(250, 144), (140, 128), (90, 80), (16, 0)])
def test_a_prefix_is_taken_over_into_a_cache_of_any_length(n, cached):
    runner, ids = PromptRunner(Unread(), SIZES), np.arange(250)
    first, other = runner.begin(job(ids[:150])), runner.begin(job(ids[:n]))
    runner.run([first], None)
    assert runner.waits(other, [first]) == (cached > 16)
    while not first.is_done:
        runner.run([first], None)
    assert ran(runner, job(ids[:n])).n_cached == cached


def test_a_chunk_runs_in_a_cache_whose_length_depends_on_its_place_alone():
    """Keys that depend on the prompt's length get the whole prompt's; no prefix is reused then."""
    for depends_on_cache_length, found in ((False, 112), (True, 0)):
        programs = Unread(depends_on_cache_length)
        runner, ids = PromptRunner(programs, SIZES), np.arange(250)
        ran(runner, job(ids[:113]))
        assert programs.lengths == [128] * 8
        assert ran(runner, job(ids)).n_cached == found
        n = (250 - found + 15) // 16
        short = 0 if depends_on_cache_length else 1
        assert programs.lengths[8:] == [128] * short + [256] * (n - short)


def test_a_kept_prefix_is_found_by_its_owner_for_its_weights():
    weights, runner, ids = Weights(), PromptRunner(Unread(), SIZES), np.arange(50)
    ran(runner, job(ids, "anna", weights))
    assert ran(runner, job(ids, "anna", weights)).n_cached == 48
    for other in (("ben", weights), ("anna", Weights()), ("anna", None)):
        assert ran(runner, job(ids, *other)).n_cached == 0
    assert ran(PromptRunner(Unread(), SIZES), job(ids, "anna", weights)).n_cached == 0


def test_no_room_is_for_nothing():
    sizes = Sizes(max_length=256, tokens=256, sequences=2, chunk=16, prefixes=0)
    runner, ids = PromptRunner(Unread(), sizes), np.arange(50)
    first = runner.begin(job(ids))
    runner.run([first], None)
    assert not runner.waits(runner.begin(job(ids)), [first]), "it would wait for nothing"
    ran(runner, job(ids))
    assert ran(runner, job(ids)).n_cached == runner.store.size == 0


def test_what_is_about_to_run_is_waited_for():
    """Not what ran and was forgotten, nor an adapter of this name that has no slot."""
    runner, ids = PromptRunner(Unread(), SIZES), np.arange(150)
    first, other = runner.begin(job(ids)), runner.begin(job(ids[:50]))
    assert not runner.waits(other, [first]) and runner.waits(other, [first], due=[first])
    for n in (16, 32, 48):
        runner.run([first], None)
        runner.store.clear()
        assert runner.waits(other, [first]) == (n < 48)
    new, old = Weights(), Weights()  # activated, so that the base's tokens are those of both
    first = runner.begin(job(ids, adapter=new, active=100))
    runner.run([first], None)
    assert runner.waits(runner.begin(job(ids, adapter=new, active=90)), [first])
    assert not runner.waits(runner.begin(job(ids, adapter=old, active=90)), [first])


def test_prompts_beside_one_that_fails_begin_anew():
    """Their caches were given away."""
    programs = Unread()
    programs.extend_all = MagicMock(side_effect=MemoryError)
    runner = PromptRunner(programs, FAST)
    both = [runner.begin(job(np.arange(3))) for _ in range(2)]
    with pytest.raises(MemoryError):
        runner.run(both, None)
    assert programs.extend_all.call_count == 1
    assert both[1].cache is None and both[1].n_run == 0
    runner.run(both[1:], None)
    assert both[1].is_done


@pytest.mark.parametrize("depends_on_cache_length", [False, True])
def test_drawn_tokens_are_kept_where_they_do_not_depend_on_others(depends_on_cache_length):
    programs = Unread(depends_on_cache_length)
    runner, rows = PromptRunner(programs, FAST), SimpleNamespace(block=programs.copy_chunk)
    sample = job(np.arange(20))
    ran(runner, sample)
    before = runner.store.size
    runner.store_completion(SimpleNamespace(job=sample, ids=[*range(14)]), rows)
    assert (runner.store.size == before) == depends_on_cache_length


def test_rows_shorter_than_a_chunk_have_no_block():
    """As with chunks of 256 tokens, of accelerators, in caches from 128 on."""
    config = SimpleNamespace(**vars(MODEL), vocab_size=9)
    model = SimpleNamespace(config=config, dtype=np.float32)
    sizes = dataclasses.replace(FAST, sequences=1, chunk=256)
    programs, lengths = MagicMock(round_up=lambda n: -(-n // 256) * 256), []

    def block(rows, row, first):
        taken = jax.eval_shape(functools.partial(take_row_block, n=256), rows, *[np.int32(0)] * 2)
        lengths.append(taken.key.shape[3])

    programs.empty_rows = lambda *shape: jax.eval_shape(lambda: empty_rows(model, *shape))
    programs.insert = lambda rows, row, state: rows
    programs.run = lambda tree, rows: (np.zeros((1, 9)), rows)
    programs.draw.return_value = SimpleNamespace(ids=np.zeros(1)), None
    programs.row_block = block
    places = RunningRows(programs, sizes, 9)
    cache = SimpleNamespace(positions=np.zeros((1, 256)))
    assert len([*places.warm_up(None, np.zeros((1, 9)), [cache])]) == places.steps
    assert lengths == [256]
    with pytest.raises(TypeError):
        block(programs.empty_rows(1, 128), 0, 0)


class Texts:
    """A store of blocks of one token and ten bytes each."""

    def __init__(self, blocks, block=lambda: BLOCK):
        self.block = block
        self.store = PrefixStore(1, 10 * blocks, needs_memory=block is Remembered)

    def keep(self, text, owner=""):
        for end in range(1, len(text) + 1):
            self.store.add(PrefixScope(owner, None), self._ids(text[:end]), self.block)
            assert self.store.size <= self.store._max_bytes

    def find(self, text, owner=""):
        return len(self.store.find(PrefixScope(owner, None), self._ids(text)))

    def _ids(self, text):
        return np.array([*map(ord, text)], np.int32)


def test_what_was_not_used_for_long_gives_way_from_its_end():
    texts = Texts(8)
    texts.keep("abcd")
    texts.keep("abxy")  # what both begin with is kept once
    assert texts.store.size == 60 and (texts.find("abcde"), texts.find("abxyz")) == (4, 4)
    texts.find("abcd")
    texts.keep("zzz")
    assert texts.find("abxy") == 3, "its end goes first"
    assert (texts.find("abcd"), texts.find("zzzz")) == (4, 3)
    texts.keep("qqqqqqqq")
    assert texts.find("ab") == texts.find("zzz") == 0
    texts.keep("r" * 20)
    assert texts.find("r" * 20) <= 8, "what has no room is not there"


def test_many_texts_of_an_owner_drive_out_none_of_others_with_fewer():
    texts = Texts(8)
    texts.keep("abc", "anna")
    for letter in "uvwxyz":
        texts.keep(letter * 3, "ben")
    assert texts.find("abc", "anna") == 3 and texts.find("abc", "ben") == 0
    assert texts.find("zzz", "ben") == 3 and texts.find("uuu", "ben") == 0
    texts.keep("defghi", "anna")
    assert texts.find("zzz", "ben") == 3 and texts.find("defghi", "anna") < 6


class Remembered(NamedTuple):
    """A block of ten bytes, and thirty of a memory."""

    recurrent: str | None = "a memory"

    @property
    def size(self):
        return 10 if self.recurrent is None else 40


def test_texts_go_on_from_memories_alone():
    """Memories inside a text that does not branch there are evicted first; its tokens stay."""
    texts = Texts(24, block=Remembered)
    texts.keep("abcd")
    texts.keep("abxy")
    assert texts.store.size == 240
    texts.keep("p")
    assert texts.store.size == 5 * 40 + 2 * 10, "without those of c and x"
    assert (texts.find("abcd"), texts.find("abxy"), texts.find("ab")) == (4, 4, 2)
    assert texts.find("abc") == texts.find("abx") == 2
    texts.keep("qr")
    assert texts.find("abcd") == texts.find("abxy") == 4 and texts.find("a") == 0
    texts.store._max_bytes = 1000
    texts.keep("abx")
    assert (texts.find("a"), texts.find("abx")) == (1, 3), "they were computed again"
    texts.store._max_bytes = 240
    texts.keep("s" * 9)
    assert texts.find("s" * 9) == 9 and 200 < texts.store.size <= 240


def test_a_block_that_is_kept_is_not_computed_again():
    texts, made = Texts(4), []
    for _ in range(2):
        texts.store.add(
            PrefixScope("", None), np.array([1], np.int32), lambda: made.append(1) or BLOCK
        )
    assert made == [1]


def test_programs_take_the_memory_of_the_caches_that_they_change():
    """Else a cache would be in memory twice at each call."""
    model, params = decoder()
    tree = add_slots(params, [lj.LoraRule(targets=["q_proj"], rank=2)], 2)
    programs = SamplingPrograms(model, layout_of_one_device(), 4)
    cache, one = programs.prompt_cache(8), np.ones(1, np.int32)
    ids = np.zeros((1, 4), np.int32)
    calls = {
        "extend": (tree, one[0], ids, one[0], cache),
        "extend_after": (tree, one[0], ids, one[0], cache, one[0]),
        "extend_all": (tree, one, ids[None], one, (cache,)),
    }
    for name, args in calls.items():
        infos, _ = getattr(programs, name).trace(*args).args_info
        taken = [{leaf.donated for leaf in jax.tree.leaves(argument)} for argument in infos]
        assert taken == [{index == 4} for index in range(len(args))], name
