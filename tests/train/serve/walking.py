"""Draws at random from the masks of grammars, for tests of structured answers without a model."""

import random

import numpy as np

from lora_jax.models.sampling.adjust import mask_words
from tests.train.serve.scripted import EOS, FACTS, ids

CLOSING = frozenset(ids('"}]'))


def walk(sample, index):
    """Draws from the masks of a sample's grammar; says "free" without one."""
    if sample.limits.grammar is None:
        return ids("free")
    rng, drawn = random.Random(index), []
    row = sample.limits.grammar.begin()
    while not row.is_over and len(drawn) < 300:
        masks = np.full((1, mask_words(FACTS.vocab_size)), 0xFFFFFFFF, np.uint32)
        sample.limits.grammar.fill({0: row}, masks)
        bits = np.unpackbits(masks.view(np.uint8), bitorder="little")[: FACTS.vocab_size]
        allowed = np.flatnonzero(bits).tolist()
        ends = [token for token in allowed if token in CLOSING]
        drawn.append(rng.choice(ends if ends and rng.random() < 0.6 else allowed))
        if drawn[-1] == EOS:
            return drawn
        row.accept(drawn[-1])
    return drawn + [EOS] * row.is_over
