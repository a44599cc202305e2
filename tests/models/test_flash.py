"""Flash attention, interpreted, against dense attention; and the blocks that it visits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.layers.attention import DENSE
from lora_jax.models.layers.kernels import flash
from lora_jax.models.layers.kernels.flash import Flash
from lora_jax.models.layers.masks import Split
from tests.models.test_attention import Case
from tests.models.test_splash import MASKS, check_split, differentiated
from tests.support import assert_close, over
from train.plan.flops.jaxpr import count_flops

FLASH = Flash(queries=32, keys=16, interpret=True)


@over("name", MASKS, often=["padded, packed, a window, capped"])
def test_the_kernel_computes_what_dense_attention_does(name: str) -> None:
    case, some = MASKS[name]
    want = differentiated(case, "dense", some)
    assert_close(differentiated(case, FLASH, some), want, 1e-5)
    assert all(np.abs(x).max() > 1e-2 for x in want)


SPLITS = [
    ("sequence=2,tensor=2", Case(128, kv_heads=2, group=1, packed=True), None),
    ("sequence=2", Case(128, kv_heads=1, group=2, window=50, cap=2.0), True),
    ("data=2,sequence=2", Case(64, kv_heads=1, group=1, causal=False, padding="left"), None),
]


@over(("text", "case", "some"), SPLITS, often=["sequence=2"], called=lambda split: split[0])
def test_devices_compute_what_one_does(text: str, case: Case, some: bool | None) -> None:
    check_split(FLASH, text, case, some)


@pytest.mark.parametrize("name", ["a cache", "heads of 300", "parts of 40 tokens"])
def test_what_the_kernel_lacks_goes_to_blocks(name: str) -> None:
    calls = []

    def told(*args: Any) -> jax.Array:
        calls.append(args)
        return DENSE(*args)

    how = dataclasses.replace(FLASH, otherwise=told)
    case = Case(40, slots=50 if name == "a cache" else None, head_dim=300 if "heads" in name else 7)
    mask, arrays = case.mask(), case.arrays()
    if name.startswith("parts"):
        mask = dataclasses.replace(mask, aligned=False, split=Split("sequence", 2, paired=True))
    got, want = (jax.jit(lambda *x, run=run: run(*x, mask))(*arrays) for run in (how, DENSE))
    np.testing.assert_array_equal(got, want)
    assert len(calls) == 1


@pytest.mark.parametrize("packed", [True, False])
def test_blocks_are_left_out_only_where_nothing_is_seen(packed: bool) -> None:
    """In packed rows, blocks of other texts, too; the bounds hold all that is seen."""
    case = Case(96, packed=packed, window=20)
    mask = case.mask()
    segments = [jnp.broadcast_to(x, (2, 96)) for x in mask.segments()]
    tokens = flash._Tokens(mask.queries.slots, *segments, jnp.asarray([20]))
    how = flash.FlashOptions(causal=True, scale=1.0, cap=None, queries=8, keys=4, interpret=True)
    seen = np.asarray(mask.visible()).reshape(2, 12, 8, 24, 4).any((2, 4))
    for axis in (1, 0):
        along = seen if axis else seen.swapaxes(1, 2)
        start, stop = map(np.asarray, flash._bounds(how, tokens, (8, 4), axis))
        at = np.arange(along.shape[2])
        visited = (at >= start[..., None]) & (at < stop[..., None])
        assert not (along & ~visited).any()
        assert visited.sum() <= 1.4 * along.sum(), "the bounds are tight"
    assert visited.mean() < 0.4


def test_plans_count_what_the_kernel_visits() -> None:
    """The jaxpr of a gradient: two products forward, seven backward, of the blocks visited."""
    case = Case(640, batch=2, kv_heads=2, group=2, window=200)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(Flash(128, 128)(q, k, v, case.mask()) ** 2)

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*case.arrays())
    pairs = Flash(128, 128).pairs(640, window=200)
    assert pairs == (5 + 4 + 3) * 128**2  # a window of 200 reaches into the second block before
    count = count_flops(traced.jaxpr)
    assert count.exact and count.flops == 9 * 2 * (2 * 4) * 7 * pairs
