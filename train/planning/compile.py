"""One variant of training, compiled for a machine: its needs, or why the compiler refuses it."""

import dataclasses
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lj
from lora_jax.models.families import family_of
from lora_jax.sharding import shardings
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss, number_of_chunks, summed_loss
from lora_jax.training.optimizer import warmed_up
from lora_jax.training.setup import Setup
from lora_jax.training.step import State
from train.planning.flops import step_flops
from train.planning.machines import Machine
from train.planning.plan_flops import count_traced, step_work
from train.run.adapter import NO_ADAPTER, make_optimizer, rules
from train.run.errors import UserError, as_user_errors
from train.run.options import AdapterConfig, OptimConfig
from train.run.pretrained import Outline
from train.run.report import compiled_bytes, tree_bytes

_REMAT = {"none": "no remat", "full": "remat", "dots_saveable": "remat but products"}
_REMAT |= {"dots_with_no_batch_dims_saveable": "remat but dense"}
_STEPS, _RATE = 1000, 1e-4  # of the schedule; no step is taken
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Holds what is to be trained, and on what; the variant aside.

    Attributes:
      batch_size: sequences that are in memory at once, on all devices.
      seq_len: tokens of a sequence; the loss counts them all.
      loss_chunk: predictions whose logits exist at once; 0 for all.
      dtype: of the base and its activations. What trains is fp32.
    """

    outline: Outline
    layout: Layout
    machine: Machine
    batch_size: int
    grad_accum: int
    seq_len: int
    loss_chunk: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of training: what trains, and what is recomputed."""

    adapter: AdapterConfig
    remat: str

    @property
    def name(self) -> str:
        """In words, for tables."""
        if self.adapter.full:
            what = "full fine-tuning"
        elif self.adapter.peft_config:
            what = "the PEFT configuration"
        elif self.adapter.targets == NO_ADAPTER:
            what = "no adapter, parts in full"
        else:
            what = f"LoRA r={self.adapter.rank}"
        return f"{what}, {_REMAT.get(self.remat, self.remat)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs of one variant. Bytes and FLOPs are integers; None is what is not known.

    Attributes:
      fits: whether the compiler accepts it within a device's memory.
      refused: what the compiler said, if it refused.
      per_chip_bytes: of a device: base (what is frozen), adapter (what trains), optimizer,
        temporaries, other (the batch, padding, the program), total, capacity.
      flops_per_step, flops_per_chip: of products, on all devices and on one.
      flops_source: where these are read: "hlo" (the optimised one) or "jaxpr" (the step as traced,
        where the HLO is not understood); see `train.planning.plan_flops`.
      flops_traced: of a step, as counted in its jaxpr, on all devices.
      flops_closed_form: of a step, as counted by hand; see `train.planning.flops`.
      collective_bytes: what a device sends or receives in a step, by kind.
      adapter_bytes, checkpoint_bytes: on disk.
      notes: what there is to know of the FLOPs, in sentences.
    """

    name: str
    fits: bool
    refused: str | None
    per_chip_bytes: dict[str, int | None]
    flops_per_step: int | None
    flops_per_chip: int | None
    flops_source: str | None
    flops_traced: int | None
    flops_closed_form: int
    collective_bytes: dict[str, int] | None
    adapter_bytes: int
    checkpoint_bytes: int
    compile_seconds: float
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A step that is ready to be compiled, and the shapes that it takes."""

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
      variant: what trains, and what is recomputed.
      optim: the optimiser's options; `variant` has its own remat.

    Returns:
      The step, and the shapes that it takes.

    Raises:
      UserError: the rules do not fit the model.
    """
    params = abstract_params(job, variant)
    adapter, base = lj.split(params)
    schedule = warmed_up(_RATE, _STEPS, kind=optim.schedule, warmup=optim.warmup)
    setup = Setup.of(job.layout, params, make_optimizer(optim, schedule, params), schedule)
    state, batch = setup.abstract_state(adapter), _abstract_batch(job)
    config = job.outline.config
    model = family_of(config.model_type).module(
        config,
        jnp.dtype(job.dtype),
        jnp.dtype(job.dtype),
        remat=dataclasses.replace(optim, remat=variant.remat).remat_policy,
    )
    loss = Loss(functools.partial(summed_loss, chunk=job.loss_chunk))
    with jax.set_mesh(job.layout.mesh):
        traced = setup.trace(setup.forward(model), loss, state, base, batch)
        lowered = traced.lower()
    return Prepared(
        traced=traced, lowered=lowered, params=params, state=state, base=base, batch=batch
    )


def plan(job: Job, variant: Variant, optim: OptimConfig) -> Plan:
    """Compiles the step for the job's machine.

    Args:
      job: the model, the machine, and the batch.
      variant: what trains, and what is recomputed.
      optim: the optimiser's options; `variant` has its own remat.

    Returns:
      What the step needs, or the compiler's refusal.

    Raises:
      UserError: the rules do not fit the model, or the compiler tells no memory.
    """
    step = prepare(job, variant, optim)
    held = {
        "base": _per_device(step.base),
        "adapter": _per_device(step.state.adapter),
        "optimizer": _per_device(step.state.opt_state),
    }
    known: dict[str, Any] = {
        "name": variant.name,
        "flops_closed_form": job.grad_accum * round(_closed_form(job, variant, step.params)),
        "adapter_bytes": tree_bytes(step.state.adapter),
        "checkpoint_bytes": tree_bytes(step.state.adapter) + tree_bytes(step.state.opt_state),
    }
    counted = count_traced(step.traced.jaxpr)
    began = time.perf_counter()
    try:
        compiled = step.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return Plan(
            fits=False,
            refused=_reason(error),
            per_chip_bytes=of_refusal(str(error), held, job.machine.capacity),
            flops_per_step=None,
            flops_per_chip=None,
            flops_source=None,
            flops_traced=counted and counted.flops,
            collective_bytes=None,
            compile_seconds=time.perf_counter() - began,
            notes=(),
            **known,
        )
    seconds = time.perf_counter() - began
    memory = _of_compiled(compiled_bytes(compiled), held, job.machine.capacity)
    work = step_work(compiled.as_text(), counted, len(job.machine.devices))
    return Plan(
        fits=memory["total"] <= memory["capacity"],
        refused=None,
        per_chip_bytes=dict(memory),
        flops_per_step=work.per_step,
        flops_per_chip=work.per_chip,
        flops_source=work.source,
        flops_traced=work.traced,
        collective_bytes=work.sent,
        compile_seconds=seconds,
        notes=work.notes,
        **known,
    )


def abstract_params(job: Job, variant: Variant) -> Any:
    """Returns the adapted tree, as shapes with shardings; what trains in full is fp32."""
    dtype = jnp.float32 if variant.adapter.full else jnp.dtype(job.dtype)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), job.outline.params)
    with as_user_errors(ValueError):
        chosen = rules(variant.adapter, job.outline)
        params = lj.lorafy(plain, chosen, kinds=job.outline.kinds)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        params,
        shardings(params, job.layout.table, job.layout.mesh),
    )


def _abstract_batch(job: Job) -> dict[str, Any]:
    shape = (job.grad_accum, job.batch_size, job.seq_len)
    where = job.layout.of_batch(shape, parts=True)
    names = ("ids", "segment_ids", "positions", "predict_at", "targets", "weights")
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where) for name in names}


def _closed_form(job: Job, variant: Variant, params: Any) -> float:
    return step_flops(
        job.outline.config,
        params,
        batch=job.batch_size,
        seq=job.seq_len,
        remat=variant.remat,
        chunked=number_of_chunks((job.batch_size, job.seq_len), job.loss_chunk) > 1,
    )


def _per_device(tree: Any) -> int:
    """The bytes of a tree of placed shapes on one device."""
    return sum(
        tree_bytes(jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype))
        for leaf in jax.tree.leaves(tree)
    )


def _of_compiled(sizes: dict[str, int], held: dict[str, int], capacity: int) -> dict[str, int]:
    if not sizes:
        raise UserError("this compiler does not tell how much memory a program needs")
    total = sum(sizes.values()) - 2 * sizes["aliased"]  # outputs that take an argument's place
    return {
        **held,
        "temporaries": sizes["temporaries"],
        "other": total - sum(held.values()) - sizes["temporaries"],
        "total": total,
        "capacity": capacity,
    }


def of_refusal(message: str, held: dict[str, int], capacity: int) -> dict[str, int | None]:
    """As far as the compiler's own figures go: what it says that it needed."""
    temporaries = total = None
    if found := re.search(r"HLO temporaries \((\d[\d.]*[KMGT]?)\)", message):
        temporaries = _bytes(found[1])
        total = temporaries + sum(held.values())
    elif found := re.search(r"[Uu]sed (\d[\d.]*[KMGT]?) of \d[\d.]*[KMGT]? hbm", message):
        total = _bytes(found[1])
        temporaries = total - sum(held.values())
    return {
        **held,
        "temporaries": temporaries,
        "other": None,
        "total": total,
        "capacity": capacity,
    }


def _bytes(text: str) -> int:
    """ "48.3G" as a number of bytes."""
    number = text.rstrip("KMGT")
    return round(float(number) * _UNITS[text[len(number) :]])


def _reason(error: Exception) -> str:
    """Returns the compiler's words, without its references."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines[:2] if line and not line.startswith("See "))[:500]
