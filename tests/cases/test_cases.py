"""Each spoiled kernel is found, and each right one holds, on one device and on several."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.cases.attention import attention_cases
from lora_jax.cases.case import relative_error
from lora_jax.cases.mixtures import gated, mix_in_parts, mixture_cases
from lora_jax.cases.products import (
    few_rows_cases,
    multiply_coded,
    product_cases,
    ragged_cases,
    run_kernel,
)
from lora_jax.cases.sharded import (
    exchange_cases,
    exchanged_mixture,
    fsdp_case,
    make_layout,
    place_mixture,
)
from lora_jax.models.decoder.experts import apply_blocks, apply_ragged
from lora_jax.models.decoder.moe import make_mixture
from lora_jax.models.layers.attention import DENSE
from lora_jax.models.layers.blockwise import Blockwise

BLOCKS = Blockwise(block=32)


def with_mask(**changes: Any) -> Any:
    """Dense attention with another mask."""

    def attend(q, k, v, mask, *rest):
        changed = {name: change(getattr(mask, name)) for name, change in changes.items()}
        return DENSE(q, k, v, dataclasses.replace(mask, **changed), *rest)

    return attend


def sums_in_half_precision(q, k, v, mask, scale=None, cap=None, sinks=None):
    """Weights are normalized and values summed in the dtype of queries, key by key."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    scores = jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    visible = mask.visible()[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores * q.shape[-1] ** -0.5, -1e30), axis=-1)

    def add_key(total, key):
        weight, value = key  # [batch, heads, seq], [batch, heads, head_dim]
        return total + weight[..., None].astype(q.dtype) * value[:, :, None], None

    start = jnp.zeros((*weights.shape[:3], q.shape[-1]), q.dtype)
    total, _ = jax.lax.scan(add_key, start, (jnp.moveaxis(weights, -1, 0), v.transpose(1, 0, 2, 3)))
    return total.transpose(0, 2, 1, 3)


@jax.custom_vjp
def scale_keys(k):
    return k


scale_keys.defvjp(lambda k: (k, None), lambda _, cotangent: (1.1 * cotangent,))


def stale_residual(q, k, v, mask, *rest):
    """The backward pass reads the keys of another call."""

    @jax.custom_vjp
    def attend(q, k, v):
        return DENSE(q, k, v, mask, *rest)

    def forward(q, k, v):
        return attend(q, k, v), (q, jnp.roll(k, 1, axis=0), v)

    def backward(residuals, cotangent):
        return jax.vjp(lambda *x: DENSE(*x, mask, *rest), *residuals)[1](cotangent)

    attend.defvjp(forward, backward)
    return attend(q, k, v)


def of_outputs(change: Any) -> Any:
    return lambda *arguments: change(DENSE(*arguments))


def without(position: int) -> Any:
    """Dense attention that ignores an argument: scale, cap or sinks."""

    def attend(*arguments):
        arguments = [*arguments, *[None] * (7 - len(arguments))]
        arguments[position] = None
        return DENSE(*arguments)

    return attend


SPOILED = {
    "a mask off by one": (
        "causal",
        with_mask(queries=lambda tokens: tokens._replace(slots=tokens.slots + 1)),
    ),
    "a window off by one": ("a window", with_mask(window=lambda window: window + 1)),
    "padding is seen": (
        "padded",
        with_mask(keys=lambda t: t._replace(positions=jnp.abs(t.positions))),
    ),
    "packed texts see each other": (
        "packed",
        with_mask(keys=lambda tokens: tokens._replace(segments=None)),
    ),
    "completions see each other": (
        "a prompt and completions",
        with_mask(keys=lambda tokens: tokens._replace(branches=None)),
    ),
    "a scale": ("causal", lambda q, *rest: DENSE(jnp.asarray(1.1, q.dtype) * q, *rest)),
    "no cap": ("capped", without(5)),
    "no sinks": ("sinks", without(6)),
    "a lost head": ("causal", of_outputs(lambda out: out.at[:, :, -1].set(0))),
    "a lost query": ("causal", of_outputs(lambda out: out.at[1, 63].set(0))),
    "swapped heads": ("grouped heads", of_outputs(lambda out: jnp.roll(out, 1, axis=2))),
    "sums in half precision": ("bidirectional", sums_in_half_precision),
    "a stale residual": ("causal", stale_residual),
    "a scaled gradient": ("causal", lambda q, k, *rest: DENSE(q, scale_keys(k), *rest)),
    "no gradient": ("causal", lambda q, k, v, *r: DENSE(q, k, jax.lax.stop_gradient(v), *r)),
    "a NaN": ("causal", of_outputs(lambda out: out.at[0, 0, 0, 0].set(jnp.nan))),
}


def attention_case(variant: str, dtype: Any = jnp.bfloat16, unit: int = 64) -> Any:
    (case,) = [
        case
        for case in attention_cases(BLOCKS, dtype, unit=unit, head_dim=32)
        if case.name == f"attention: {variant}, {jnp.dtype(dtype).name}"
    ]
    return case


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_kernel_is_found(name: str) -> None:
    variant, kernel = SPOILED[name]
    unit = 256 if name.startswith("sums") else 64  # such errors grow with the terms
    assert not attention_case(variant, unit=unit).compare(kernel).holds


