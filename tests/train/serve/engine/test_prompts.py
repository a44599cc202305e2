"""Prompts take over what others ran, where that changes no bit."""

from types import SimpleNamespace

import numpy as np
import pytest

from lora_jax.models.layers.cache import init_cache
from train.serve.engine.programs import SamplingPrograms
from train.serve.engine.prompts import PrefixCache
from train.serve.engine.sizes import Sizes

SIZES = Sizes(max_length=256, tokens=256, sequences=2, chunk=16)  # caches of 128 and of 256
MODEL = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=2)


class Unread:
    """Gives caches of the right length, and computes nothing."""

    chunk = SIZES.chunk
    whole = SamplingPrograms.whole

    def prompt(self, length):
        return init_cache(MODEL, 1, self.whole(length))

    def cut(self, cache, n):
        return cache

    def extend(self, tree, slot, ids, n, cache):
        return None, cache


@pytest.mark.parametrize(("n", "cached"), [(140, 128), (90, 0)])
def test_a_prefix_is_taken_over_from_a_cache_of_the_same_length(n, cached):
    def job(ids):
        request = SimpleNamespace(prompt=ids, adapter="a")
        return SimpleNamespace(request=request, adapter=None, slot=0, path=("", "", "a", None))

    prefixes, ids = PrefixCache(Unread(), SIZES), np.arange(150)
    first, other = prefixes.begin(job(ids)), prefixes.begin(job(ids[:n]))
    prefixes.run(first, None)
    assert prefixes.waits(other, [first]) == bool(cached)
    while not first.is_done:
        prefixes.run(first, None)
    prefixes.run(other, None)
    assert other.cached == cached
