"""The checks of kernels, by group: each row compares one kernel with dense arithmetic."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.cases.attention import attention_cases
from lora_jax.cases.case import Case, Deviation
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
from lora_jax.models.decoder.experts import apply_ragged
from lora_jax.models.decoder.moe import make_mixture
from lora_jax.models.layers.attend import Kernel, implementation
from lora_jax.models.layers.placement import platform_of
from train.check.table import FAILS, HOLDS, NOT_APPLICABLE, RowResult

_LONG_ROW = 2048  # tokens of the row for which attention is chosen
_PINNED_HOST = "pinned_host"  # the memory that --remat offload moves arrays to
_DTYPES = (jnp.bfloat16, jnp.float32)


class CheckRow(NamedTuple):
    """A check with its name: `run` returns the result, or raises an error, which is a failure."""

    name: str
    run: Callable[[], RowResult]


def attention_rows(kernel: Any = None, unit: int = 1024) -> list[CheckRow]:
    """Returns the rows of attention.

    Args:
      kernel: the implementation; by default the one that "auto" chooses for long rows.
      unit: the number of tokens of the shortest row.
    """
    devices = jax.local_devices()
    kernel = kernel or implementation("auto", _LONG_ROW, platform_of(devices[0]))
    if not isinstance(kernel, Kernel):
        reason = f"auto chooses {type(kernel).__name__.lower()}, which is no kernel"
        return [_not_applicable("attention", reason)]
    bf16_cases, fp32_cases = (attention_cases(kernel, dtype, unit=unit) for dtype in _DTYPES)
    return _rows_of_cases([*bf16_cases, *fp32_cases[:2]], kernel, devices)


def product_rows(product: Any = multiply_coded, few_rows: Any = None) -> list[CheckRow]:
    """Returns the rows of products with quantized weights.

    Args:
      product: see `lora_jax.cases.products.Product`.
      few_rows: the kernel for few rows; by default that of TPUs.
    """
    devices = jax.local_devices()
    rows = _rows_of_cases(product_cases(jnp.bfloat16), product, devices)
    if few_rows is None and devices[0].platform != "tpu":
        return [*rows, _not_applicable("few rows", "only TPUs have a kernel for few rows")]
    cases = few_rows_cases(jnp.bfloat16)
    if few_rows is None:
        cases += ragged_cases(jnp.bfloat16)
    return [*rows, *_rows_of_cases(cases, few_rows or run_kernel, devices)]


def expert_rows(experts: Any = None) -> list[CheckRow]:
    """Returns the rows of mixtures of experts.

    Args:
      experts: the implementation of experts; by default that of TPUs.
    """
    devices = jax.local_devices()
    platform = devices[0].platform
    if experts is None and platform != "tpu":
        return [_not_applicable("experts", "auto chooses blocks, which is no kernel")]
    mixture = make_mixture(gated, experts or apply_ragged)
    cases = mixture_cases(jnp.bfloat16, platform)
    part_cases = [
        dataclasses.replace(case, name=case.name.replace("experts", "experts in parts"))
        for case in cases
    ]
    return [
        *_rows_of_cases(cases, mixture, devices),
        *_rows_of_cases(part_cases, mix_in_parts(mixture), devices),
    ]


def mesh_rows() -> list[CheckRow]:
    """Returns the rows of several devices."""
    devices = jax.devices()
    if len(devices) == 1:
        return [_not_applicable(name, "there is one device") for name in ("exchange", "fsdp")]
    experts_layout = make_layout(devices, expert=len(devices))
    fsdp_layout = make_layout(devices, fsdp=len(devices))

    def compare_exchange(case: Case) -> RowResult:
        arrays = place_mixture(case.arrays, experts_layout)
        mixture = exchanged_mixture(experts_layout)
        return judge(case, [case.compare_placed(mixture, arrays, experts_layout.mesh)])

    def compare_fsdp() -> RowResult:
        case, arrays = fsdp_case(fsdp_layout)
        return judge(case, [case.compare_placed(lj.adapt, arrays, fsdp_layout.mesh)])

    rows = [
        CheckRow(case.name, functools.partial(compare_exchange, case))
        for case in exchange_cases(experts_layout)
    ]
    return [*rows, CheckRow("fsdp: an adapted MLP, float32", compare_fsdp)]


def memory_rows() -> list[CheckRow]:
    """Returns the rows of donated arrays, and of arrays that move to the host's memory."""
    return [CheckRow("donation", check_donation), CheckRow("offload", check_offload)]


