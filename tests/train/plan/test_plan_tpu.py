"""Plans by the TPU's compiler for slices that are not here (extra `tpu`)."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from lora_jax.training.mesh import make_mesh
from tests.support import thorough
from tests.train.plan.closed_form import plan_flops
from train.plan import __main__ as planning
from train.plan.clock.work import work_of
from train.plan.compile import optimized_hlo_of
from train.plan.flops.checked import hlo_text_of
from train.plan.machines import find_machine, topology_of_devices

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.tpu_compiler
GIB = 2**30

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
LLAMA_3 = LLAMA | {"vocab_size": 128256, "num_key_value_heads": 8}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
SMALL = LLAMA | {"vocab_size": 2048, "num_hidden_layers": 4, "intermediate_size": 14336}
FP8 = {"quant_method": "fp8", "fmt": "e4m3"}
SIZES = {"blocks": {"weight_block_size": [128, 128]}, "one scale": {"weight_block_size": None}}
MODELS = {
    "7b": LLAMA,
    "8b": LLAMA_3 | {"intermediate_size": 14336, "max_position_embeddings": 131072},
    "70b": LLAMA_3
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "405b": LLAMA_3
    | {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
    **{
        f"fp8, {name}, {inner}": SMALL
        | {"intermediate_size": inner, "quantization_config": FP8 | size}
        for name, size in SIZES.items()
        for inner in (14336, 14400)
    },
    "8x7b": MIXTRAL,
    "small 8x7b": MIXTRAL
    | {
        "vocab_size": 2048,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
}


@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_devices_are_known_by_the_name_of_their_topology(name):
    pytest.importorskip("libtpu")
    assert topology_of_devices(find_machine(name).devices) == name


def test_a_mesh_may_split_an_axis_of_a_slice():
    """8 x 8 devices of 4 x 4 x 4, in each of which all devices are once."""
    pytest.importorskip("libtpu")
    devices = find_machine("v5p:4x4x4").devices
    mesh = make_mesh(devices, expert=8, fsdp=8)
    assert (mesh.shape["expert"], mesh.shape["fsdp"]) == (8, 8)
    assert {d.id for d in mesh.devices.flat} == {d.id for d in devices}
    with pytest.raises(NotImplementedError):
        jax.make_mesh((8, 8), ("expert", "fsdp"), devices=devices)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Plans with rows of 2048 tokens, in processes of their own."""
    pytest.importorskip("libtpu")
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def plan(model, *options, program=("-m", "train.plan")):
        path = folder / f"{model}.json"
        path.write_text(json.dumps(MODELS[model]))
        words = ["--model", path, "--alone", "--json", *options]
        words += [] if "--seq-len" in options else ["--seq-len", 2048]
        done = subprocess.run(
            [sys.executable, *program, *map(str, words)],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
            capture_output=True,
            text=True,
            timeout=1500,  # a loaded machine compiles slowly
        )
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        asked = planning.parse(list(map(str, words)))
        job, _ = planning.make_job(asked.plan)
        made["by_hand"] = plan_flops(job, planning.variants_to_plan(asked)[0])
        sizes = {
            name: size and round(size / GIB, 2) for name, size in made["per_chip_bytes"].items()
        }
        print(model, options, sizes, made["compile_seconds"])
        return made

    return plan


OF_7B = ("--topology", "v5e:4x4", "--mesh", "fsdp=16", "--batch-size", 16)


@thorough
def test_llama_2_7b(plan):
    made = plan("7b", *OF_7B, "--rank", 8)
    assert made["fits"] and made["per_chip_bytes"]["total"] <= 4.0 * GIB
    assert made["per_chip_bytes"]["capacity"] == 15.75 * GIB
    np.testing.assert_allclose(made["flops_per_step"], made["by_hand"], rtol=0.02)


@thorough
def test_llama_2_7b_in_full(plan):
    made, lora = plan("7b", *OF_7B, "--full"), plan("7b", *OF_7B, "--rank", 8)
    assert made["fits"]
    assert made["per_chip_bytes"]["total"] > 2.5 * lora["per_chip_bytes"]["total"]
    np.testing.assert_allclose(made["flops_per_step"], made["by_hand"], rtol=0.02)


@pytest.mark.parametrize(
    ("topology", "chips"),
    [
        ("v5e:2x2", 4),
        pytest.param("v5e:2x4", 8, marks=thorough),
        pytest.param("v5e:4x4", 16, marks=thorough),
    ],
)
def test_a_long_row_over_all_chips(topology, chips, plan):
    """Neither the scores nor the base are in the way: a chip has its share of both."""
    options = ("--topology", topology, "--mesh", f"sequence={chips}", "--batch-size", 1)
    made = plan("8b", *options, "--seq-len", 8192 * chips, "--rank", 16)
    assert made["fits"] and made["per_chip_bytes"]["total"] <= (6 + 16 / chips) * GIB
    assert made["per_chip_bytes"]["base"] <= 16 / chips * GIB
    np.testing.assert_allclose(made["flops_per_step"], made["by_hand"], rtol=0.02)


