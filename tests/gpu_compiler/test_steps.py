"""Training steps as NVIDIA's compiler compiles them, without a GPU (extra `gpu-plan`)."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models import Encoder, EncoderConfig, read_config
from lora_jax.models.families import module_of
from lora_jax.models.layers.attend import choose_implementation, implementation
from lora_jax.models.layers.attention import AttentionCall
from lora_jax.models.layers.kernels import flash_call
from lora_jax.models.layers.kernels.flash import Flash
from lora_jax.models.layers.placement import OLD_GPU, platform_of
from lora_jax.models.sampling.choice import Sampling
from lora_jax.models.sampling.loop import Decoding, decode, prefill
from lora_jax.models.sampling.prompts import Prompts
from tests.gpu_compiler.steps import DENSE, Step, bytes_of, compiled
from tests.support import thorough
from tests.train.plan.closed_form import batch_flops
from train.options.common import AdapterConfig
from train.plan.clock.work import work_of
from train.plan.flops.checked import count_traced
from train.plan.hlo.kernels import kernel_lines
from train.plan.job import PlanVariant
from train.plan.machines import find_machine

pytestmark = pytest.mark.gpu_compiler
FLASH = ("flash attention (fwd, dq, dkv)",)
# Each compilation serves all tests that it can.
SHORT = ("dense", "h100:1", "--batch-size", 1, "--seq-len", 2048)
LONG = ("dense", "h100:1", "--batch-size", 1, "--seq-len", 8192)
EIGHT = ("dense", "h100:8", "--batch-size", 8, "--seq-len", 1024, "--mesh", "fsdp=4,tensor=2")


def kernels(step: Step) -> tuple[str, ...]:
    return kernel_lines(work_of(step.text).kernels)


def squares(step: Step, seq: int) -> list[tuple[int, ...]]:
    """The floating arrays with scores of every query and key."""
    return [shape for shape in step.floats if shape.count(seq) > 1]


@pytest.mark.parametrize(
    ("card", "model"),
    [
        ("h100", "dense"),
        pytest.param("a100-80gb", "dense", marks=thorough),
        ("rtx4090", "dense"),
        pytest.param("b200", "dense", marks=thorough),
        ("h100", "windows"),
    ],
)
def test_long_rows_run_in_the_kernel(card: str, model: str) -> None:
    step = compiled(model, f"{card}:1", "--batch-size", 1, "--seq-len", 2048)
    assert kernels(step) == FLASH and str(step.job.attention_choice) == "flash"
    assert not squares(step, 2048)


def test_a_plan_says_what_has_the_kernel(monkeypatch: Any) -> None:
    step = compiled("dense", "rtx4090:1", "--batch-size", 1, "--seq-len", 2048)
    monkeypatch.setattr(flash_call, "find_spec", lambda name: None)
    flash_call.missing_compiler.cache_clear()
    chosen = str(step.job.attention_choice)
    flash_call.missing_compiler.cache_clear()
    assert chosen.startswith("blockwise (flash: jax-triton") and "lora_jax[gpu-kernels]" in chosen


def test_dense_attention_is_the_control() -> None:
    step = compiled("dense", "h100:1", "--batch-size", 1, "--seq-len", 2048, "--attention", "dense")
    assert not kernels(step) and squares(step, 2048)
    short = compiled("dense", "h100:1", "--batch-size", 1, "--seq-len", 512, "--attention", "dense")
    assert step.memory.temp_size_in_bytes > 5 * short.memory.temp_size_in_bytes


def test_memory_is_linear_in_the_length() -> None:
    short, long = compiled(*SHORT), compiled(*LONG)
    assert long.memory.temp_size_in_bytes <= 4.4 * short.memory.temp_size_in_bytes
    assert not squares(long, 8192)


def test_a_card_before_ampere_has_no_kernel() -> None:
    """Neither Triton's products nor ours are compiled for it: 'auto' takes blocks."""
    (device,) = find_machine("t4:1").devices
    assert platform_of(device) == OLD_GPU
    call = AttentionCall(queries=2048, head_dim=64, dtype=jnp.bfloat16)
    assert str(choose_implementation("auto", call, 2048, OLD_GPU)) == "blockwise"
    with pytest.raises(ValueError, match="runs only on a gpu, but the model is.* for a gpu before"):
        implementation("flash", 2048, OLD_GPU)


