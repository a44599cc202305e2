"""Experts in codes on v5e, by the TPU's compiler (extra `tpu`)."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import SingleDeviceSharding

import lora_jax as lj
from lora_jax.core import base
from lora_jax.models import compiler_options
from lora_jax.models.decoder.experts import apply_blocks, apply_formed
from lora_jax.quantized import FORMATS, Coded, coded
from lora_jax.quantized.ragged import KERNEL_NAME
from train.plan.clock.groups import COPIES
from train.plan.clock.read import read_clock
from train.plan.machines import find_machine

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.usefixtures("tpu_compiler")]

# A kernel that decodes codes takes whole registers of 64 rows: not 1,440.
LAYERS, EXPERTS, WIDTH, WHOLE_WIDTH, ROWS = 2, 8, 1440, 1536, 2048


def compiled(apply, width=WIDTH):
    """The HLO of the gradient of layers of a kernel up and one down, in MXFP4."""
    jax.clear_caches()
    where = SingleDeviceSharding(find_machine("v5e:1x1").devices[0])
    array = functools.partial(jax.ShapeDtypeStruct, sharding=where)
    scales = array((LAYERS, EXPERTS, width // 32, width), jnp.uint8)
    arrays = {"codes": array((LAYERS, EXPERTS, width, width), jnp.int4), "scales": scales}
    params = {name: Coded(arrays, FORMATS["mxfp4"], jnp.bfloat16) for name in ("up", "down")}

    def layers(params, x, chosen):
        def layer(x, kernels):
            return x + apply(jax.nn.silu, x, chosen, kernels["up"], kernels["down"]), None

        return lax.scan(layer, x, params)[0]

    def loss(x, params, chosen):
        return jnp.sum(lj.adapt(layers)(params, x, chosen).astype(jnp.float32) ** 2)

    run = jax.jit(jax.grad(loss), compiler_options=compiler_options("tpu"))
    args = array((ROWS, width), jnp.bfloat16), params, array((ROWS,), jnp.int32)
    return run.lower(*args).compile().as_text()


def layers_written(text, dtype, width):
    """Returns how many instructions write a layer's kernel or codes in this dtype."""
    pattern = rf"\n  (?:ROOT )?%\S+ = {dtype}\[([\d,]+)\]\S* fusion\(.*estimated_cycles"
    sizes = [math.prod(map(int, size.split(","))) for size in re.findall(pattern, text)]
    return sizes.count(EXPERTS * width * width)


def codes_copied(text):
    """Returns True if instructions write a layer's codes."""
    return layers_written(text, "s4", WIDTH) > 0


def test_codes_of_experts_are_read_where_they_lie(monkeypatch):
    formed = compiled(apply_formed)
    assert "ragged-dot" in formed and not codes_copied(formed)
    seconds = read_clock(formed).seconds
    with monkeypatch.context() as patch:
        patch.setattr(
            base, "_MIN_BLOCK_ELEMENTS", math.inf
        )  # the control: a barrier before codes, too
        behind = compiled(apply_formed)
    assert codes_copied(behind) and read_clock(behind).seconds > 1.2 * seconds
    blocks = read_clock(compiled(apply_blocks))
    assert blocks.seconds > 2 * seconds and blocks.cost(COPIES).seconds > seconds


def test_codes_of_experts_are_decoded_within_the_product(monkeypatch):
    """No kernel of a layer is written, and no codes are copied out of their stack."""
    within = compiled(apply_formed, WHOLE_WIDTH)
    assert KERNEL_NAME in within and "ragged-dot" not in within
    assert layers_written(within, "bf16", WHOLE_WIDTH) == 0
    assert layers_written(within, "s4", WHOLE_WIDTH) == 0
    monkeypatch.setattr(coded, "find_ragged_kernel", lambda *_: None)  # the control
    formed = compiled(apply_formed, WHOLE_WIDTH)
    assert "ragged-dot" in formed and layers_written(formed, "bf16", WHOLE_WIDTH) >= 3
    assert read_clock(formed).seconds > 1.5 * read_clock(within).seconds


def estimate_of_blocks():
    """The seconds of products with an expert a block, of DeepSeek-V3's sizes in FP8."""
    jax.clear_caches()
    experts, width, inner, rows, n_blocks = 4, 7168, 2048, 512, 3
    chip = SingleDeviceSharding(find_machine("v5e:1x1").devices[0])

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

    def blocks(codes, scales, x, chosen):
        def block(rows, expert):
            arrays = {"codes": codes, "scales": scales}
            one = {k: lax.dynamic_slice_in_dim(v, expert, 1) for k, v in arrays.items()}
            return rows @ Coded(one, FORMATS["fp8"], jnp.bfloat16).as_array()[0]

        return lax.map(lambda pair: block(*pair), (x, chosen))

    codes = array(jnp.uint8, experts, width, inner)
    scales = array(jnp.float32, experts, width // 128, inner // 128)
    x = array(jnp.bfloat16, n_blocks, rows, width)
    program = jax.jit(blocks).lower(codes, scales, x, array(jnp.int32, n_blocks)).compile()
    return read_clock(program.as_text()).fusions


def test_a_product_forms_the_kernel_where_scales_come_by_whole_tiles(monkeypatch):
    new = estimate_of_blocks()
    monkeypatch.setattr(coded, "_repeat_by_tiles", coded._repeat)
    old = estimate_of_blocks()
    assert 2 * new < old
