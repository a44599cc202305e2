"""Splash attention compiled by the TPU's compiler (extra `tpu`), alone and in a step."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.models.layers.attend import attend
from lora_jax.models.layers.attention import AttentionInputs
from lora_jax.models.layers.kernels.splash import Splash
from lora_jax.models.layers.masks import Mask, MaskTokens
from lora_jax.models.layers.placement import Placement
from tests.train.plan.closed_form import plan_flops
from tests.train.plan.tiny_plans import FIELDS
from train.plan import __main__ as plan
from train.plan import compile as planned
from train.plan.clock.groups import ATTENTION
from train.plan.clock.read import read_clock
from train.plan.clock.work import work_of
from train.plan.hlo.kernels import kernel_lines
from train.plan.machines import find_machine

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.usefixtures("tpu_compiler")]
FUSED = ("splash attention (fwd, bwd)",)
TWO_KERNELS = ("splash attention (fwd, dq, dkv)",)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


class OneTPU(Placement):
    platform = "tpu"
    kernels = True


@functools.cache
def compiled(
    how: str | Splash,
    seq: int,
    cap: float | None = None,
    some: bool = False,
    with_sinks: bool = False,
    head_dim: int = HEAD_DIM,
    dtype: Any = jnp.bfloat16,
    topology: str = "v5e:1x1",
) -> jax.stages.Compiled:
    """The gradient of a layer's attention, on one chip."""
    here = NamedSharding(Mesh(find_machine(topology).devices[:1], ("chip",)), P())

    def loss(arrays, segments, windowed):
        slots = jnp.arange(seq, dtype=jnp.int32)
        tokens = MaskTokens(slots, slots[None], segments)
        mask = Mask(queries=tokens, keys=tokens, causal=True, aligned=True)
        mask = mask.within(200, windowed) if some else mask
        *arrays, sinks = arrays
        out = attend(
            AttentionInputs(*arrays, mask, None, cap, sinks), attention=how, placement=OneTPU()
        )
        return jnp.sum(out.astype(jnp.float32) ** 2)

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=here)

    arrays = tuple(shape(1, seq, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
    arrays += (shape(HEADS) if with_sinks else None,)
    rest = shape(1, seq, dtype=jnp.int32), shape(dtype=jnp.bool_)
    return jax.jit(jax.grad(loss)).lower(arrays, *rest).compile()


def test_the_kernels_are_in_the_module():
    """All scores of the causal blocks, two products forward and five or seven backward."""
    dense, text = (compiled(how, 2048).as_text() for how in ("dense", "auto"))
    assert kernel_lines(work_of(dense).kernels) == () and not read_clock(dense).kernels, "control"
    work = work_of(text)
    assert kernel_lines(work.kernels) == FUSED
    assert work.flops == 7 * 2 * HEADS * HEAD_DIM * (10 * 512**2)
    two_kernels = compiled(Splash(fused=False), 2048).as_text()
    assert kernel_lines(work_of(two_kernels).kernels) == TWO_KERNELS, "control"
    assert work_of(two_kernels).flops == 9 * 2 * HEADS * HEAD_DIM * (10 * 512**2)
    assert read_clock(text).seconds < read_clock(two_kernels).seconds
    at_half_the_peak = work.flops * 2 / 7 / (0.5 * 197e12)
    backward = 2700 * HEADS * 10 * 2**17 / 197e12  # by the schedule
    np.testing.assert_allclose(read_clock(text).kernels, at_half_the_peak + backward, rtol=1e-12)
    assert read_clock(text).cost(ATTENTION).flops == work.flops


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"])
@pytest.mark.parametrize(
    ("seq", "head_dim", "dtype"),
    [(16384, 128, jnp.bfloat16), (8192, 256, jnp.bfloat16), (8192, 128, jnp.float32)],
)
def test_the_longest_rows_of_one_backward_kernel_fit_the_chip(topology, seq, head_dim, dtype):
    """With a cap, which needs most memory for a block."""
    sizes = {"head_dim": head_dim, "dtype": dtype}
    text = compiled("splash", seq, cap=50.0, topology=topology, **sizes).as_text()
    assert kernel_lines(work_of(text).kernels) == FUSED


def test_a_longer_row_has_two_backward_kernels():
    text = compiled("splash", 32768, head_dim=128).as_text()
    assert kernel_lines(work_of(text).kernels) == TWO_KERNELS


def test_temporaries_grow_with_the_length_and_not_its_square():
    def growth(how):
        few, many = (
            compiled(how, seq).memory_analysis().temp_size_in_bytes for seq in (2048, 8192)
        )
        print(f"{how}: {few / 2**20:.1f} MiB, {many / 2**20:.1f} MiB")
        return (many + 2**20) / (few + 2**20)

    assert growth("auto") < 6
    assert growth("dense") > 12, "the control"


@pytest.mark.parametrize("options", [{"cap": 50.0}, {"with_sinks": True}])
def test_a_window_of_some_layers_and_a_cap_or_sinks(options):
    """Tells the kernel at run time whether the window holds, by a bit in the queries' slots."""
    work = work_of(compiled("splash", 1100, some=True, **options).as_text())
    assert kernel_lines(work.kernels) == FUSED


GEMMA = {"model_type": "gemma2", "sliding_window": 256, "query_pre_attn_scalar": 16}
GEMMA |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA |= {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("more", "machine"),
    [
        ({}, ("--topology", "v5e:1x1")),
        ({}, ("--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2")),
        (GEMMA, ("--topology", "v5e:2x2", "--mesh", "data=2,sequence=2")),
    ],
)
def test_the_kernels_are_in_a_step(tmp_path, more, machine):
    """And their FLOPs in all counts, of layers of which some have a window, too."""
    path = tmp_path / "config.json"
    fields = {name: value for name, value in FIELDS.items() if value is not None}
    path.write_text(json.dumps(fields | {"max_position_embeddings": 4096} | more))
    args = ["--model", str(path), *machine, "--batch-size", "4", "--seq-len", "1024"]
    options = plan.parse([*args, "--rank", "3"])
    job, optim = plan.make_job(options.plan)
    assert plan.describe_job(options.plan, job)["attention"] == "splash"
    variant = plan.variants_to_plan(options)[0]
    made = planned.plan(job, variant, optim)
    assert made.fits and made.kernels == FUSED and made.flops_source == "hlo"
    by_hand = plan_flops(job, variant)
    np.testing.assert_allclose(made.flops_traced, by_hand, rtol=0.01)
    np.testing.assert_allclose(made.flops_per_step, by_hand, rtol=0.1)