def check_donation() -> RowResult:
    """Checks that a donated array is replaced in its place, and that the result is right."""
    state = jax.device_put(np.arange(2.0**20, dtype=np.float32))
    update = jax.jit(lambda state: state + 1, donate_argnums=0).lower(state).compile()
    memory: Any = update.memory_analysis()
    result = update(state)
    is_right = np.array_equal(result, np.arange(2.0**20) + 1)
    if is_right and state.is_deleted() and memory.alias_size_in_bytes == result.nbytes:
        return RowResult("donation", HOLDS, "the result lies where the argument lay")
    problem = "the donated array stays in memory" if is_right else "the result is wrong"
    return RowResult("donation", FAILS, problem)


def check_offload() -> RowResult:
    """Checks that gradients are the same if the inputs of layers go to the host and back."""
    memories = [memory.kind for memory in jax.local_devices()[0].addressable_memories()]
    if _PINNED_HOST not in memories or jax.default_backend() == "cpu":
        return RowResult("offload", NOT_APPLICABLE, "the device has no memory but its own")
    weights = np.random.default_rng(0).standard_normal((4, 256, 256)).astype(np.float32) / 16
    x = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)

    def loss(weights: jax.Array, x: jax.Array, policy: Any) -> jax.Array:
        @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            x = jax.ad_checkpoint.checkpoint_name(x, "layer_input")
            return jnp.tanh(x @ weight), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    offload = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst=_PINNED_HOST,
    )
    keep = jax.checkpoint_policies.everything_saveable
    gradients = [
        np.asarray(jax.jit(jax.grad(functools.partial(loss, policy=policy)))(weights, x))
        for policy in (offload, keep)
    ]
    error = np.max(np.abs(gradients[0] - gradients[1])) / np.max(np.abs(gradients[1]))
    state = HOLDS if error < 1e-2 else FAILS
    return RowResult("offload", state, f"gradients differ by {error:.1e}", {"error": float(error)})


def judge(case: Case, deviations: Sequence[Deviation]) -> RowResult:
    """Returns the result of a case from the error on each device."""
    failures = [index for index, deviation in enumerate(deviations) if not deviation.holds]
    errors = [deviation.error for deviation in deviations]
    worst = errors[failures[0]] if failures else max(errors)
    bound = deviations[0].bound
    text = f"error {worst:.1e}, bound {bound:.1e}"
    if failures and len(deviations) > 1:
        text += f", on device {', '.join(map(str, failures))} of {len(deviations)}"
    figures = {"errors": errors, "bound": bound}
    return RowResult(case.name, FAILS if failures else HOLDS, text, figures)


def _rows_of_cases(
    cases: Sequence[Case], kernel: Any, devices: Sequence[jax.Device]
) -> list[CheckRow]:
    """Returns a row for each case, which runs on all of these devices."""

    def compare(case: Case) -> RowResult:
        if case.refusal is not None:
            return RowResult(case.name, NOT_APPLICABLE, case.refusal)
        return judge(case, case.compare_on(kernel, devices))

    return [CheckRow(case.name, functools.partial(compare, case)) for case in cases]


def _not_applicable(name: str, reason: str) -> CheckRow:
    return CheckRow(name, lambda: RowResult(name, NOT_APPLICABLE, reason))