@pytest.mark.parametrize("words", [SHORT, EIGHT], ids=["h100:1", "h100:8"])
def test_what_is_held_is_what_a_count_by_hand_says(words: tuple[Any, ...]) -> None:
    step = compiled(*words)
    made = step.prepared
    held = sum(map(bytes_of, (made.state, made.base, made.batch)))
    assert step.memory.argument_size_in_bytes == held
    donated = bytes_of((made.state.adapter, made.state.opt_state))
    assert donated <= step.memory.alias_size_in_bytes <= step.memory.output_size_in_bytes


@pytest.mark.parametrize("words", [SHORT, EIGHT], ids=["h100:1", "h100:8"])
def test_flops_as_traced_are_those_of_the_closed_form(words: tuple[Any, ...]) -> None:
    step = compiled(*words)
    counted = count_traced(step.prepared.traced.jaxpr)
    variant = PlanVariant(AdapterConfig(targets="all-linear", rank=8), "full")
    by_hand = batch_flops(step.job, variant, step.prepared.params)
    assert counted is not None and counted.exact
    assert counted.flops == pytest.approx(by_hand, rel=0.01)


def test_collectives_of_eight() -> None:
    """Kernels are gathered and gradients scattered; one device sends nothing."""
    eight = compiled(*EIGHT)
    sent = work_of(eight.text).sent
    assert sent["all-gather"] > sent["all-reduce"] > 0
    assert kernels(eight) == FLASH
    assert not work_of(compiled(*SHORT).text).sent


def test_codes_stay_codes() -> None:
    """4 bits a weight, and 16 of a scale for 64; no float array of all layers' kernels."""
    plain, coded = compiled(*SHORT), compiled(*SHORT, "--quantize", "nf4")
    stacked = {(3, 256, 896), (3, 896, 256), (3, 256, 256)}
    assert plain.floats >= stacked, "the control"
    assert not coded.floats & stacked
    weights = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 896)
    saved = bytes_of(plain.prepared.base) - bytes_of(coded.prepared.base)
    assert weights * (2 - 0.5 - 4 / 64) <= saved <= weights * (2 - 0.5 - 2 / 64)


def test_the_layers_inputs_go_to_the_host() -> None:
    """With "offload" no stack of them is on the device, and MLPs are never there whole."""
    here, away = (compiled(*LONG, "--remat", how) for how in ("full", "offload"))
    stack = re.compile(r"bf16\[3,1,8192,256\]\{[^}]*\}")
    assert any("S(5)" not in found for found in stack.findall(here.text)), "the control"
    assert all("S(5)" in found for found in stack.findall(away.text))
    assert away.memory.host_temp_size_in_bytes == 3 * 8192 * 256 * 2
    assert here.memory.host_temp_size_in_bytes == 0
    assert not {shape for shape in here.floats if 8192 in shape and 896 in shape}


def test_experts_in_codes_are_formed_one_at_a_time() -> None:
    options = ("--batch-size", 1, "--seq-len", 1024, "--quantize")
    plain, coded = (compiled("mixture", "h100:1", *options, how) for how in ("none", "nf4"))
    assert kernels(coded) == FLASH
    layer = {(8, 256, 896), (8, 896, 256)}
    assert plain.floats >= layer, "the control"
    assert not {shape for shape in coded.floats if shape[-3:] in layer}


