"""Compiles one variant of training for a machine, and reads what it needs."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax.bank.together.stacked import traced_step
from lora_jax.models.attention import chosen_attention
from lora_jax.models.families import module_of
from lora_jax.models.layers.attend import Chosen
from lora_jax.sharding import shardings
from lora_jax.training.layout import Layout
from lora_jax.training.losses import number_of_chunks, token_loss
from lora_jax.training.setup import Setup
from lora_jax.training.step import State
from train.adapters.source import find_adapter
from train.console.errors import UserError, as_user_errors
from train.options.common import AdapterConfig, OptimConfig
from train.options.conditions import NO_ADAPTER
from train.options.optim import make_optimizer, make_schedule, make_tenant
from train.plan.flops import step_flops
from train.plan.machines import Machine
from train.plan.plan_flops import count_traced, step_work
from train.plan.refusals import of_refusal, reason_of
from train.run.pretrained import Outline
from train.run.report import compiled_bytes, tree_bytes
from train.run.rules import rules

_REMAT = {"none": "no remat", "full": "remat", "dots_saveable": "remat but products"}
_REMAT |= {"offload": "remat to the host", "dots_with_no_batch_dims_saveable": "remat but dense"}
_STEPS, _RATE = 1000, 1e-4  # of the schedule; a plan takes no step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The model, machine and batch of a plan; the same for all variants.

    Attributes:
      outline: the model, without its weights.
      layout: the placement of weights and activations on the mesh.
      machine: the devices to compile for.
      batch_size: sequences in memory at once, on all devices.
      grad_accum: batches per step.
      seq_len: tokens per sequence; the loss counts them all.
      loss_chunk: predictions whose logits are in memory at once; 0 for all.
      dtype: the dtype of the base and its activations; trained parameters are fp32.
      attention, experts: the implementations of attention and of experts, by name.
    """

    outline: Outline
    layout: Layout
    machine: Machine
    batch_size: int
    grad_accum: int
    seq_len: int
    loss_chunk: int
    dtype: str
    attention: str = "auto"
    experts: str = "auto"

    @property
    def chosen(self) -> Chosen:
        """Returns the implementation of attention that will run, and why.

        Raises:
          UserError: the one that was asked for does not run on this machine.
        """
        with as_user_errors(ValueError):
            return chosen_attention(
                self.outline.config,
                self.seq_len,
                dtype=self.dtype,
                attention=self.attention,
                platform=self.layout.platform,
                split=self.layout.split(self.seq_len),
            )


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of training.

    Attributes:
      adapter: the parameters that train.
      remat: the activations to recompute.
      adapters: the number of adapters that train side by side; None for one run.
    """

    adapter: AdapterConfig
    remat: str
    adapters: int | None = None

    @property
    def name(self) -> str:
        """The variant in words, for tables."""
        if self.adapter.full:
            what = "full fine-tuning"
        elif self.adapter.peft_config:
            what = "the PEFT configuration"
        elif self.adapter.targets == NO_ADAPTER:
            what = "no adapter, parts in full"
        else:
            alone = (variant.name for variant in self.adapter.variants if variant.alone)
            kind = next(alone, "LoRA")
            what = f"{kind} r={self.adapter.rank}"
        if self.adapters is not None:
            what = f"{self.adapters} × {what}"
        return f"{what}, {_REMAT.get(self.remat, self.remat)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The resources that one variant needs; None for what is not known.

    Attributes:
      name: the variant in words.
      fits: whether the step compiles within the first share of a device's memory.
      fits_share: each share of the memory -> whether the step compiles within it.
      refused: the compiler's message if it refused the step.
      per_chip_bytes: memory of one device: base (frozen), adapter (trained), optimizer,
        temporaries, other (the batch, padding, the program), total, capacity; and host, the memory
        of its host that it needs (`--remat offload`).
      flops_per_step, flops_per_chip: FLOPs of matrix products, on all devices and on one.
      flops_source: their source: "hlo" (the optimised HLO) or "jaxpr" (the step as traced, if the
        HLO is not understood); see `train.plan.plan_flops`.
      flops_traced: FLOPs of a step counted in its jaxpr, on all devices.
      flops_closed_form: FLOPs of a step in closed form; see `train.plan.flops`.
      collective_bytes: bytes that a device sends or receives in a step, by kind of collective.
      kernels: the kernels in the compiled step, in words; see `train.plan.kernels`.
      adapter_bytes, checkpoint_bytes: size on disk.
      compile_seconds: time of the compilation.
      notes: remarks on the FLOPs, in sentences.
    """

    name: str
    fits: bool
    fits_share: dict[str, bool]
    refused: str | None
    per_chip_bytes: dict[str, int | None]
    flops_per_step: int | None
    flops_per_chip: int | None
    flops_source: str | None
    flops_traced: int | None
    flops_closed_form: int
    collective_bytes: dict[str, int] | None
    kernels: tuple[str, ...] | None
    adapter_bytes: int
    checkpoint_bytes: int
    compile_seconds: float
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A lowered step, and the shapes of its arguments."""

    traced: jax.stages.Traced
    lowered: jax.stages.Lowered
    params: Any
    state: State
    base: Any
    batch: dict[str, Any]


def prepare(job: Job, variant: Variant, optim: OptimConfig) -> Prepared:
    """Lowers the step of `train.sft` for abstract weights.

    Args:
      job: the model, the machine, and the batch.
      variant: the parameters that train, and the activations to recompute.
      optim: the optimiser's options; its remat is replaced by the variant's.

    Returns:
      The lowered step, and the shapes of its arguments.

    Raises:
      UserError: the rules do not fit the model.
    """
    params = abstract_params(job, variant)
    adapter, base = lj.split(params)
    schedule = make_schedule(optim, _RATE, _STEPS)
    setup = Setup.of(job.layout, params, make_optimizer(optim, schedule, params), schedule)
    batch = _abstract_batch(job, variant.adapters)
    config = job.outline.config
    model = module_of(
        config,
        jnp.dtype(job.dtype),
        jnp.dtype(job.dtype),
        remat=dataclasses.replace(optim, remat=variant.remat).remat_policy,
        attention=job.attention,
        experts=job.experts,
    )
    loss = token_loss(chunk=job.loss_chunk, parts=job.layout.sequence_parts)
    forward = setup.forward(model)
    with jax.set_mesh(job.layout.mesh):
        if variant.adapters is None:
            state = setup.abstract_state(adapter)
            traced = setup.trace(forward, loss, state, base, batch)
        else:
            key = jax.eval_shape(lambda: jax.random.key(0))  # nothing runs on devices elsewhere
            one = make_tenant(optim, params, schedule, _STEPS, loss=loss, key=key)
            options = job.layout.compiler_options
            traced, state = traced_step(forward, one, variant.adapters, batch, options)
        lowered = traced.lower()
    return Prepared(
        traced=traced, lowered=lowered, params=params, state=state, base=base, batch=batch
    )


def plan(job: Job, variant: Variant, optim: OptimConfig) -> Plan:
    """Compiles the step for the job's machine.

    Args:
      job: the model, the machine, and the batch.
      variant: the parameters that train, and the activations to recompute.
      optim: the optimiser's options; its remat is replaced by the variant's.

    Returns:
      The resources that the step needs, or the compiler's refusal.

    Raises:
      UserError: the rules do not fit the model, or the compiler reports no memory use.
    """
    try:
        step = prepare(job, variant, optim)
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise UserError(
            f"--attention {job.attention}: JAX asks the library for its version, and it is not "
            "here (pip install --no-deps nvidia-cudnn-cu12): install it, or give flash"
        ) from None
    held = {
        "base": per_device(step.base),
        "adapter": per_device(step.state.adapter),
        "optimizer": per_device(step.state.opt_state),
    }
    known: dict[str, Any] = {
        "name": variant.name,
        "flops_closed_form": job.grad_accum * round(_closed_form(job, variant, step.params)),
        "adapter_bytes": tree_bytes(step.state.adapter),
        "checkpoint_bytes": tree_bytes(step.state.adapter) + tree_bytes(step.state.opt_state),
    }
    counted = count_traced(step.traced.jaxpr)
    machine = job.machine
    began = time.perf_counter()
    try:
        compiled, sizes, on_host = _largest(step.lowered, machine.compilations)
    except jax.errors.JaxRuntimeError as error:
        return Plan(
            fits=False,
            fits_share={f"{share:g}": False for share in machine.shares},
            refused=reason_of(error),
            per_chip_bytes=of_refusal(str(error), held, machine.capacity),
            flops_per_step=None,
            flops_per_chip=None,
            flops_source=None,
            flops_traced=counted and counted.flops,
            collective_bytes=None,
            kernels=None,
            compile_seconds=time.perf_counter() - began,
            notes=(),
            **known,
        )
    seconds = time.perf_counter() - began
    memory = _of_compiled(sizes, held, machine.capacity)
    memory["host"] = on_host
    products_in_hlo = machine.platform != "gpu"  # there, they are calls of cuBLAS and of Triton
    work = step_work(compiled.as_text(), counted, len(machine.devices), products_in_hlo)
    fits = {f"{share:g}": memory["total"] <= share * machine.capacity for share in machine.shares}
    return Plan(
        fits=next(iter(fits.values())),
        fits_share=fits,
        refused=None,
        per_chip_bytes=dict(memory),
        flops_per_step=work.per_step,
        flops_per_chip=work.per_chip,
        flops_source=work.source,
        flops_traced=work.traced,
        collective_bytes=work.sent,
        kernels=work.kernels,
        compile_seconds=seconds,
        notes=work.notes,
        **known,
    )


def _largest(
    lowered: jax.stages.Lowered, compilations: Sequence[dict[str, Any]]
) -> tuple[jax.stages.Compiled, dict[str, int], int]:
    """Compiles a step with each of several options; returns the one with the most temporaries.

    Returns:
      The compiled step, its bytes on a device, and those on its host.
    """
    made = [lowered.compile(compiler_options=options or None) for options in compilations]
    most = max(made, key=lambda one: compiled_bytes(one).get("temporaries", 0))
    memory: Any = most.memory_analysis()
    return most, compiled_bytes(most), getattr(memory, "host_temp_size_in_bytes", 0)


def abstract_params(job: Job, variant: Variant) -> Any:
    """Returns the adapted tree as shapes with shardings; fp32 in full fine-tuning."""
    dtype = jnp.float32 if variant.adapter.full else jnp.dtype(job.dtype)
    return adapted_shapes(job.outline, variant.adapter, dtype, job.layout)


def adapted_shapes(outline: Outline, adapter: AdapterConfig, dtype: Any, layout: Layout) -> Any:
    """Returns a model's adapted tree as shapes with shardings; --init-adapter's has its own.

    Raises:
      UserError: the rules or the adapter do not fit the model.
    """
    plain = outline.shapes(dtype, arrays=adapter.full)
    with as_user_errors(ValueError):
        if adapter.init_adapter is None:
            params = lj.lorafy(plain, rules(adapter, outline), kinds=outline.kinds)
        else:  # the base has no values to compare yet
            source = find_adapter(adapter.init_adapter, "--init-adapter")
            params = source.load(outline, plain, outline.name, allow_base_mismatch=True)
    return placed_shapes(params, layout)


def placed_shapes(params: Any, layout: Layout) -> Any:
    """Returns the shapes of an adapted tree, with its shardings."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        params,
        shardings(params, layout.table, layout.mesh),
    )


