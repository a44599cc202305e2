"""Kernels in plans: their FLOPs by the table, and their names."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax
from lora_jax.models.layers.kernels import splash_backward
from lora_jax.quantized import ragged, rows
from train.plan.clock.read import read_clock
from train.plan.clock.work import work_of
from train.plan.flops.jaxpr import count_flops
from train.plan.hlo.kernels import KERNELS, KernelCall, kernel_lines, unlisted_kernels

OWN_FILES = [
    "models/layers/kernels/splash_backward.py",
    "quantized/ragged.py",
    "quantized/rows.py",
]
# As the TPU compiler writes them: attributes have lines of their own, which begin with brackets.
TEXT = """HloModule jit_step, is_scheduled=true

%body (b: (s32[], bf16[2,6,256,7])) -> (s32[], bf16[2,6,256,7]) {
  %b = (s32[], bf16[2,6,256,7]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %q = bf16[2,6,256,7]{3,2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%b), index=1
  %visits = s8[1,2,2]{2,1,0} constant({...})
  %k = bf16[2,3,512,7]{3,2,1,0} constant({...})
  %splash_mha_dq_segmented_no_residuals.10 = (f32[2,128,128]{2,1,0}, bf16[2,6,256,7]{3,2,1,0}) \
custom-call(%visits, %visits, %q, %k, %k, /*index=5*/%q), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q_dq\\": 128}"
}}, metadata={op_name="jit(step)/checkpoint/blocks_3_of_8/splash_mha_dq/pallas_call"}
  %next = bf16[2,6,256,7]{3,2,1,0} get-tuple-element(%splash_mha_dq_segmented_no_residuals.10), \