def test_codes_of_experts_are_not_copied() -> None:
    step = compiled("experts in mxfp4", "l4:1", "--batch-size", 1, "--seq-len", 512)
    stacks = [(3, 16, 256, 384), (3, 16, 192, 256)]

    def copies(text: str) -> list[str]:
        found = re.findall(r"= s4\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
        return [s for s in found if sorted(map(int, s.split(","))) in map(sorted, stacks)]

    assert not copies(step.text) and "s4[3,16,256,384]" in step.text
    packed = {"xla_gpu_experimental_pack_dot_operands_along_k_dimension": "True"}
    control = step.prepared.lowered.compile(compiler_options=packed)
    assert copies(control.as_text())


def test_adapters_side_by_side() -> None:
    step = compiled("dense", "h100:1", "--batch-size", 4, "--seq-len", 1536, "--adapters", 4)
    assert kernels(step) == FLASH and not squares(step, 1536)


def lowered(run: Any, *trees: Any) -> Any:
    """Lowers a function for one GPU, whose kind JAX reads from the mesh."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.Mesh(np.array(find_machine("h100:1").devices), ("x",), axis_types=auto)
    where = jax.NamedSharding(mesh, jax.P())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), trees)
    with jax.set_mesh(mesh):
        return run.lower(*placed)


def test_decoding_writes_its_cache_in_place() -> None:
    """A loop of one program, which copies neither the cache nor a kernel."""
    config = read_config(DENSE)
    model = module_of(config, jnp.bfloat16, jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    adapted = jax.eval_shape(
        lambda tree: lj.lorafy(tree, [lj.LoraRule(targets="all-linear", rank=8)]), params
    )
    apply = lj.adapt(model.apply)
    ids, mask = jax.ShapeDtypeStruct((2, 40), jnp.int32), jax.ShapeDtypeStruct((2, 40), bool)
    number = jax.ShapeDtypeStruct((), jnp.float32)
    whole = jax.ShapeDtypeStruct((), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    eos = jax.ShapeDtypeStruct((1,), jnp.int32)
    choice = Decoding(Sampling(number, number, whole, key), eos, whole)
    how = {"model": model, "apply": apply}
    state = jax.eval_shape(
        lambda *args: prefill(*args, cache_len=300, n=200, **how),
        adapted,
        Prompts(ids, mask),
        choice,
    )
    run = jax.jit(lambda *args: decode(*args, 200, **how), donate_argnums=1)
    made = lowered(run, adapted, state, choice).compile()
    text = made.as_text()
    cache = (3, 2, 2, 300, 64)
    sizes = [",".join(map(str, shape)) for shape in (cache, (256, 896), (3, 256, 896))]
    copies = [size for size in sizes if re.search(rf"= bf16\[{size}\]\S* copy\(", text)]
    assert f"bf16[{sizes[0]}]" in text and not copies
    assert made.memory_analysis().alias_size_in_bytes >= 2 * math.prod(cache) * 2


def test_an_encoder_sees_both_sides() -> None:
    fields = {"model_type": "bert", "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "intermediate_size": 896, "max_position_embeddings": 2048}
    config = read_config(fields | {"type_vocab_size": 2})
    assert isinstance(config, EncoderConfig)
    model = Encoder(config, jnp.bfloat16, attention=Flash())
    ids = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    adapted = jax.eval_shape(
        lambda tree: lj.lorafy(tree, [lj.LoraRule(targets="all-linear", rank=8)]), params
    )
    adapter, base = lj.split(adapted)
    run = lj.adapt(model.apply)

    def loss(adapter: Any, base: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        out = run({"params": lj.join(adapter, base)}, ids, attention_mask=mask)
        return jnp.mean(out.hidden.astype(jnp.float32) ** 2)

    text = lowered(jax.jit(jax.grad(loss)), adapter, base, ids, ids).compile().as_text()
    assert kernel_lines(work_of(text).kernels) == FLASH
    assert not re.search(r"2048,2048\]", text)


@pytest.mark.parametrize("task", [pytest.param("dpo", marks=thorough), "grpo"])
def test_what_is_scored_between_steps_runs_in_the_kernel(task: str) -> None:
    """And takes less memory than a step; the sampler has its prompts' attention by blocks."""
    more = ("--group", 2, "--max-new-tokens", 256) if task == "grpo" else ()
    options = ("--batch-size", 2, "--seq-len", 1024, "--task", task, *more)
    step = compiled("dense", "rtx4090:1", *options)
    assert kernels(step) == FLASH
    for name, program in step.prepared.between.items():
        made = program.lowered.compile()
        of_kernels = kernel_lines(work_of(made.as_text()).kernels) if program.runs_per_step else ()
        assert of_kernels == (() if name == "sampler" else ("flash attention (fwd)",))
        assert 0 < made.memory_analysis().temp_size_in_bytes < step.memory.temp_size_in_bytes
