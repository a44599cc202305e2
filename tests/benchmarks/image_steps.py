"""Plans steps of LoRA for image models of diffusers, by the compilers of TPUs and GPUs.

    python -m tests.benchmarks.image_steps [CASE …] [--remat full]

Prints a row of a table for each case, such as ``flux-nf4:rtx4090:1``. The modules have no weights,
and the devices need not be there. A row takes some minutes. Needs the extras "diffusion", "tpu" and
"gpu-plan".
"""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import optax
from accelerate import init_empty_weights
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lj
from lora_jax.hf.keys import nest_leaves
from lora_jax.models.specs import BATCH, COLUMNS
from lora_jax.torch.config import TorchConfig
from lora_jax.torch.model import TorchModel
from lora_jax.training import Layout, losses, make_mesh
from train import plan
from train.plan.flops.jaxpr import count_flops
from train.plan.machines import find_machine
from train.plan.user_plan import FunctionPlan

PIXELS = 1024
LATENT = PIXELS // 8  # height and width of latents
RANK = 16
MEMORY_SHARE = 0.95  # of a GPU's memory, that JAX may reserve
ATTENTION = ["to_q", "to_k", "to_v", "to_out/0"]
BOTH_STREAMS = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
TABLE = [(r".*/kernel", COLUMNS)]


class ImageModel(NamedTuple):
    """An image model: its class, the fields of its published configuration, and its text.

    Attributes:
      class_name: its class in diffusers.
      fields: the fields of config.json that differ from the class's defaults.
      text_tokens: number of tokens of a text.
      is_packed: whether its latents are packed as tokens.
    """

    class_name: str
    fields: dict[str, Any]
    text_tokens: int
    is_packed: bool


MODELS = {
    "flux": ImageModel("FluxTransformer2DModel", {"guidance_embeds": True}, 512, True),
    "sd3.5": ImageModel(
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 38,
            "attention_head_dim": 64,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        333,
        False,
    ),
    "qwen": ImageModel("QwenImageTransformer2DModel", {}, 512, True),
}
TOPOLOGIES = ("v5e:4x4", "v6e:2x2", "rtx4090:1", "h100:1")
CASES = [
    f"{name}-{form}:{topology}"
    for topology in TOPOLOGIES
    for name in MODELS
    for form in ("bf16", "nf4")
]


