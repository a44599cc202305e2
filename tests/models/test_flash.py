"""Flash attention: its programs, interpreted; the blocks that it visits; and what lacks it."""

import dataclasses
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.cases.attention import AttentionShape
from lora_jax.models.layers.attend import choose_implementation
from lora_jax.models.layers.attention import DENSE, AttentionCall
from lora_jax.models.layers.blockwise import ON_GPU
from lora_jax.models.layers.kernels import flash, flash_call
from lora_jax.models.layers.kernels.flash import Flash
from lora_jax.models.layers.kernels.flash_call import FlashOptions, FlashTokens
from lora_jax.models.layers.masks import Split, prompt_segments
from tests.models import flash_interpreted
from tests.models.test_splash import check_split
from tests.support import assert_close, over
from train.plan.flops.jaxpr import count_flops

FLASH = Flash(queries=32, keys=16)
CALL = AttentionCall(queries=2048, head_dim=64, dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def interpreter() -> Any:
    """A process that proves by name what Triton's interpreter computes."""
    if importlib.util.find_spec("jax_triton") is None:
        pytest.skip("Triton is not installed: it has no interpreter here")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.models.flash_interpreted"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("name", flash_interpreted.PROOFS)
def test_the_kernel_computes_what_dense_attention_does(interpreter: Any, name: str) -> None:
    interpreter.stdin.write(f"{name}\n")
    interpreter.stdin.flush()
    answer = json.loads(interpreter.stdout.readline())
    assert isinstance(answer, float), answer
    assert answer <= (1e-5 if name.startswith("long") else 1e-6)


@pytest.fixture
def compiles(monkeypatch: Any) -> None:
    """Takes the programs to be compiled, whatever is installed; tracing needs no compiler."""
    monkeypatch.setattr(flash, "missing_compiler", lambda: None)


def run_plain(*operands: jax.Array, name: str, options: FlashOptions) -> list[jax.Array]:
    """Computes what a program does, all blocks at once, in plain JAX."""
    start, stop, slots, segments, others, window, q, k, v, *rest = operands
    heads, kv_heads = q.shape[2], k.shape[2]
    k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
    by_key = name == "flash_dkv"
    query_blocks = jnp.arange(q.shape[1]) // (options.keys if by_key else options.queries)
    key_blocks = jnp.arange(k.shape[1]) // options.keys
    first, last = (
        x[:, None, key_blocks] if by_key else x[:, query_blocks, None] for x in (start, stop)
    )
    block = query_blocks[None, :, None] if by_key else key_blocks[None, None]
    same = segments[:, :, None] == others[:, None]
    if options.branched:
        same |= prompt_segments(segments)[:, :, None] == others[:, None]
    distance = slots[:, None] - jnp.arange(k.shape[1])
    seen = same & (distance < window[0]) & (first <= block) & (block < last)
    seen = (seen & (distance >= 0) if options.causal else seen)[
        :, None
    ]  # [batch, 1, queries, keys]
    scores = options.scale * jnp.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores if options.cap is None else options.cap * jnp.tanh(scores / options.cap)
    if name == "flash_fwd":
        scores = jnp.where(seen, scores, -1e30)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - lse[..., None])
        return [jnp.einsum("bhqk,bkhd->bqhd", weights, v), lse / math.log(2)]
    cotangent, lse, mean = rest
    weights = jnp.where(seen, jnp.exp(scores - math.log(2) * lse[..., None]), 0)
    slopes = weights * (jnp.einsum("bqhd,bkhd->bhqk", cotangent, v) - mean[..., None])
    slopes = slopes if options.cap is None else slopes * (1 - (scores / options.cap) ** 2)
    if name == "flash_dq":
        return [options.scale * jnp.einsum("bhqk,bkhd->bqhd", slopes, k)]
    both = (options.scale * slopes, q), (weights, cotangent)
    summed = [jnp.einsum("bhqk,bqhd->bkhd", *pair) for pair in both]
    return [x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]).sum(3) for x in summed]


@pytest.fixture
def plain(compiles: None, monkeypatch: Any) -> None:
    """Runs programs in plain JAX: on all devices, mapped, and wherever Triton is missing."""
    monkeypatch.setattr(flash_call, "_run_triton", run_plain)


SPLITS = [
    ("sequence=2,tensor=2", AttentionShape(128, kv_heads=2, group=1, packed=True), None),
    ("sequence=2", AttentionShape(128, kv_heads=1, group=2, window=50, cap=2.0), True),
    ("sequence=2,data=2", AttentionShape(64, kv_heads=1, group=2, branched=True), None),
    (
        "data=2,sequence=2",
        AttentionShape(64, kv_heads=1, group=1, causal=False, padding="left"),
        None,
    ),
]


@over(("text", "case", "some"), SPLITS, often=[], called=lambda split: split[0])
def test_devices_compute_what_one_does(
    text: str, case: AttentionShape, some: bool | None, plain
) -> None:
    check_split(FLASH, text, case, some)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [False, True])
