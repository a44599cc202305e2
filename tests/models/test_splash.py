"""Splash attention, interpreted, against dense attention; and its blocks, against its mask."""

import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.cases.attention import AttentionShape, shapes_of_masks, values_and_gradients
from lora_jax.models.layers.attend import attend
from lora_jax.models.layers.attention import DENSE, AttentionInputs
from lora_jax.models.layers.kernels.cudnn import Cudnn
from lora_jax.models.layers.kernels.splash import Splash, _Band
from lora_jax.models.layers.kernels.splash_backward import fits_chip
from lora_jax.models.layers.masks import Mask, Split
from lora_jax.training.layout import Layout
from tests.support import assert_close, draw, over
from train.plan.flops.jaxpr import count_flops
from train.processes.mesh import make_mesh

SPLASH = Splash(block=128, interpret=True)
TWO_KERNELS = dataclasses.replace(SPLASH, fused=False)  # JAX's backward pass


def differentiated(case: AttentionShape, how: Any, some: bool | None = None, **options: Any) -> Any:
    """Values and gradients of what real tokens give; the scale and the window's use are traced."""
    mask = case.mask()
    if some is not None:
        mask = mask.within(case.window, jnp.bool_(some))

    @jax.jit
    def run(arrays: Any, sinks: Any, mask: Mask, scale: jax.Array) -> Any:
        return values_and_gradients(case, how, arrays, sinks, mask=mask, scale=scale, **options)

    results = run(case.arrays(), case.head_sinks(), mask, jnp.float32(case.scale or 0.3))
    assert np.isfinite(results[0]).all()
    return results


MASKS = shapes_of_masks(128)


OFTEN = ["padded, packed, a window, capped"]


@over("name", MASKS, often=OFTEN)
def test_the_kernel_computes_what_dense_attention_does(name: str) -> None:
    case, some = MASKS[name]
    want = differentiated(case, "dense", some)
    assert_close(differentiated(case, SPLASH, some), want, 1e-5)
    assert all(np.abs(x).max() > 1e-2 for x in want)


@over("name", MASKS, often=["a prompt and completions"])
def test_two_kernels_compute_the_same_gradients(name: str) -> None:
    """As they do where the chip's own memory cannot hold the gradients of all keys."""
    case, some = MASKS[name]
    assert_close(differentiated(case, TWO_KERNELS, some), differentiated(case, SPLASH, some), 1e-5)


def test_gradients_in_bf16_are_as_exact_as_those_of_two_kernels() -> None:
    """Sums are fp32 in both, over several blocks of keys."""
    case = AttentionShape(512, batch=2, kv_heads=1, group=2)
    half = tuple(x.astype(jnp.bfloat16) for x in case.arrays())
    cotangent = draw(4, half[0].shape).astype(jnp.bfloat16)

    def gradients(how: Any, arrays: Any) -> Any:
        loss = lambda *x: jnp.sum((how(*x, case.mask()) * cotangent).astype(jnp.float32))  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    with jax.numpy_dtype_promotion("standard"):
        exact = gradients(DENSE, [x.astype(jnp.float32) for x in half])
        errors = [
            [float(jnp.abs(x - y).mean()) for x, y in zip(gradients(how, half), exact, strict=True)]
            for how in (SPLASH, TWO_KERNELS)
        ]
    np.testing.assert_allclose(*errors, rtol=0.02)


BF16, FP32 = jnp.bfloat16, jnp.float32
FITS = [  # keys, head_dim, value_dim, dtype
    ((16384, 128, 128, BF16), True),
    ((16384, 64, 64, BF16), True),
    ((16512, 64, 64, BF16), False),  # heads fill whole lanes
    ((16384, 192, 128, BF16), False),
    ((8192, 256, 256, BF16), True),
    ((8192, 128, 128, FP32), True),
    ((16384, 128, 128, FP32), False),
]


@pytest.mark.parametrize(("sizes", "fits"), FITS)
def test_the_chip_holds_the_gradients_of_a_head(sizes: Any, fits: bool, monkeypatch: Any) -> None:
    assert fits_chip(*sizes) == fits
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="TPU v4")])
    assert not fits_chip(*sizes)


@pytest.mark.slow
def test_sinks_in_fp32_beside_bf16() -> None:
    """As full fine-tuning holds them: the kernel's gradient of sinks has the queries' dtype."""
    case = AttentionShape(128, batch=2, packed=True, kv_heads=2, group=1, sinks=True)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), case.arrays())

    def run(sinks: jax.Array, how: Any) -> jax.Array:
        out = attend(AttentionInputs(*half, case.mask(), None, None, sinks), attention=how)
        return jnp.sum(out.astype(jnp.float32) * draw(4, out.shape))

    got, want = (
        jax.jit(jax.grad(run), static_argnums=1)(case.head_sinks(), how)
        for how in (SPLASH, "dense")
    )
    assert got.dtype == jnp.float32
    assert_close(got, want, 2e-2)


SPLITS = [
    ("sequence=2,tensor=2", AttentionShape(512, kv_heads=2, group=1, packed=True), None),
    ("sequence=2", AttentionShape(512, kv_heads=1, group=2, window=150, cap=2.0), True),
    (
        "data=2,sequence=2",
        AttentionShape(256, kv_heads=1, group=1, causal=False, padding="left"),
        None,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "case", "some"), SPLITS)
