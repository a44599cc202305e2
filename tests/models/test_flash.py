"""Flash attention, interpreted, against dense attention; and the blocks that it visits."""

import dataclasses
import functools
import logging
import runpy
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from lora_jax.models.layers.attend import choose_implementation
from lora_jax.models.layers.attention import DENSE, AttentionCall, AttentionInputs
from lora_jax.models.layers.blockwise import ON_GPU
from lora_jax.models.layers.kernels import flash, flash_call, flash_programs
from lora_jax.models.layers.kernels.flash import Flash
from lora_jax.models.layers.kernels.flash_call import FlashTokens
from lora_jax.models.layers.kernels.flash_programs import FlashOptions
from lora_jax.models.layers.masks import Split
from tests.models.test_attention import Case
from tests.models.test_splash import MASKS, check_split, differentiated
from tests.support import assert_close, draw, over
from train.plan.flops.jaxpr import count_flops

FLASH = Flash(queries=32, keys=16, interpret=True)
BRANCHED = Case(100, branched=True, packed=True, padding="right", kv_heads=1, group=3, sinks=True)


@over("name", MASKS, often=["padded, packed, a window, capped"])
def test_the_kernel_computes_what_dense_attention_does(name: str) -> None:
    case, some = MASKS[name]
    want = differentiated(case, "dense", some)
    assert_close(differentiated(case, FLASH, some), want, 1e-5)
    assert all(np.abs(x).max() > 1e-2 for x in want)


@pytest.mark.slow
def test_a_prompt_and_its_completions() -> None:
    want = differentiated(BRANCHED, "dense")
    assert_close(differentiated(BRANCHED, FLASH), want, 1e-6)
    apart = differentiated(dataclasses.replace(BRANCHED, branched=False), FLASH)
    assert np.abs(apart[0] - want[0]).max() > 0.1, "the control: completions see each other"


