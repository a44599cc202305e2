"""Work read from optimised HLO, against programs whose work is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.train.plan.test_jaxpr_flops import LAYERS_FLOPS, layers
from train.plan.clock.work import NotUnderstood, work_of
from train.plan.hlo.module import HloModule


def compiled(fn, *shapes, **kwargs):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(fn, **kwargs).lower(*args).compile()


def test_a_loop_counts_as_often_as_it_runs():
    program = compiled(layers, (5, 7), (11, 7, 7))
    assert work_of(program.as_text()).flops == LAYERS_FLOPS
    assert program.cost_analysis()["flops"] < 3 * LAYERS_FLOPS / 11, (
        "XLA's own count takes a loop once"
    )


def test_batched_products():
    def scores(q, k):
        return jnp.einsum("bqhd,bkhd->bhqk", q, k)

    program = compiled(scores, (2, 13, 3, 5), (2, 17, 3, 5))
    assert work_of(program.as_text()).flops == 2 * 2 * 3 * 13 * 17 * 5


def test_a_branch_counts_as_its_costliest_side():
    def either(flag, x):
        return lax.cond(flag[0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert work_of(compiled(either, (1,), (19, 19)).as_text()).flops == 2 * 2 * 19**3


@pytest.mark.parametrize(
    ("window", "pairs"),
    [
        (dict(window_strides=(1,), padding=[(0, 0)]), 21 * 5),
        (dict(window_strides=(2,), padding=[(0, 0)]), 11 * 5),
        (dict(window_strides=(1,), padding=[(2, 2)]), 25 * 5 - 2 * (2 + 1)),
        (dict(window_strides=(1,), padding=[(0, 0)], rhs_dilation=(3,)), 13 * 5),
    ],
)
def test_convolutions(window, pairs):
    """Padding is no work; `pairs` is (output, kernel) along the axis, counted by hand."""
    conv = functools.partial(
        lax.conv_general_dilated, dimension_numbers=("NHC", "HIO", "NHC"), **window
    )
    program = compiled(conv, (2, 25, 3), (5, 3, 7)).as_text()
    assert " convolution(" in program
    assert work_of(program).flops == 2 * 2 * 3 * 7 * pairs


def module(body, *others):
    """An HLO module with an entry, such as the TPU compiler writes."""
    text = "HloModule jit_step, is_scheduled=true\n\n" + "\n".join(others)
    return f"{text}\nENTRY %main (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


def test_products_as_the_tpu_compiler_writes_them():
    """Batch axes are spatial, with holes such that each output meets one input."""
    text = module(
        """  %q = f32[2048,4,8,128]{3,2,1,0:T(8,128)} parameter(0)
  %k = f32[4,8,128,2048]{3,2,1,0:T(8,128)} parameter(1)
  ROOT %scores = f32[4,8,2048,2048]{3,2,1,0:T(8,128)} convolution(%q, %k), \
window={size=4x8 stride=3x7 lhs_dilate=4x8}, dim_labels=b01f_01io->01bf, metadata={op_name="a"}"""
    )
    assert work_of(text).flops == 2 * 4 * 8 * 2048 * 2048 * 128
    text = module(
        """  %x = bf16[2048,2,256]{2,1,0} parameter(0)
  %w = bf16[2,256,11008]{2,1,0} parameter(1)
  ROOT %y = bf16[2048,11008,1]{1,0,2} convolution(%x, %w), window={size=2}, \
dim_labels=b0f_0io->bf0"""
    )
    assert work_of(text).flops == 2 * 2048 * 512 * 11008


LOOP = """
%condition (c: (u32[], f32[8])) -> pred[] {
  %c = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%c), index=0
  %n = u32[]{:T(128)} constant(LIMIT)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}
%body (b: (u32[], f32[8])) -> (u32[], f32[8]) {
  %b = (u32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%b), index=0
  %x = f32[8]{0} get-tuple-element(%b), index=1
  %step = u32[]{:T(128)} constant(2)
  %copied = u32[]{:T(128)} copy(%i)
  %next = u32[]{:T(128)} add(%copied, %step)
  %sent = f32[8]{0} collective-permute(%x), channel_id=7, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (u32[]{:T(128)}, f32[8]{0}) tuple(%next, %sent)
}"""
ENTRY = """  %x = f32[8]{0} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %init = (u32[], f32[8]{0}) tuple(%zero, %x)
  %loop = (u32[], f32[8]{0}) while(%init), condition=%condition, body=%body
  ROOT %end = f32[8]{0} get-tuple-element(%loop), index=1"""


def test_a_computation_of_another_thread_ends_where_it_does():
    text = """HloModule jit_step, is_scheduled=true