def _abstract_batch(job: Job, adapters: int | None) -> dict[str, Any]:
    """Returns the shapes of a batch, with shardings; of several adapters, each has its part."""
    rows = job.batch_size // (adapters or 1)
    shape: tuple[int, ...] = (job.grad_accum, rows, job.seq_len)
    where = job.layout.of_batch(shape, parts=True)
    if adapters is not None:
        shape = (adapters, *shape)
        where = NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
    names = ("ids", "segment_ids", "positions", "predict_at", "targets", "weights")
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where) for name in names}


def _closed_form(job: Job, variant: Variant, params: Any) -> float:
    return step_flops(
        job.outline.config,
        params,
        batch=job.batch_size,
        seq=job.seq_len,
        remat=variant.remat,
        attention=job.chosen.attend,
        split=job.layout.split(job.seq_len),
        chunked=_chunks(job) > 1,
    )


def _chunks(job: Job) -> int:
    shape, parts = (job.batch_size, job.seq_len), job.layout.sequence_parts
    return number_of_chunks(shape, job.loss_chunk, parts)


def per_device(tree: Any) -> int:
    """Returns the bytes on one device of a tree of shapes with shardings."""
    return sum(
        tree_bytes(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))
        for leaf in jax.tree.leaves(tree)
    )


def _of_compiled(sizes: dict[str, int], held: dict[str, int], capacity: int) -> dict[str, int]:
    if not sizes:
        raise UserError("this compiler does not report how much memory a program needs")
    total = sum(sizes.values()) - 2 * sizes["aliased"]  # donated arguments become outputs
    return {
        **held,
        "temporaries": sizes["temporaries"],
        "other": total - sum(held.values()) - sizes["temporaries"],
        "total": total,
        "capacity": capacity,
    }