def test_sums_of_weights_and_their_gradient() -> None:
    case = dataclasses.replace(BRANCHED, padding=None)
    mask, arrays, cotangent = case.mask(), case.arrays(), draw(4, (2, 100, 3))

    def written_out(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bshd,btd->bsht", q, k[:, :, 0]) * 7**-0.5
        seen = mask.visible()[:, :, None]
        return jax.nn.logsumexp(jnp.where(seen, scores, -jnp.inf), axis=-1)

    def kernel(*arrays: jax.Array) -> jax.Array:
        return FLASH.compute_with_sums(AttentionInputs(*arrays, mask))[1]

    def gradient(run: Any) -> Any:
        def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.sum((sums := run(*arrays)) * cotangent), sums

        return jax.value_and_grad(total, (0, 1), has_aux=True)

    ((_, got), of_got), ((_, want), of_want) = jax.jit(
        lambda *arrays: [gradient(run)(*arrays) for run in (kernel, written_out)]
    )(*arrays)
    assert_close((got, of_got), (want, of_want), 1e-6)
    assert np.ptp(want) > 1 and np.abs(of_want[1]).max() > 1e-2


SPLITS = [
    ("sequence=2,tensor=2", Case(128, kv_heads=2, group=1, packed=True), None),
    ("sequence=2", Case(128, kv_heads=1, group=2, window=50, cap=2.0), True),
    ("sequence=2,data=2", Case(64, kv_heads=1, group=2, branched=True), None),
    ("data=2,sequence=2", Case(64, kv_heads=1, group=1, causal=False, padding="left"), None),
]


@over(("text", "case", "some"), SPLITS, often=[], called=lambda split: split[0])
def test_devices_compute_what_one_does(text: str, case: Case, some: bool | None) -> None:
    check_split(FLASH, text, case, some)


@pytest.mark.parametrize(
    "name", ["a cache", "heads of 300", "parts of 40 tokens", "windows of completions"]
)
def test_what_the_kernel_lacks_goes_to_blocks(name: str) -> None:
    calls = []

    def told(*args: Any) -> jax.Array:
        calls.append(args)
        return DENSE(*args)

    how = dataclasses.replace(FLASH, otherwise=told)
    case = Case(40, slots=50 if name == "a cache" else None, head_dim=300 if "heads" in name else 7)
    if name.startswith("windows"):
        case = dataclasses.replace(case, branched=True, window=9)
    mask, arrays = case.mask(), case.arrays()
    if name.startswith("parts"):
        mask = dataclasses.replace(mask, aligned=False, split=Split("sequence", 2, paired=True))
    got, want = (jax.jit(lambda *x, run=run: run(*x, mask))(*arrays) for run in (how, DENSE))
    np.testing.assert_array_equal(got, want)
    assert len(calls) == 1


@pytest.mark.parametrize("packed", [pytest.param(True, marks=pytest.mark.slow), False])
def test_blocks_are_left_out_only_where_nothing_is_seen(packed: bool) -> None:
    """In packed rows, blocks of other texts, too; the bounds hold all that is seen."""
    case = Case(96, packed=packed, window=20)
    mask = case.mask()
    segments = [jnp.broadcast_to(x, (2, 96)) for x in mask.segments()]
    tokens = FlashTokens(mask.queries.slots, *segments, jnp.asarray([20]))
    how = FlashOptions(causal=True, scale=1.0, cap=None, queries=8, keys=4, interpret=True)
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


@pytest.fixture
def deprecating(monkeypatch):
    """Calls as JAX 0.11 and newer compile them without `jax_triton`, whatever JAX this is."""
    monkeypatch.setattr(flash_call, "_BEFORE_IT", False)
    monkeypatch.setattr(flash_call, "_run_triton", _gone)
    flash_call._backend.cache_clear()
    yield
    flash_call._backend.cache_clear()


def lowered_for_a_gpu(run: Any, *shapes: Any) -> str:
    """Lowers a function for a GPU that is not here; warnings are errors."""
    device = jax.sharding.AbstractDevice("NVIDIA A100", num_cores=108, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text: str = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    return text


def _gone(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("Pallas has no lowering for GPUs")


CALL = AttentionCall(queries=2048, head_dim=64, dtype=jnp.bfloat16)


def test_lowering_leaves_out_the_backends_own_warning(deprecating) -> None:
    case = Case(128)

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(Flash()(*arrays, case.mask()))

    text = lowered_for_a_gpu(jax.grad(loss, (0, 1, 2)), *case.arrays())
    assert text.count("@__gpu$xla.gpu.triton(") == 3
    assert str(choose_implementation("auto", CALL, 2048, "gpu")) == "flash"
    if jax.__version_info__ >= (0, 11):  # the control: the call without its primitive
        how = FlashOptions(causal=True, scale=1, cap=None, queries=16, keys=16, interpret=False)
        row, array = jnp.zeros((1, 16), jnp.int32), jnp.zeros((1, 16, 1, 16))
        tokens = (row[:, :1], row[:, :1], row[0], row, row, row[0, :1])
        call = functools.partial(flash_call._run_pallas, name="flash_fwd", how=how)
        with pytest.warns(DeprecationWarning, match=flash_call._DEPRECATION):
            lowered_for_a_gpu(call, *tokens, array, array, array)


@pytest.mark.parametrize("gone", ["on import", "on lowering"])
def test_blocks_replace_a_kernel_that_is_gone(gone, deprecating, monkeypatch, caplog) -> None:
    if gone == "on import":
        monkeypatch.delattr("jax.experimental.pallas.triton")
        monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
        imported = runpy.run_path(flash_programs.__file__)
        assert imported["triton"] is None
        monkeypatch.setattr(flash_programs, "triton", None)
    else:
        monkeypatch.setattr(pl, "pallas_call", _gone)
    case = Case(40)
    arrays, mask = case.arrays(), case.mask()
    with caplog.at_level(logging.WARNING, "lora_jax"):
        got, want = (
            jax.jit(lambda *x, run=run: run(*x, mask))(*arrays) for run in (Flash(), ON_GPU)
        )
        chosen = str(choose_implementation("auto", CALL, 2048, "gpu"))
    np.testing.assert_array_equal(got, want)
    assert chosen.startswith(f"blockwise (flash: JAX {jax.__version__} does not compile the kernel")
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "attention 'flash' is replaced by 'blockwise', in plain JAX"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("windows", [False, True])
def test_a_mapped_call_is_one_call(windows: bool) -> None:
    """Its rows are rows of one batch, unless slots or windows are mapped."""
    case = Case(32, batch=2, kv_heads=1, group=2)
    how = FlashOptions(causal=True, scale=0.3, cap=None, queries=16, keys=16, interpret=True)
    segments = [jnp.broadcast_to(x, (2, 32)) for x in case.mask().segments()]
    q, k, v = (jnp.stack([x, 2 * x, 3 * x]) for x in case.arrays())

    def attend(window: jax.Array, *arrays: jax.Array) -> Any:
        tokens = FlashTokens(case.mask().queries.slots, *segments, window)
        bounds = flash._bounds(how, tokens, (16, 16), 1)
        return bind(*bounds, *tokens, *arrays)

    facts = {"name": "flash_fwd", "how": how, "way": flash_call._run_pallas}
    bind = functools.partial(flash_call._KERNEL.bind, **facts)
    window = jnp.array([[40], [9], [3]] if windows else [9], jnp.int32)
    mapped = jax.vmap(attend, (0 if windows else None, 0, 0, 0))
    got = jax.jit(mapped)(window, q, k, v)
    one = jax.jit(attend)
    want = [one(window[i] if windows else window, q[i], k[i], v[i]) for i in range(3)]
    for mine, other in zip(got, map(jnp.stack, zip(*want, strict=True)), strict=True):
        assert_close(mine, other, 1e-6)
    calls = str(jax.make_jaxpr(mapped)(window, q, k, v)).count("flash_kernel")
    assert calls == 1