%offloaded.1 (param_0: f32[5,7]) -> f32[5,7] {
  ROOT %param_0 = f32[5,7]{1,0} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main.1 (p: f32[5,7]) -> f32[5,7] {
  %p = f32[5,7]{1,0} parameter(0)
  ROOT %call.1 = f32[5,7]{1,0} call(%p), to_apply=%offloaded.1
}
"""
    module = HloModule(text)
    assert {name: list(found) for name, found in module.computations.items()} == {
        "offloaded.1": ["param_0"],
        "main.1": ["p", "call.1"],
    }


def test_loops_whose_turns_only_their_condition_tells():
    """As in the TPU compiler's output, where a loop may have been unrolled: here by two."""
    for limit, turns in ((8, 4), (9, 5)):
        text = module(ENTRY, LOOP.replace("LIMIT", str(limit)))
        assert work_of(text).sent == {"collective-permute": turns * 32}
    with pytest.raises(ValueError, match="how often the loop loop runs"):
        work_of(module(ENTRY, LOOP.replace("constant(LIMIT)", "get-tuple-element(%c), index=0")))


def test_a_collective_that_is_spread_over_fusions_counts_once():
    """As in the TPU compiler's output; another one with the same channel counts as well."""

    def part(name, does=""):
        return f"""
%{name} (p.{name}: f32[2]) -> f32[8] {{
  %p.{name} = f32[2]{{0}} parameter(0)
  {does}
  ROOT %gathered.{name} = f32[8]{{0}} all-gather(%p.{name}), channel_id=3, \
replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, dimensions={{0}}
}}"""

    beside = "%d = f32[] dot(%p.async_collective_fusion.7, %p.async_collective_fusion.7), "
    beside += "lhs_contracting_dims={0}, rhs_contracting_dims={0}"
    text = module(
        """  %x = f32[2]{0} parameter(0)
  %async-collective-start.1 = f32[8]{0} fusion(%x), kind=kCustom, calls=%first.1
  %fusion.7 = f32[8]{0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.7
  %async-collective-done.1 = f32[8]{0} fusion(%x), kind=kCustom, calls=%last.1
  ROOT %other = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2""",
        part("first.1"),
        part("async_collective_fusion.7", beside),
        part("last.1"),
        part("all-reduce-scatter.2").replace("all-gather(", "all-reduce("),
    )
    work = work_of(text)
    assert work.sent == {"all-gather": 3 * 2 * 4, "reduce-scatter": 3 * 2}
    assert work.flops == 2 * 2, "what is done beside a collective"


def test_starts_hold_their_operands_as_well():
    text = module(
        """  %x = bf16[4,16]{1,0} parameter(0)
  %start = (bf16[4,16]{1,0}, bf16[16,16]{1,0}) all-gather-start(%x), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %done = bf16[16,16]{1,0} all-gather-done(%start)"""
    )
    assert work_of(text).sent == {"all-gather": 3 * 4 * 16 * 2}


_QUARTER = 6 * 8 * 4 // 4  # bytes


@pytest.mark.parametrize(
    ("name", "send", "size"),
    [
        ("all-reduce", lambda x: lax.psum(x, "d"), 2 * 3 * _QUARTER),
        ("all-gather", lambda x: lax.all_gather(x, "d"), 3 * 4 * _QUARTER),
        ("reduce-scatter", lambda x: lax.psum_scatter(x.T, "d", tiled=True), 3 * _QUARTER),
        ("all-to-all", lambda x: lax.all_to_all(x, "d", 1, 0, tiled=True), 3 * _QUARTER),
        ("collective-permute", lambda x: lax.ppermute(x, "d", [(0, 1), (1, 0)]), 4 * _QUARTER),
    ],
)
def test_what_is_sent(name, send, size):
    """Each of four devices has an array of 192 bytes, and sends three quarters of it once.

    An all-reduce sends them twice. In an all-gather, three parts of four arrays pass each device.
    """
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def step(x):
        def turn(total, row):
            return total + jnp.sum(send(row)), None

        return lax.scan(turn, jnp.float32(0), x)[0][None]

    apart = jax.shard_map(
        step, mesh=mesh, in_specs=P(None, None, "d"), out_specs=P("d"), check_vma=False
    )
    work = work_of(compiled(apart, (5, 6, 32)).as_text())
    assert work.sent == {name: 5 * size}
    np.testing.assert_equal(work.sent_bytes, 5 * size)


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups={{0,1,2},{3},{4},{5}}", 3),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", 4),
        ("replica_groups={}", 8),
        ("replica_groups={{0},{1}}", 1),
    ],
)
def test_what_is_sent_depends_on_how_many_devices_take_part(groups, devices):
    """A device of a ring keeps its own part and passes on each other part once."""
    text = module(
        f"""  %x = f32[840]{{0}} parameter(0)
  ROOT %sum = f32[840]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add"""
    ).replace("is_scheduled=true", "is_scheduled=true, replica_count=1, num_partitions=8")
    part = 840 * 4 // devices
    assert work_of(text).sent.get("all-reduce", 0) == 2 * (devices - 1) * part
    with pytest.raises(NotUnderstood, match="does not list the groups"):
        work_of(text.replace(groups, "replica_groups=elsewhere"))


LAYERS = """  %x = f32[5,7]{1,0} parameter(0)
  %w = f32[7,3]{1,0} parameter(1)
  ROOT %y = f32[5,3]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no HLO at all",
        module(LAYERS).replace("ENTRY", "BEGIN"),
        module(LAYERS.replace("dot(%x, %w)", "dot(%x, %z)")),
        module(LAYERS.replace("dot(%x, %w)", "dot()")),
        module(LAYERS.replace("dims={1}", "dims={5}")),
        module(LAYERS.replace("f32[5,7]{1,0}", "new[5,7]")),
        module(LAYERS.replace("dot(%x, %w)", "dot(%x, %w")),
        module(LAYERS.replace("dot(", "convolution(")),
        module(LAYERS.replace("dot(", "fusion(") + ", calls=%nothing"),
        module(ENTRY, LOOP.replace("LIMIT", "8").replace("ROOT %lt", "%lt")),
        module(ENTRY, LOOP.replace("LIMIT", "8").replace("LT", "NE")),
        module(ENTRY.replace("condition=", "until="), LOOP.replace("LIMIT", "8")),
        module("  ROOT %x = f32[5] call(), to_apply=%main"),
    ],
)
def test_what_is_not_understood_is_one_error(text):
    assert work_of(module(LAYERS)).flops == 2 * 5 * 7 * 3
    with pytest.raises(NotUnderstood):
        work_of(text)