def test_devices_compute_what_one_does(text: str, case: AttentionShape, some: bool | None) -> None:
    check_split(SPLASH, text, case, some)


def check_split(how: Any, text: str, case: AttentionShape, some: bool | None) -> None:
    """Compares an implementation on a mesh with dense attention on one device."""
    size = math.prod(int(part.split("=")[1]) for part in text.split(","))
    layout = Layout(make_mesh(text, 4, jax.devices()[:size]), ())
    case = dataclasses.replace(case, head_dim=5)
    want = differentiated(case, "dense", some)
    with jax.set_mesh(layout.mesh):
        got = differentiated(case, how, some, placement=layout)
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize(
    "name", ["a cache", "half precision", "parts of 64 tokens", "completions and a window"]
)
def test_what_the_kernel_lacks_goes_to_blocks(name: str) -> None:
    """With the right mask: here to a function that tells that it was called."""
    calls = []

    def told(*args: Any) -> jax.Array:
        calls.append(args)
        return DENSE(*args)

    how = dataclasses.replace(SPLASH, fallback=told)
    case = AttentionShape(130, slots=140 if name == "a cache" else None)
    if "completions" in name:
        case = dataclasses.replace(case, branched=True, window=40)
    mask, arrays = case.mask(), case.arrays()
    if name == "half precision":
        arrays = tuple(x.astype(jnp.float16) for x in arrays)
    if name.startswith("parts"):
        mask = dataclasses.replace(mask, aligned=False, split=Split("sequence", 2, paired=True))
    got, want = (jax.jit(lambda *x, run=run: run(*x, mask))(*arrays) for run in (how, DENSE))
    np.testing.assert_array_equal(got, want)
    assert len(calls) == 1


@pytest.mark.slow
def test_half_precision() -> None:
    """Nearly as near to fp32 as dense attention is: the scaled queries round once more."""
    case = AttentionShape(128, kv_heads=1, head_dim=24)
    mask, half = case.mask(), tuple(x.astype(jnp.bfloat16) for x in case.arrays())
    exact = DENSE(*(x.astype(jnp.float32) for x in half), mask)
    outs = jax.jit(lambda *x: (SPLASH(*x, mask), DENSE(*x, mask)))(*half)
    assert all(out.dtype == jnp.bfloat16 for out in outs)
    errors = [np.abs(x.astype(jnp.float32) - exact).mean() for x in outs]
    assert 0 < errors[0] <= 1.2 * errors[1]


BANDS = list(
    itertools.product((None, 1, 37, 300), (None, (2, True), (4, False)), (None, False, True))
)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_are_left_out_only_where_nothing_is_seen(causal: bool) -> None:
    for window, parts, some in BANDS:
        check_band(causal, window, parts, some)


def check_band(causal: bool, window: int | None, parts: Any, some: bool | None) -> None:
    """Checks a band block by block, against distances written out."""
    split = Split("sequence", *parts) if parts else None
    band = _Band(192, 192, causal, window, split, some)
    slots = np.arange(192) if split is None else split.slots(192).reshape(-1)
    distance = slots[:, None] - np.arange(192)
    want = distance >= 0 if causal else np.ones_like(distance, bool)
    if window and some is not False:
        want &= distance < window
    visited = 0
    for i, j in np.ndindex(8, 6):
        at = np.s_[24 * i : 24 * i + 24, 32 * j : 32 * j + 32]
        np.testing.assert_array_equal(band[at], want[at])
        visited += want[at].any()
    assert band.visits(24, 32) == (visited, 48)


@pytest.mark.parametrize(("fused", "products"), [(True, 2 + 5), (False, 2 + 7)])
def test_plans_count_what_the_kernel_visits(fused: bool, products: int) -> None:
    """The jaxpr of a gradient: products forward and backward, of the blocks visited."""
    case = AttentionShape(640, batch=2, kv_heads=2, group=2, window=200)
    how = Splash(block=128, fused=fused)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(how(q, k, v, case.mask()) ** 2)

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*case.arrays())
    pairs = how.pairs(640, window=200)
    assert pairs == (5 + 4 + 3) * 128**2  # a window of 200 reaches into the second block before
    count = count_flops(traced.jaxpr)
    of_sums = 0 if fused else 2 * (2 * 4) * 640 * 7  # JAX's, of results times their gradients
    assert count.exact and count.flops == products * 2 * (2 * 4) * 7 * pairs + of_sums


CUDNN = {
    "packed, a window and padding": AttentionShape(24, packed=True, window=3, padding="right"),
    "bidirectional, padded left": AttentionShape(16, causal=False, padding="left"),
}


@over("name", CUDNN, often=["packed, a window and padding"])
def test_the_call_of_cudnn(name: str) -> None:
    """Computed by XLA: cuDNN takes the same arguments, but is not here."""
    case = dataclasses.replace(CUDNN[name], head_dim=8)
    mask, real = case.mask(), case.present[..., None, None]
    half = tuple(x.astype(jnp.bfloat16) for x in case.arrays())
    with jax.numpy_dtype_promotion("standard"):
        got, want = (
            np.where(real, jax.jit(run)(*half, mask, 0.6).astype(jnp.float32), 0)
            for run in (Cudnn(backend="xla"), DENSE)
        )
    assert np.abs(want).max() > 0.5
    assert_close(got, want, 3e-2)
