"""Plans by the TPU's compiler for several slices (extra `tpu`)."""

import itertools
import math

import pytest

from lora_jax.training.mesh import slice_of
from tests.support import thorough
from tests.train.plan.tiny_plans import asked, write
from train.plan import __main__ as plan
from train.plan.clock.work import work_of
from train.plan.compile import optimized_hlo_of, prepare
from train.plan.hlo.slices import slices_in_hlo
from train.plan.machines import find_machine

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.usefixtures("tpu_compiler")]
LAYERS, RANK, CHIPS = 2, 16, 16
# Llama-3.1-8B, of which two layers and few words are enough: each layer sends alike.
OF_8B = {"model_type": "llama", "vocab_size": 2048, "hidden_size": 4096}
OF_8B |= {"intermediate_size": 14336, "num_hidden_layers": LAYERS, "num_attention_heads": 32}
OF_8B |= {"num_key_value_heads": 8, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
KERNELS = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096)}
KERNELS |= {"gate": (4096, 14336), "up": (4096, 14336), "down": (14336, 4096)}


def traffic(folder, *options):
    """The work of a step on two slices of 4×4 chips."""
    words = ("--topology", "2xv5e:4x4", "--batch-size", 2 * CHIPS, "--seq-len", 128, "--rank", RANK)
    words += ("--dtype", "bfloat16", "--targets", "all-linear", "--attention", "dense", "--alone")
    options = asked(write(folder, OF_8B), *words, *options)
    plan.check_options(options)
    job, optim = plan.make_job(options.plan)
    step = prepare(job, plan.variants_to_plan(options)[0], optim)
    compiled = step.lowered.compile()
    mesh = job.layout.mesh
    return mesh, work_of(optimized_hlo_of(compiled, step.lowered, job.machine), slices_in_hlo(mesh))


def test_gradients_of_the_adapter_alone_go_between_slices(tmp_path):
    """Each chip sends the sixteenth that it has of a sum within its slice, and nothing else."""
    mesh, work = traffic(tmp_path)
    assert {axis: n for axis, n in mesh.shape.items() if n > 1} == {"data": 2, "fsdp": 16}
    assert [slice_of(device) for device in mesh.devices.flat] == [0] * 16 + [1] * 16
    sums = 2 * 128 * 4  # of the loss and its weights, a register each
    # Gradients of A are summed in fp32; those of each B in bf16 or fp32, as the compiler chooses.
    totals = {
        LAYERS * RANK * sum(4 * n_in + size * n_out for size, (n_in, n_out) in sized) // CHIPS
        + sums
        for sizes in itertools.product((2, 4), repeat=len(KERNELS))
        if (sized := [*zip(sizes, KERNELS.values(), strict=True)])
    }
    assert set(work.between) == {"all-reduce"} and work.between["all-reduce"] in totals
    kernels = 2 * LAYERS * sum(math.prod(shape) for shape in KERNELS.values())
    passed_on = 15 * kernels // 16  # by each of 16 chips
    assert work.sent["all-gather"] > 2 * passed_on, "forward and backward, within a slice"


@thorough
def test_kernels_go_between_slices_where_their_axis_does(tmp_path):
    """The control."""
    _, work = traffic(tmp_path, "--mesh", "fsdp=32", "--slice-axis", "fsdp")
    kernels = 2 * LAYERS * sum(math.prod(shape) for shape in KERNELS.values())
    half = kernels / CHIPS / 2  # of what a chip has once both slices have exchanged theirs
    assert work.between["all-gather"] >= 2 * half


def test_a_mesh_is_that_of_jax():
    """As `create_hybrid_device_mesh` makes it, of the slices as JAX describes them."""
    from jax.experimental import mesh_utils

    from lora_jax import training

    devices = find_machine("2xv5e:2x4").devices
    for sizes, axis in (
        ({"data": 4, "fsdp": 4}, "data"),
        ({"fsdp": 8, "tensor": 2}, "fsdp"),
        ({"fsdp": 8, "tensor": 2}, "tensor"),
    ):
        mesh = training.make_mesh(devices, slice_axis=axis, **sizes)
        within = [n // 2 if name == axis else n for name, n in mesh.shape.items()]
        between = [2 if name == axis else 1 for name in mesh.axis_names]
        theirs = mesh_utils.create_hybrid_device_mesh(
            within, between, devices, allow_split_physical_axes=True
        )
        assert (mesh.devices == theirs).all()
