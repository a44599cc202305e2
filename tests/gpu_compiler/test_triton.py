"""The programs in Triton's language, compiled for each architecture."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.kernels import flash_call
from lora_jax.models.layers.kernels.flash import Flash
from lora_jax.models.layers.masks import Mask, bidirectional_mask
from tests.gpu_compiler.steps import need_compiler
from train.plan.clock.work import work_of
from train.plan.hlo.kernels import kernel_lines
from train.plan.machines import find_machine

pytestmark = pytest.mark.gpu_compiler


@pytest.fixture(autouse=True, scope="module")
def triton_is_here() -> None:
    need_compiler()


def gradient(mask: Mask, cap: float | None) -> Any:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        inputs = AttentionInputs(q, k, v, mask, None, cap, sinks)
        return jnp.sum(Flash().compute(inputs).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, (0, 1, 2, 3)))


@pytest.mark.parametrize("card", ["a100-80gb", "rtx4090", "h100", "b200"])
def test_each_program_compiles_without_a_warning(card: str) -> None:
    """For sm_80, 89, 90 and 100, by `jax_triton`."""
    devices = np.array(find_machine(f"{card}:1").devices)
    mesh = jax.sharding.Mesh(devices, ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.NamedSharding(mesh, jax.P())

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=whole)

    mask = bidirectional_mask(jnp.ones((2, 512), bool)).branching(jnp.zeros((2, 512), jnp.int32))
    assert flash_call.missing_compiler() is None
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("error")
        arrays = (shape(2, 512, 4, 80), shape(2, 512, 2, 80), shape(2, 512, 2, 80), shape(4))
        text = gradient(mask, 30.0).lower(*arrays).compile().as_text()
    work = work_of(text)
    assert kernel_lines(work.kernels) == ("flash attention (fwd, dq, dkv)",)
    assert text.count('custom_call_target="triton_kernel_call_ffi"') == 3
    assert "512,512]" not in text
