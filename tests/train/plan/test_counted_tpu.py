"""Policies of --remat for some layers, compiled by the TPU's compiler (extra `tpu`)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax.models.layers import trunk
from tests.train.plan.test_slices_tpu import OF_8B
from tests.train.plan.tiny_plans import asked, write
from train.plan import __main__ as plan
from train.plan.compile import prepare

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.usefixtures("tpu_compiler")]
# Instructions that copy nothing: they name an array that is there.
FREE = {"parameter", "get-tuple-element", "bitcast", "opt-barrier"}


def compiled(folder, remat, *options):
    """A step of four layers of Llama-3.1-8B on four chips."""
    words = ("--topology", "v5e:2x2", "--mesh", "fsdp=4", "--batch-size", 4, "--seq-len", 256)
    words += ("--dtype", "bfloat16", "--attention", "dense", "--alone", "--remat", remat)
    options = asked(write(folder, OF_8B | {"num_hidden_layers": 4}), *words, *options)
    job, optim = plan.make_job(options.plan)
    return prepare(job, plan.variants_to_plan(options)[0], optim).lowered.compile()


def copies_of_stacks(hlo, dtype="bf16"):
    """The instructions that write two or more layers of a kernel of an MLP, or of a chip's part."""
    written = []
    for line in hlo.splitlines():
        result = re.search(rf" = {dtype}\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if result and result[2] not in FREE:
            shape = [int(size) for size in result[1].split(",")]
            parts = {4096 * 14336 // 4, 4096 * 14336}
            if shape[0] in (2, 3, 4) and int(np.prod(shape[1:])) in parts:
                written.append(line.strip()[:160])
    return written


def scan_slices(layer, stacks, layer_indices, x, inputs, axes):
    """As `trunk._scan_indices`, but for slices of the stacks."""

    def sliced(tree):
        return jax.tree.map(lambda leaf: leaf[layer_indices.start : layer_indices.stop], tree)

    def run_layer(x, xs):
        params, *arguments = xs
        return layer.apply({"params": params}, x, inputs[0], *arguments)

    policy = trunk.remat_policy(layer.remat)
    run_layer = jax.checkpoint(run_layer, policy=policy, prevent_cse=False)
    return lax.scan(run_layer, x, (sliced(stacks), *map(sliced, inputs[1:])))


def test_stacks_of_kernels_are_read_where_they_are(tmp_path, monkeypatch):
    """With kernels that no adapter has, too; a step takes what two layers keep, and no copies."""
    targets = ("--targets", "q_proj", "down_proj")
    steps = {remat: compiled(tmp_path, remat, *targets) for remat in ("projections", "products:2")}
    for step in steps.values():
        assert not copies_of_stacks(step.as_text())
    least, some = (step.memory_analysis().temp_size_in_bytes for step in steps.values())
    gate_and_up = 2 * 256 * 2 * 14336 * jnp.bfloat16.dtype.itemsize  # of two layers
    assert 0 < some - least < 2 * gate_and_up
    monkeypatch.setattr(trunk, "_scan_indices", scan_slices)
    sliced = compiled(tmp_path, "products:2", *targets)
    assert len(copies_of_stacks(sliced.as_text())) >= 3, "the control"
    assert sliced.memory_analysis().temp_size_in_bytes > some + 3 * 2 * 4096 * 14336 * 2 // 4
