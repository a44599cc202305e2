"""The check's programs, compiled for TPUs and GPUs that are not here, each by its compiler."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.cases.attention import attention_cases
from lora_jax.cases.mixtures import gated, mixture_cases
from lora_jax.cases.products import (
    few_rows_cases,
    multiply_coded,
    product_cases,
    ragged_cases,
    run_kernel,
)
from lora_jax.models.decoder.experts import apply_ragged
from lora_jax.models.decoder.moe import make_mixture
from lora_jax.models.layers.attend import Kernel, implementation
from lora_jax.models.layers.placement import platform_of
from tests.gpu_compiler.steps import need_compiler
from train.plan.machines import find_machine

SMALL = {"rows": 64, "n_in": 256, "n_out": 128}


def compile_case(case: Any, kernel: Any, device: Any) -> str:
    """Returns the optimized HLO of a case for a device."""
    assert case.refusal is None
    mesh = Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        case.arrays,
    )
    with jax.set_mesh(mesh):
        text: str = case.jitted(kernel, mesh).lower(*shapes).compile().as_text()
    return text


def compile_attention(device: Any, names: list[str]) -> None:
    kernel = implementation("auto", 2048, platform_of(device))
    assert isinstance(kernel, Kernel)
    for case in attention_cases(kernel, jnp.bfloat16, unit=512):
        if case.name.split(": ")[1].removesuffix(", bfloat16") in names:
            assert "custom_call_target" in compile_case(case, kernel, device), case.name


NAMES = ["padded, packed, a window, capped", "a prompt and completions"]


@pytest.mark.tpu_compiler
@pytest.mark.usefixtures("tpu_compiler", "standard_promotion")
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_programs_for_tpus(topology: str) -> None:
    device = find_machine(topology).devices[0]
    compile_attention(device, NAMES)
    case = product_cases(jnp.bfloat16, **SMALL)[0]
    compile_case(case, multiply_coded, device)
    for case in few_rows_cases(jnp.bfloat16):
        assert "coded_rows" in compile_case(case, run_kernel, device)
    compile_case(ragged_cases(jnp.bfloat16)[0], run_kernel, device)
    case = mixture_cases(jnp.bfloat16, "tpu")[0]
    plain = dataclasses.replace(case, compiler_options={})
    mixture = make_mixture(gated, apply_ragged)
    text = compile_case(case, mixture, device)
    assert "custom-call" in text and text != compile_case(plain, mixture, device)


@pytest.mark.gpu_compiler
@pytest.mark.parametrize("card", ["h100", "l4", "rtx4090", "t4"])
def test_programs_for_gpus(card: str) -> None:
    """A T4 has no kernel of attention."""
    need_compiler()
    device = find_machine(f"{card}:1").devices[0]
    if card == "t4":
        assert not isinstance(implementation("auto", 2048, platform_of(device)), Kernel)
    else:
        compile_attention(device, NAMES)
    for case in product_cases(jnp.bfloat16, **SMALL)[:2]:
        compile_case(case, multiply_coded, device)