index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/pallas_call"}
  %NAME.3 = bf16[4,4]{1,0} custom-call(%visits, %q, %k), custom_call_target="tpu_custom_call"
  %other = bf16[4,4]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %out = (s32[], bf16[2,6,256,7]{3,2,1,0}) tuple(%i, %next)
}
%condition (c: (s32[], bf16[2,6,256,7])) -> pred[] {
  %c = (s32[], bf16[2,6,256,7]{3,2,1,0}) parameter(0)
  ROOT %lt = pred[] constant(false)
}
ENTRY %main (p: (s32[], bf16[2,6,256,7])) -> (s32[], bf16[2,6,256,7]) {
  %p = (s32[], bf16[2,6,256,7]{3,2,1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[2,6,256,7]{3,2,1,0}) while(%p), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_a_kernel_counts_the_blocks_that_its_mask_leaves() -> None:
    work = work_of(TEXT.replace("NAME", "splash_mha_fwd_residuals"))
    of_all = 2 * (2 * 6 * 256) * 7 * 512  # a product of all queries and keys
    assert work.flops == 5 * (3 * of_all * 3 // 8 + 2 * of_all)
    assert kernel_lines(work.kernels) == ("splash attention (fwd, dq)",) and not unlisted_kernels(
        work.kernels
    )


def test_a_kernel_that_is_not_listed_is_named() -> None:
    work = work_of(TEXT.replace("NAME", "their_kernel"))
    assert kernel_lines(work.kernels) == ("splash attention (dq)", "their_kernel")
    assert unlisted_kernels(work.kernels) == ("their_kernel",)


def test_a_window_of_some_layers_counts_as_their_mean() -> None:
    here = "windowed_4_of_5/blocks_3_or_1_of_8"
    of_all = 2 * (2 * 6 * 256) * 7 * 512
    text = TEXT.replace("NAME", "other").replace("blocks_3_of_8", here)
    assert abs(work_of(text).flops - 3 * of_all * (3 + 4 * 1) / 8) <= 5  # five turns of a loop


def test_a_kernel_of_jax_triton_is_named_by_its_scope() -> None:
    text = TEXT.replace("tpu_custom_call", "triton_kernel_call_ffi")
    text = text.replace("splash_mha_dq_segmented_no_residuals", "triton_kernel_call")
    text = text.replace("splash_mha_dq/pallas_call", "flash_dq/triton_kernel_call")
    work = work_of(text.replace("%NAME.3", "%triton_kernel_call.3"))
    assert kernel_lines(work.kernels) == ("flash attention (dq)", "triton_kernel_call")


RAGGED = """HloModule jit_experts, is_scheduled=true

ENTRY %main (sizes: s32[8], x: bf16[40,5], w: bf16[3,5,7], g: bf16[40,7]) -> f32[3,5,7] {
  %sizes = s32[3]{0} parameter(0)
  %x = bf16[40,5]{1,0:T(8,128)(2,1)} parameter(1)
  %w = bf16[3,5,7]{2,1,0:T(8,128)(2,1)} parameter(2)
  %g = f32[40,7]{1,0} parameter(3)
  %ragged-dot-metadata.1 = (s32[4]{0:T(128)S(1)}, s32[9]{0}) custom-call(%sizes), \
custom_call_target="tpu_custom_call", metadata={op_name="ragged-dot-metadata"}
  %ends = s32[4]{0:T(128)S(1)} get-tuple-element(%ragged-dot-metadata.1), index=0
  %ragged-dot-none.2 = bf16[40,7]{1,0} custom-call(%ends, %ends, %x, %w), \
custom_call_target="tpu_custom_call", frontend_attributes={ragged_dot_tiling="128,5,7"}
  %ragged-dot-none.1 = bf16[40,5]{1,0} custom-call(%ends, %ends, %ragged-dot-none.2, %w), \
custom_call_target="tpu_custom_call", frontend_attributes={ragged_dot_tiling="128,7,5"}
  ROOT %ragged-dot-none = f32[3,5,7]{2,1,0} custom-call(%ends, %ends, %x, %g), \
custom_call_target="tpu_custom_call", frontend_attributes={ragged_dot_tiling="128,5,7"}
}
"""


def test_ragged_products_count_each_row_with_its_group() -> None:
    """Forward, the gradient of the rows, and that of the kernels."""
    work = work_of(RAGGED)
    assert work.flops == 3 * 2 * 40 * 5 * 7
    assert kernel_lines(work.kernels) == ("ragged products (rows, groups)",)
    assert not unlisted_kernels(work.kernels)


def test_rows_of_no_group_do_not_count() -> None:
    """A scope says how many of the rows belong to a group, if all experts are chosen alike."""
    scoped = RAGGED.replace('"128,5,7"}', '"128,5,7"}, metadata={op_name="rows_32_of_40/dot"}')
    assert work_of(scoped).flops == (1 + 2 * 32 / 40) * 2 * 40 * 5 * 7

    @jax.named_scope("rows_32_of_40")
    def multiply(rows: jax.Array, kernels: jax.Array) -> jax.Array:
        return lax.ragged_dot(rows, kernels, jnp.array([12, 0, 20], jnp.int32))

    traced = jax.make_jaxpr(multiply)(jnp.ones((40, 5)), jnp.ones((3, 5, 7)))
    assert count_flops(traced).flops == 2 * 32 * 5 * 7


def test_kernels_of_our_own_cost_the_cycles_of_their_schedule() -> None:
    """Not a share of the peak, which is assumed of kernels that others wrote."""
    folder = Path(lora_jax.__file__).parent
    files = [file for file in folder.rglob("*.py") if "pallas_call(" in file.read_text()]
    assert sorted(file.relative_to(folder).as_posix() for file in files) == OWN_FILES
    prefixes = (rows.KERNEL_NAME, ragged.KERNEL_NAME, splash_backward.KERNEL_NAME)
    own = [name for name in KERNELS if name.startswith(prefixes)]
    assert len(own) == 5
    assert all(KERNELS[name].cycles for name in own)


@pytest.mark.parametrize(("head_dim", "cycles"), [(64, 2700), (128, 5120), (256, 10240)])
def test_one_backward_kernel_costs_no_less_than_those_of_jax(head_dim: int, cycles: int) -> None:
    """Narrow heads fill half of the matrix units: the schedule of a block takes longer."""
    floats = [("bf16", (4, 1024, head_dim)), ("bf16", (2, 1024, head_dim))]
    call = KernelCall("splash_gradients.3", "blocks_3_of_4/x", (("s8", (1, 2, 2)), *floats))
    kernel = KERNELS["splash_gradients"]
    assert kernel.flops(call) == 5 * 2 * head_dim * 4 * 3 * 512**2
    assert kernel.cycles is not None and kernel.cycles(call) == 4 * 3 * cycles


def test_faster_matrix_units_take_less_time_for_one_backward_kernel() -> None:
    text = TEXT.replace("NAME", "other").replace("splash_mha_dq_segmented", "splash_gradients")
    v5e = read_clock(text)
    v6e = read_clock(text, clock=1.75e9, peak=918e12, memory=1e15)
    np.testing.assert_allclose(v5e.kernels / v6e.kernels, 918 / 197, rtol=1e-12)


CODED_RAGGED = """HloModule jit_step, is_scheduled=true

ENTRY %main (x: bf16[128,64], c: s4[3,5,64,256], s: u8[5,2,256]) -> bf16[128,256] {
  %n = s32[8] constant({...})
  %x = bf16[128,64]{1,0} parameter(0)
  %c = s4[3,5,64,256]{3,2,1,0} parameter(1)
  %s = u8[5,2,256]{2,1,0} parameter(2)
  ROOT %coded_ragged.3 = bf16[128,256]{1,0} custom-call(%n, %n, %x, %c, %s), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/pallas_call"}
}
"""


def test_a_product_with_quantized_experts_reads_one_layer_and_decodes_it_once() -> None:
    work = work_of(CODED_RAGGED)
    assert work.flops == 2 * 128 * 64 * 256
    assert kernel_lines(work.kernels) == ("ragged products by codes (cast)",)
    (call,) = work.kernels
    kernel = KERNELS[ragged.KERNEL_NAME]
    assert kernel.unread(call) == 2 * 5 * 64 * 256 // 2
    # 3.2 cycles for 1,024 weights, and 64 rows more for each expert.
    multiplied = 1.05 * 2 * (128 + 5 * 64) * 64 * 256 / 2**17
    assert kernel.cycles(call) == pytest.approx(3.2 * 5 * 16 + multiplied)