@pytest.mark.parametrize("variant", sorted({variant for variant, _ in SPOILED.values()}))
def test_a_right_kernel_holds(variant: str) -> None:
    """The control: it is within half of the bound."""
    for dtype in (jnp.bfloat16, jnp.float32):
        deviation = attention_case(variant, dtype).compare(BLOCKS)
        assert 0 < deviation.error < 0.6 * deviation.bound


def test_one_of_two_devices_computes_differently() -> None:
    def attend(*arguments):
        out = BLOCKS(*arguments)
        factor = jnp.asarray([1.0, 1.1], out.dtype)[jax.lax.axis_index("device")]
        return factor * out

    first, second = attention_case("causal").compare_on(attend, jax.devices()[:2])
    assert first.holds and not second.holds
    assert second.error == pytest.approx(0.1, rel=0.2)


def test_errors_are_relative_to_the_mean_and_to_the_largest() -> None:
    exact = np.ones(10_000)
    one_wrong = exact.copy()
    one_wrong[0] = 1.5
    assert relative_error(one_wrong, exact) == 0.5
    assert relative_error(1.01 * exact, exact) == pytest.approx(0.01)
    assert np.isnan(relative_error(np.full(3, np.nan), np.ones(3)))
    assert relative_error(np.ones(3), np.zeros(3)) > 1e30
    assert relative_error(np.zeros(3), np.zeros(3)) == 0


def test_products_with_codes() -> None:
    """Of each kind; a product with the codes of other columns is found."""

    def spoiled(x, coded):
        return multiply_coded(x, jax.tree.map(lambda array: jnp.roll(array, 1, axis=1), coded))

    for case in product_cases(jnp.bfloat16, rows=16, n_in=256, n_out=128):
        assert case.compare(multiply_coded).holds, case.name
        assert not case.compare(spoiled).holds, case.name


def test_the_kernel_for_few_rows() -> None:
    """Interpreted; one that reads the layer before is found."""

    def interpreted(kernel, stack, index, x):
        return run_kernel(dataclasses.replace(kernel, interpret=True), stack, index, x)

    def spoiled(kernel, stack, index, x):
        return interpreted(kernel, stack, index - 1, x)

    cases = few_rows_cases(jnp.bfloat16, n_in=256, n_out=128)
    assert len(cases) == 4
    for case in cases:
        assert case.compare(interpreted).holds, case.name
        assert not case.compare(spoiled).holds, case.name


def test_the_kernel_for_quantized_experts() -> None:
    """Interpreted; one that gives a row to the next expert is found."""

    def interpreted(kernel, *operands):
        return run_kernel(dataclasses.replace(kernel, interpret=True), *operands)

    def spoiled(kernel, layer, place, x, sizes, transposed):
        return interpreted(kernel, layer, place, x, sizes.at[0].add(-1).at[2].add(1), transposed)

    cases = ragged_cases(jnp.bfloat16, n_in=128, n_out=256)
    assert [case.name for case in cases] == [
        f"quantized experts: {kind}, bfloat16" for kind in ("nf4", "int8", "int4", "q6_k", "mxfp4")
    ]
    for case in cases:
        assert case.compare(interpreted).holds, case.name
        assert not case.compare(spoiled).holds, case.name
    assert not ragged_cases(jnp.float32)


@pytest.mark.parametrize("experts", [apply_blocks, apply_ragged])
def test_mixtures(experts: Any) -> None:
    def unsorted(gated, rows, chosen, *kernels):
        return experts(gated, rows, jnp.sort(chosen), *kernels)

    cases = mixture_cases(jnp.bfloat16, "cpu", shape=(4, 16, 2), width=32, inner=16)
    for case in cases:
        mixture = make_mixture(gated, experts)
        assert case.compare(mixture).holds, case.name
        assert case.compare(mix_in_parts(mixture)).holds, case.name
    assert not cases[0].compare(make_mixture(gated, unsorted)).holds


@pytest.mark.slow
def test_tokens_are_exchanged() -> None:
    layout = make_layout(jax.devices(), expert=4)
    for case in exchange_cases(layout):
        placed = place_mixture(case.arrays, layout)
        assert case.compare_placed(exchanged_mixture(layout), placed, layout.mesh).holds
        lost = lambda x, *rest: exchanged_mixture(layout)(x.at[-1].set(0), *rest)  # noqa: E731
        assert not case.compare_placed(lost, placed, layout.mesh).holds


def test_kernels_that_devices_share() -> None:
    layout = make_layout(jax.devices(), fsdp=4)
    case, placed = fsdp_case(layout)
    assert case.compare_placed(lj.adapt, placed, layout.mesh).holds
    scaled = lambda run: lambda params, x: 1.01 * lj.adapt(run)(params, x)  # noqa: E731
    assert not case.compare_placed(scaled, placed, layout.mesh).holds
