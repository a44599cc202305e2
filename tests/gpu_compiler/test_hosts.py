"""Traffic within and between hosts of GPUs, as NVIDIA's compiler lays it out (extra `gpu-plan`)."""

import itertools

import jax
import pytest

from tests.gpu_compiler.steps import compiled
from train.plan.clock.work import work_of
from train.plan.hlo.slices import slices_in_hlo

pytestmark = pytest.mark.gpu_compiler


def test_gradients_alone_go_between_hosts() -> None:
    step = compiled("dense", "h100:2x2", "--batch-size", 4, "--seq-len", 512)
    sizes = {axis: n for axis, n in step.job.layout.mesh.shape.items() if n > 1}
    assert sizes == {"data": 2, "fsdp": 2}, "by default"
    hosts = slices_in_hlo(step.job.layout.mesh)
    assert hosts == (0, 0, 1, 1)
    work = work_of(step.text, hosts)
    leaves = itertools.chain.from_iterable(
        ((4, parts["a"]), (2, parts["b"])) for parts in step.prepared.state.adapter.values()
    )
    gradients = sum(size * leaf.size for size, leaf in leaves)  # of B, they are summed in bf16
    sums = 4 * len(jax.tree.leaves(step.prepared.state.adapter)) + 1024
    assert set(work.between) == {"all-reduce"}
    # A device sends its part of a sum once where two take part, and 1.5 times where four do.
    most = 1.5 * (gradients + sums)
    assert gradients / 2 <= work.between["all-reduce"] <= most, "whole, or a half each"
    mixed = work_of(step.text, (0, 1, 0, 1))
    assert mixed.sent == work.sent
    # Of an array that two devices gather, each sends half.
    assert sum(mixed.between.values()) > 10 * sum(work.between.values()), "the control"
