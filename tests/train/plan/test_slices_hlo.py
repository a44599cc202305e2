"""Traffic between slices, read from HLO, against collectives whose groups are known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.train.plan.test_hlo import compiled, module
from train.plan.clock.groups import COLLECTIVES
from train.plan.clock.read import read_clock
from train.plan.clock.work import NotUnderstood, work_of
from train.plan.hlo.slices import crosses_slices

OUTER, INNER = (0, 0, 0, 0, 1, 1, 1, 1), (0, 1, 0, 1, 0, 1, 0, 1)
MESH = "mesh['data'=2,'fsdp'=4]"
TRANSPOSED = "mesh['fsdp'=4,'data'=2], device_ids=([2,4]T(1,0))"
LISTED = "mesh['data'=2,'fsdp'=4], device_ids=(0,2,4,6,1,3,5,7)"
# Groups as HLO writes them; whether they leave a slice of the outer devices, of the inner ones.
GROUPS = {
    "replica_groups={{0,1,2,3},{4,5,6,7}}": (False, True),
    "replica_groups={{0,4},{1,5},{2,6},{3,7}}": (True, False),
    "replica_groups={{0,2,4,6},{1,3,5,7}}": (True, False),
    "replica_groups={{0,1,2,3,4,5,6,7}}": (True, True),
    "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}": (False, False),
    "replica_groups={}": (True, True),
    "replica_groups=[2,4]<=[8]": (False, True),
    "replica_groups=[4,2]<=[2,4]T(1,0)": (True, False),
    "replica_groups=[2,4]<=[2,2,2]T(1,0,2)": (True, True),
    f"replica_groups={MESH} {{'fsdp'}}": (False, True),
    f"replica_groups={MESH} {{'data'}}": (True, False),
    f"replica_groups={MESH} {{'data','fsdp'}}": (True, True),
    f"replica_groups={MESH} {{'fsdp':(1)2}}": (False, False),
    f"replica_groups={MESH} {{'fsdp':(2)2}}": (False, True),
    f"replica_groups={TRANSPOSED} {{'fsdp'}}": (False, True),
    f"replica_groups={TRANSPOSED} {{'data'}}": (True, False),
    f"replica_groups={TRANSPOSED} {{'fsdp':(1)2}}": (False, False),
    f"replica_groups={LISTED} {{'fsdp'}}": (True, False),
    "source_target_pairs={{0,1},{1,0},{4,5}}": (False, True),
    "source_target_pairs={{0,4},{4,0}}": (True, False),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_groups_of_every_form(groups):
    text = f"(%x), channel_id=3, {groups}, use_global_device_ids=true, to_apply=%add"
    assert (crosses_slices(text, OUTER), crosses_slices(text, INNER)) == GROUPS[groups]
    assert not crosses_slices(text, ()), "the devices are of one slice"


@pytest.mark.parametrize("groups", ["", "replica_groups=rings(8)", "replica_groups={{0,99}}"])
def test_groups_of_an_unknown_form_are_not_guessed(groups):
    text = f"  %x = f32[8]{{0}} parameter(0)\n  ROOT %y = f32[8]{{0}} all-reduce(%x), {groups}"
    with pytest.raises(NotUnderstood):
        work_of(module(text), OUTER)
    known = "  %x = f32[8]{0} parameter(0)\n  ROOT %y = f32[8]{0} all-reduce(%x), "
    known += "replica_groups={{0,1,2,3},{4,5,6,7}}"
    assert work_of(module(known), OUTER).sent == {"all-reduce": 2 * 3 * 8}, "the control"


@pytest.mark.parametrize(
    ("slices", "between"),
    [((0, 0, 1, 1), {"all-reduce": 3 * 96}), ((0, 1, 0, 1), {"all-gather": 3 * 96}), ((), {})],
    ids=["slices outermost", "slices innermost", "one slice"],
)
def test_a_compiled_program(slices, between):
    """Each turn of a loop counts; the axis across slices decides what goes between them.

    Of two devices, each sends its 96 bytes to gather them, and half of its sum twice.
    """
    mesh = jax.make_mesh((2, 2), ("outer", "inner"), axis_types=(AxisType.Auto,) * 2)

    def step(x):
        def turn(total, row):  # [24] of each device
            return total + lax.psum(row, "outer") + lax.all_gather(row, "inner").sum(0), None

        return lax.scan(turn, jnp.zeros(24), x)[0][None]

    axes = ("outer", "inner")
    apart = jax.shard_map(
        step, mesh=mesh, in_specs=P(None, axes), out_specs=P(axes), check_vma=False
    )
    work = work_of(compiled(apart, (3, 96)).as_text(), slices)
    assert work.sent == {"all-gather": 3 * 96, "all-reduce": 3 * 96}
    assert work.between == between


def transfer(kind, sent, received):
    """A sum within a slice, and a transfer to others, as the TPU compiler writes them."""
    attributes = (
        "channel_id=2, is_host_transfer=true, frontend_attributes="
        '{_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_target="{1,2}x{0:3}",'
        f'_xla_megascale_transfer_type="{kind}"}}'
    )
    groups = "replica_groups={{0,1,2,3}}, to_apply=%add"
    return f"""  %x = f32[2,8,128]{{2,1,0:T(8,128)}} parameter(0)
  %near = f32[2,8,128]{{2,1,0:T(8,128)}} all-reduce(%x), {groups}
  %part = f32[{sent}]{{0}} slice(%near)
  %token = token[] after-all()
  %recv = (f32[{received}]{{0}}, u32[], token[]) recv(%token), {attributes}
  %send = (f32[{sent}]{{0}}, u32[], token[]) send(%part, %token), {attributes}
  %sent = token[] send-done(%send), {attributes}
  %got = (f32[{received}]{{0}}, token[]) recv-done(%recv), {attributes}
  ROOT %far = f32[{received}]{{0}} get-tuple-element(%got), index=0"""


@pytest.mark.parametrize(
    ("kind", "received", "between"),
    [
        ("ALL_REDUCE", 512, {"all-reduce": 2048}),
        ("ALL_GATHER", 1024, {"all-gather": 2048}),
        ("REDUCE_SCATTER", 256, {"reduce-scatter": 1024}),
        ("ONE_TO_ONE", 512, {"collective-permute": 2048}),
    ],
)
def test_transfers_between_tpu_slices(kind, received, between):
    """A slice counts as one participant: with two slices, half of a sum goes out twice."""
    slices = (0,) * 4 + (1,) * 4
    work = work_of(module(transfer(kind, 512, received)), slices)
    assert work.between == between
    within = 2 * 3 * 8192 // 4
    assert work.sent["all-reduce"] == within + between.get("all-reduce", 0), "and within a slice"
    with pytest.raises(NotUnderstood, match="slices exchange data by .* gossip"):
        work_of(module(transfer("GOSSIP", 512, 512)), slices)


def test_an_estimate_counts_what_goes_between_slices_and_says_that_it_takes_no_time():
    made, near = (
        read_clock(module(transfer("ALL_REDUCE", 512, 512).replace(*words)), slices=2)
        for words in (("", ""), ("_xla_megascale_transfer_type", "_another"))
    )
    sent = work_of(module(transfer("ALL_REDUCE", 512, 512)), (0,) * 4 + (1,) * 4).sent_bytes
    within = 2 * 3 * 8192 // 4
    assert made.cost(COLLECTIVES).bytes == sent == within + 2048
    assert near.cost(COLLECTIVES).bytes == within, "the control"
    assert made.seconds == near.seconds and made.unknown == {"slice": 1, "send": 1}


def test_what_goes_to_the_host_of_a_device_stays_in_its_slice():
    text = transfer("ALL_REDUCE", 512, 512).replace("_xla_megascale_transfer_type", "_another")
    assert work_of(module(text), OUTER).between == {}