def test_a_mapped_call_is_one_call(windows: bool, plain: None) -> None:
    """Its rows are rows of one batch, unless slots or windows are mapped."""
    case = AttentionShape(32, batch=2, kv_heads=1, group=2)
    how = FlashOptions(causal=True, scale=0.3, cap=None, queries=16, keys=16)
    segments = [jnp.broadcast_to(x, (2, 32)) for x in case.mask().segments()]
    q, k, v = (jnp.stack([x, 2 * x, 3 * x]) for x in case.arrays())

    def attend(window: jax.Array, *arrays: jax.Array) -> Any:
        tokens = FlashTokens(case.mask().queries.slots, *segments, window)
        bounds = flash._block_bounds(how, tokens, (16, 16), 1)
        return flash_call.run_program("flash_fwd", how, bounds, tokens, arrays)

    window = jnp.array([[40], [9], [3]] if windows else [9], jnp.int32)
    mapped = jax.vmap(attend, (0 if windows else None, 0, 0, 0))
    got = jax.jit(mapped)(window, q, k, v)
    one = jax.jit(attend)
    want = [one(window[i] if windows else window, q[i], k[i], v[i]) for i in range(3)]
    for mine, other in zip(got, map(jnp.stack, zip(*want, strict=True)), strict=True):
        assert_close(mine, other, 1e-6)
    calls = str(jax.make_jaxpr(mapped)(window, q, k, v)).count("flash_kernel")
    assert calls == 1


@pytest.mark.parametrize(
    "name", ["a cache", "heads of 300", "parts of 40 tokens", "windows of completions"]
)
def test_what_the_kernel_lacks_goes_to_blocks(name: str, compiles: None) -> None:
    calls = []

    def told(*args: Any) -> jax.Array:
        calls.append(args)
        return DENSE(*args)

    how = dataclasses.replace(FLASH, fallback=told)
    case = AttentionShape(
        40, slots=50 if name == "a cache" else None, head_dim=300 if "heads" in name else 7
    )
    if name.startswith("windows"):
        case = dataclasses.replace(case, branched=True, window=9)
    mask, arrays = case.mask(), case.arrays()
    if name.startswith("parts"):
        mask = dataclasses.replace(mask, aligned=False, split=Split("sequence", 2, paired=True))
    got, want = (jax.jit(lambda *x, run=run: run(*x, mask))(*arrays) for run in (how, DENSE))
    np.testing.assert_array_equal(got, want)
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("packed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_blocks_are_left_out_only_where_nothing_is_seen(packed: bool) -> None:
    """In packed rows, blocks of other texts, too; the bounds hold all that is seen."""
    case = AttentionShape(96, packed=packed, window=20)
    mask = case.mask()
    segments = [jnp.broadcast_to(x, (2, 96)) for x in mask.segments()]
    tokens = FlashTokens(mask.queries.slots, *segments, jnp.asarray([20]))
    how = FlashOptions(causal=True, scale=1.0, cap=None, queries=8, keys=4)
    seen = np.asarray(mask.visible()).reshape(2, 12, 8, 24, 4).any((2, 4))
    for axis in (1, 0):
        along = seen if axis else seen.swapaxes(1, 2)
        start, stop = map(np.asarray, flash._block_bounds(how, tokens, (8, 4), axis))
        at = np.arange(along.shape[2])
        visited = (at >= start[..., None]) & (at < stop[..., None])
        assert not (along & ~visited).any()
        assert visited.sum() <= 1.4 * along.sum(), "the bounds are tight"
    assert visited.mean() < 0.4


def test_plans_count_what_the_kernel_visits(compiles: None) -> None:
    """The jaxpr of a gradient: two products forward, seven backward, of the blocks visited."""
    case = AttentionShape(640, batch=2, kv_heads=2, group=2, window=200)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(Flash(128, 128)(q, k, v, case.mask()) ** 2)

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*case.arrays())
    pairs = Flash(128, 128).pairs(640, window=200)
    assert pairs == (5 + 4 + 3) * 128**2  # a window of 200 reaches into the second block before
    count = count_flops(traced.jaxpr)
    assert count.exact and count.flops == 9 * 2 * (2 * 4) * 7 * pairs


def _gone(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("no lowering for GPUs")


@pytest.mark.parametrize(
    ("spec", "why"),
    ids=["missing", "of no use"],
    argvalues=[
        (
            None,
            "jax-triton, which compiles the kernel, is not installed. Install ",
        ),
        ("here", f"JAX {jax.__version__} does not compile the kernel (jax_triton: NotImpl"),
    ],
)
def test_blocks_replace_a_kernel_that_nothing_compiles(spec, why, monkeypatch, caplog) -> None:
    """The choice says why, and a line of the log, once."""
    monkeypatch.setattr(flash_call, "find_spec", lambda name: spec)
    monkeypatch.setattr(flash_call, "_run_triton", _gone)
    flash_call.missing_compiler.cache_clear()
    case = AttentionShape(40)
    arrays, mask = case.arrays(), case.mask()
    with caplog.at_level(logging.WARNING, "lora_jax"):
        got, want = (
            jax.jit(lambda *x, run=run: run(*x, mask))(*arrays) for run in (Flash(), ON_GPU)
        )
        chosen = str(choose_implementation("auto", CALL, 2048, "gpu"))
    flash_call.missing_compiler.cache_clear()
    np.testing.assert_array_equal(got, want)
    assert chosen.startswith(f"blockwise (flash: {why}")
    (record,) = caplog.records
    told = "Attention runs as 'blockwise', in plain JAX, in place of the faster 'flash'. "
    assert record.message.startswith(told + why)
