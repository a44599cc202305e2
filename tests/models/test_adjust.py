"""Adjusted logits against NumPy, by the formulas that vLLM documents."""

import jax
import numpy as np
import pytest

from lora_jax.models.sampling.adjust import (
    NO_TOKEN,
    adjust_logits,
    mask_words,
    neutral_adjustments,
    pack_mask,
    remove_tokens,
)

ROWS, VOCAB, LENGTH = 7, 71, 12
ADJUST = jax.jit(adjust_logits)


def made(seed):
    """Logits, temperatures, and adjustments of which each row has its own, and row 0 none."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((ROWS, VOCAB)) * 3).astype(np.float32)
    temperature = np.array([0.7, 0.0, 1.3, 0.5, 2.0, 1.0, 0.9], np.float32)
    made = neutral_adjustments(ROWS, VOCAB, length=LENGTH, biases=4)
    for row in range(1, ROWS):
        n = int(rng.integers(2, LENGTH + 1))
        made.tokens[row, :n] = rng.integers(0, 9, n)  # few, so that some come again
        made.n_prompt[row] = rng.integers(1, n)
        made.repetition[row] = rng.choice([0.6, 1.0, 1.7])
        made.frequency[row] = rng.choice([-0.5, 0.0, 0.9])
        made.presence[row] = rng.choice([-0.3, 0.0, 1.1])
        made.min_p[row] = rng.choice([0.0, 0.2, 0.9])
        made.bias_ids[row, :3] = rng.choice(VOCAB, 3, replace=False)
        made.biases[row, :3] = rng.normal(size=3) * 5
        made.allowed[row] = pack_mask(rng.choice(VOCAB, 40, replace=False), VOCAB)
    return logits, temperature, made


def adjusted(logits, temperature, made):
    """The reference, a row at a time in double precision."""
    rows = []
    for row in range(ROWS):
        x = logits[row].astype(np.float64)
        bits = [made.allowed[row][i // 32] >> np.uint32(i % 32) & 1 for i in range(VOCAB)]
        x[np.array(bits) == 0] = -np.inf
        for token, bias in zip(made.bias_ids[row], made.biases[row], strict=True):
            if token != NO_TOKEN:
                x[token] += bias
        tokens = [t for t in made.tokens[row] if t != NO_TOKEN]
        drawn = tokens[made.n_prompt[row] :]
        for token in {*tokens}:
            r = made.repetition[row]
            x[token] = x[token] / r if x[token] > 0 else x[token] * r
        for token in {*drawn}:
            x[token] -= made.frequency[row] * drawn.count(token) + made.presence[row]
        t = temperature[row] or 1.0
        p = np.exp((x - x.max()) / t)
        x[p / p.sum() < made.min_p[row] * (p / p.sum()).max()] = -np.inf
        rows.append(x)
    return np.stack(rows)


@pytest.mark.parametrize("seed", range(6))
def test_against_numpy(seed):
    logits, temperature, adjustments = made(seed)
    result = np.asarray(ADJUST(logits, adjustments, temperature))
    expected = adjusted(logits, temperature, adjustments)
    assert (np.isinf(result) == np.isinf(expected)).all()
    there = ~np.isinf(expected)
    assert np.abs(result[there] - expected[there]).max() < 1e-6 * np.abs(expected[there]).max()
    assert (result[0] == logits[0]).all(), "a row without any keeps its bits"
    assert (result[1:] != logits[1:]).any(axis=1).all()
    alone = [ADJUST(logits[i : i + 1], rows(adjustments, i), temperature[i : i + 1]) for i in (3,)]
    assert (np.asarray(alone[0][0]) == result[3]).all(), "other rows change no bit"


def rows(adjustments, i):
    return adjustments._replace(**{k: x[i : i + 1] for k, x in adjustments._asdict().items()})


@pytest.mark.parametrize("vocab", [32, 71, 97])
def test_masks(vocab):
    ids = [0, 5, 31, vocab - 1]
    mask = pack_mask(ids, vocab)
    assert mask.shape == (mask_words(vocab),) and mask.dtype == np.uint32
    listed = [i for i in range(vocab) if mask[i // 32] >> np.uint32(i % 32) & 1]
    assert listed == sorted({*ids})
    remove_tokens(mask, [5, 5, 7])
    assert not mask[0] >> np.uint32(5) & 1 and mask[0] & 1
