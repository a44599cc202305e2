"""One sampler: generation, rollouts and server draw by the same functions."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.models.sampling.choice import Sampling, choose_tokens, row_keys, token_keys
from lora_jax.models.sampling.slots import draw_tokens

ROOT = pathlib.Path(lora_jax.__file__).parents[1]
# What draws tokens, and the one file that may hold it.
SOURCES = {
    "random.categorical": "choice.py",
    "jnp.cumsum(probs": "choice.py",
    "vmap(jax.random.fold_in, (None, 0))": "choice.py",
    ".isin(tokens, decoding.eos)": "loop.py",
    "\\ufffd": "text.py",
}
OPTIONS = [(0.0, 1.0, 61), (1.3, 1.0, 61), (0.7, 0.8, 61), (1.6, 1.0, 5), (1.1, 0.6, 20)]


def test_each_part_of_the_sampler_stands_once() -> None:
    texts = {path: path.read_text() for part in ("lora_jax", "train") for path in files(part)}
    for words, name in SOURCES.items():
        holders = [str(path.relative_to(ROOT)) for path, text in texts.items() if words in text]
        assert holders == [f"lora_jax/models/sampling/{name}"], words


def files(part: str) -> list[pathlib.Path]:
    return sorted((ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("number", range(3))
def test_a_row_of_a_server_draws_what_generation_draws(number: int) -> None:
    """By each row's own options, key and number of tokens, or by those of all rows."""
    rng = np.random.default_rng(number)
    logits = (rng.standard_normal((len(OPTIONS), 61)) * 2).astype(np.float32)
    keys = row_keys(jax.random.key(number), jnp.arange(len(OPTIONS)))
    temperature, top_p, top_k = map(np.array, zip(*OPTIONS, strict=True))
    rows = Sampling(jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k), keys)
    step = jnp.full(len(OPTIONS), number, jnp.int32)
    together = DRAW(logits, rows, step)
    for row, (temperature, top_p, top_k) in enumerate(OPTIONS):
        limits = jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k)
        tokens = CHOOSE(logits, Sampling(*limits, keys), jnp.int32(number))
        assert tokens[row] == together.ids[row]
        alone = CHOOSE(logits[row : row + 1], Sampling(*limits, keys[row]), jnp.int32(number))
        assert alone[0] == together.ids[row]


DRAW = jax.jit(lambda logits, rows, step: draw_tokens(logits, rows, step, 4, jnp.bool_(True)))
CHOOSE = jax.jit(lambda logits, all, step: choose_tokens(logits, all, token_keys(all.key, step)))


def test_top_k_draws_from_the_k_likeliest_tokens() -> None:
    """All of them, and no other, where the temperature makes all tokens nearly as likely."""
    rng = np.random.default_rng(7)
    logits = rng.standard_normal(61).astype(np.float32)
    keys = row_keys(jax.random.key(3), jnp.arange(300))
    limits = jnp.float32(50.0), jnp.float32(1.0), jnp.int32(5)
    tokens = CHOOSE(np.tile(logits, (300, 1)), Sampling(*limits, keys), jnp.int32(0))
    assert {*np.asarray(tokens).tolist()} == {*np.argsort(logits)[-5:].tolist()}