@thorough
def test_what_does_not_fit_is_told(plan):
    made = plan("7b", *OF_7B, "--remat", "none", "--attention", "dense")
    assert not made["fits"] and "exceeds available HBM (15.75G)" in made["refused"]
    assert made["per_chip_bytes"]["total"] > 30 * GIB


@thorough
@pytest.mark.parametrize(
    ("model", "options", "base"),
    [
        ("8b", ("--topology", "v5e:1x1", "--batch-size", 1), 5.7),
        ("70b", ("--topology", "v5e:2x4", "--batch-size", 8), 5.1),
    ],
)
def test_a_base_in_4_bits_fits_where_bf16_does_not(model, options, base, plan):
    made = plan(model, *options, "--rank", 16, "--quantize", "nf4")
    assert made["fits"] and made["per_chip_bytes"]["base"] <= base * GIB
    np.testing.assert_allclose(made["flops_per_step"], made["by_hand"], rtol=0.02)
    control = plan(model, *options, "--rank", 16)
    assert not control["fits"] and "exceeds available HBM (15.75G)" in control["refused"]


@thorough
@pytest.mark.parametrize(("inner", "times"), [(14336, 1.5), (14400, 2)], ids=["whole", "partial"])
def test_blocks_of_fp8_take_no_more_memory_than_one_scale(inner, times, plan):
    """An array of scales with a kernel's shape would double it. Kernels take their files' bytes."""
    options = ("--topology", "v5e:1x1", "--batch-size", 1, "--rank", 16, "--attention", "dense")
    blocks, scale = (
        plan(f"fp8, {name}, {inner}", *options, "--seq-len", 256)["per_chip_bytes"]
        for name in SIZES
    )
    kernels = 4 * (4 * 4096**2 + 3 * 4096 * inner)
    others = 2 * 2 * 2048 * 4096 + 2 * 9 * 4096  # of the tables and norms, in bf16
    assert kernels + others < blocks["base"] <= 1.01 * (kernels + others)
    assert 0 < blocks["temporaries"] <= times * scale["temporaries"]


@thorough
def test_llama_3_405b(plan):
    options = ("--topology", "v5e:16x16", "--mesh", "fsdp=16,tensor=16", "--batch-size", 64)
    made = plan("405b", *options, "--rank", 16)
    assert made["fits"] and made["per_chip_bytes"]["total"] <= 15.75 * GIB


OF_8X7B = ("--topology", "v5e:4x8", "--batch-size", 32, "--rank", 8)


@thorough
def test_mixtral_8x7b(plan):
    made = plan("8x7b", *OF_8X7B)
    assert made["fits"]
    assert made["flops_per_step"] <= 1.2 * made["by_hand"]


WITHOUT_OPTIONS = """
from lora_jax.training import layout
from train.plan import __main__ as plan
layout.compiler_options = lambda platform: {}
plan.main()
"""


@thorough
def test_a_token_costs_its_experts_and_no_more(plan):
    """By ragged products, which are kernels, and are not without the compiler's option."""
    options = ("--topology", "v5e:2x2", "--batch-size", 4, "--rank", 8)
    made = plan("small 8x7b", *options)
    assert "ragged products (rows, groups)" in made["kernels"]
    assert made["flops_per_step"] <= 1.2 * made["by_hand"]
    np.testing.assert_allclose(made["flops_per_step"], made["flops_traced"], rtol=0.02)
    masked = plan("small 8x7b", *options, program=("-c", WITHOUT_OPTIONS))
    assert not any("ragged" in kernel for kernel in masked["kernels"])
    assert masked["flops_per_step"] > 3 * made["flops_per_step"], "the control"


@pytest.mark.usefixtures("tpu_compiler")
def test_the_hlo_of_a_look_up_on_sparse_cores(monkeypatch):
    """JAX 0.10's XLA cannot write it; then it is that of the same program on the other cores."""
    machine = find_machine("v5p:2x2x1")
    here = SingleDeviceSharding(machine.devices[0])
    shapes = [((32000, 512), jnp.bfloat16), ((8192,), jnp.int32), ((512, 128), jnp.bfloat16)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in shapes]
    lowered = jax.jit(lambda table, rows, kernel: table[rows] @ kernel).lower(*arrays)
    compiled = lowered.compile()
    assert (hlo_text_of(compiled) is None) == (jax.__version_info__ < (0, 11))
    unwritten = lambda program: None if program is compiled else hlo_text_of(program)  # noqa: E731
    monkeypatch.setattr("train.plan.compile.hlo_text_of", unwritten)
    work = work_of(optimized_hlo_of(compiled, lowered, machine))
    assert work.flops == 2 * 8192 * 512 * 128