def make_inputs(module: Any, model: ImageModel, batch: int) -> tuple[dict[str, Any], dict]:
    """Returns the abstract arrays of a step, and the other arguments of the module."""

    def bf16(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    config = module.config
    n_tokens = (LATENT // 2) ** 2
    channels = config.in_channels // 4 if model.is_packed else config.in_channels
    arrays: dict[str, Any] = {
        "latents": bf16(batch, channels, LATENT, LATENT),
        "noise": bf16(batch, channels, LATENT, LATENT),
        "time": jax.ShapeDtypeStruct((batch,), jnp.float32),
        "encoder_hidden_states": bf16(batch, model.text_tokens, config.joint_attention_dim),
    }
    others: dict[str, Any] = {"return_dict": False}
    if model.class_name == "QwenImageTransformer2DModel":
        others["img_shapes"] = [[(1, LATENT // 2, LATENT // 2)]] * batch
    else:
        arrays["pooled_projections"] = bf16(batch, config.pooled_projection_dim)
    if model.class_name == "FluxTransformer2DModel":
        arrays["guidance"] = jax.ShapeDtypeStruct((batch,), jnp.float32)
        others["img_ids"] = jnp.zeros((n_tokens, 3))
        others["txt_ids"] = jnp.zeros((model.text_tokens, 3))
    return arrays, others


def make_step(
    fn: TorchModel, model: ImageModel, others: dict[str, Any], layout: Layout
) -> tuple[Callable[..., Any], Any]:
    """Returns a step of flow matching, and its optimizer."""
    schedule = losses.FlowSchedule(shift=3.0)
    optimizer = optax.adamw(1e-4)

    def loss_of(adapter: Any, base: Any, arrays: dict[str, Any]) -> jax.Array:
        inputs = dict(arrays)
        latents, noise, time = (inputs.pop(name) for name in ("latents", "noise", "time"))
        noisy = schedule.add_noise(latents, noise, time)
        inputs["hidden_states"] = losses.pack_latents(noisy) if model.is_packed else noisy
        inputs["timestep"] = time if model.is_packed else 1000 * time
        prediction = lj.adapt(fn)(lj.join(adapter, base), **inputs, **others)[0]
        if model.is_packed:
            prediction = losses.unpack_latents(prediction, LATENT, LATENT)
        return losses.flow_loss(prediction, latents, noise, time, schedule).mean()

    def step(adapter: Any, state: Any, base: Any, arrays: dict[str, Any]) -> Any:
        loss, gradient = jax.value_and_grad(loss_of)(adapter, base, arrays)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    return step, optimizer


class CasePlan(NamedTuple):
    """The plan of a case.

    Attributes:
      plan: the plan of the step.
      flops: FLOPs of a step that recomputes nothing, with dense attention, on all devices.
    """

    plan: FunctionPlan
    flops: float


def plan_case(case: str, remat: bool | str, images_per_device: int) -> CasePlan:
    """Returns the plan of a case."""
    subject, _, topology = case.partition(":")
    name, _, form = subject.rpartition("-")
    model = MODELS[name]
    with init_empty_weights(include_buffers=False):
        module = getattr(diffusers, model.class_name).from_config(model.fields)
    is_tpu = topology.startswith("v")
    machine = find_machine(topology, None, None, None if is_tpu else MEMORY_SHARE)
    batch = images_per_device * len(machine.devices)
    mesh = make_mesh(machine.devices, fsdp=len(machine.devices))
    layout = Layout(mesh, TABLE, collective_matmul="whole")
    config = TorchConfig("", module=module)
    fn = TorchModel(config, jnp.bfloat16, jnp.bfloat16, remat, placement=layout)
    params = nest_leaves(
        (row.path, jax.ShapeDtypeStruct(row.stacked_shape, jnp.bfloat16))
        for row in config.key_rows()
    )
    if form == "nf4":
        params = lj.quantized.quantize(params, "nf4")
    rules = [lj.LoraRule(targets=BOTH_STREAMS, rank=RANK)]
    tree = jax.eval_shape(lambda params: lj.lorafy(params, rules), params)
    adapter, base = lj.split(tree)
    _, base_shardings = lj.split(lj.sharding.shardings(tree, TABLE, layout.mesh))
    arrays, others = make_inputs(module, model, batch)
    step, optimizer = make_step(fn, model, others, layout)
    state = jax.eval_shape(optimizer.init, adapter)
    whole = layout.whole
    plain_step, _ = make_step(fn.clone(remat=False, attention="dense"), model, others, layout)
    with jax.set_mesh(layout.mesh):
        plain_program = jax.make_jaxpr(plain_step)(adapter, state, base, arrays)
    made = plan.function(
        step,
        adapter,
        state,
        base,
        arrays,
        topology=topology,
        machine=machine,
        mesh=layout.mesh,
        shardings=(whole, whole, base_shardings, NamedSharding(layout.mesh, P(BATCH))),
        out_shardings=(whole, whole, whole),
        donate=(0, 1),
        compiler_options=layout.compiler_options,
    )
    return CasePlan(made, count_flops(plain_program.jaxpr).flops)


def table_row(case: str, options: argparse.Namespace, case_plan: CasePlan) -> str:
    """Returns a row of the table: memory in GiB, TFLOP, ms, MFU, and the largest groups."""
    made, flops = case_plan
    memory = made.memory
    total = memory.get("total")
    cells = [case, options.remat, str(options.images)]
    for use in ("arguments", "temporaries", "total", "capacity"):
        size = memory.get(use)
        cells.append("–" if size is None else f"{size / 2**30:.2f}")
    cells.append("–" if total is None else f"{total / memory['capacity']:.3f}")
    cells.append(f"{flops / 1e12:,.0f}")
    clock = made.clock
    if clock is None or clock.seconds is None:
        cells += ["–", "–", ""]
    else:
        by_group: dict[str, float] = {}
        for group in clock.groups:
            by_group[group.group] = by_group.get(group.group, 0.0) + group.seconds
        largest = sorted(by_group.items(), key=lambda item: -item[1])
        mfu = flops / (len(made.machine.devices) * made.machine.flops * clock.seconds)
        groups = ", ".join(f"{group} {1e3 * seconds:,.0f}" for group, seconds in largest)
        cells += [f"{1e3 * clock.seconds:,.0f}", f"{100 * mfu:.1f} %", groups]
    return f"| {' | '.join(cells)} |"


def main(args: Sequence[str] | None = None) -> None:
    """Prints a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--images", type=int, default=1, help="images of a device")
    parser.add_argument("--json", default=None)
    options = parser.parse_args(args)
    jax.config.update("jax_platforms", "cpu")
    for case in options.cases:
        remat = True if options.remat == "full" else options.remat
        case_plan = plan_case(case, remat, options.images)
        made = case_plan.plan
        print(table_row(case, options, case_plan), flush=True)
        if made.refused or made.failed:
            print(made.refused or made.failed, made.largest_arrays, flush=True)
        if options.json:
            with open(options.json, "a", encoding="utf-8") as file:
                file.write(json.dumps({"case": case} | made.as_json(), default=str) + "\n")


if __name__ == "__main__":
    main()
