"""Compiles one variant of training for a machine; reads what it needs, or why it is refused."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lj
from lora_jax.bank.together.stacked import traced_step
from lora_jax.models.smolvlm.config import SmolVLMConfig
from lora_jax.training.remat import compiled_bytes, is_refusal
from lora_jax.training.setup import Setup
from lora_jax.training.step import State
from train.console.errors import UserError
from train.options.common import OptimConfig
from train.options.optim import make_optimizer, make_schedule, make_tenant
from train.plan.between import SAMPLER, Program, cache_bytes, programs_between, token_flops
from train.plan.clock.summary import Clock, clock_of
from train.plan.flops.checked import StepWork, count_traced, step_work, text_of, together
from train.plan.flops.closed_form import model_flops
from train.plan.hlo.slices import slices_in_hlo
from train.plan.job import PlanJob, PlanVariant, abstract_params, batch_shapes, bytes_per_device
from train.plan.machines import Machine
from train.run.costs import tree_bytes
from train.run.model_code import make_model

STEP = "temporaries"  # those of a step, by their name in a plan
_WITHOUT_SPARSE_CORES: dict[str, Any] = {"xla_tpu_offload_gather_to_sparsecore": False}
_STEPS, _RATE = 1000, 1e-4  # of the schedule; a plan takes no step
_BYTE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The resources that one variant needs; None for what is not known.

    Attributes:
      name: the variant in words.
      fits: whether the step compiles within the first share of a device's memory.
      fits_share: each share of the memory -> whether the step compiles within it.
      refused: the compiler's message if it refused the step for want of memory.
      failed: the compiler's message if it failed for another reason.
      per_chip_bytes: memory of one device: base (frozen), adapter (trained), optimizer,
        temporaries (of a step), those of the programs between steps (reference; scorer, sampler),
        other (the batch, padding, the program), total, capacity; and host, the memory of its host
        that it needs (`--remat offload`). The total is that of the largest program.
      flops_per_step, flops_per_chip: FLOPs of matrix products, on all devices and on one; of a
        step, with its reference or scorer, without the sampler.
      flops_source: their source: "hlo" (the optimised HLO) or "jaxpr" (the step as traced, if the
        HLO is not understood); see `train.plan.flops.checked`.
      flops_traced: FLOPs of a step counted in its jaxpr, on all devices.
      collective_bytes: bytes that a device sends in a step, by kind of collective.
      between_slices_bytes: part of these bytes that goes from slice to slice; {} on one slice.
      kernels: the kernels in the compiled step, in words; see `train.plan.hlo.kernels`.
      adapter_bytes, checkpoint_bytes: size on disk.
      sampled_token_flops: FLOPs of a token of each completion, as traced, without attention to
        earlier tokens; 0 where nothing is sampled.
      cache_bytes: the keys and values of all completions, on all devices; 0 likewise.
      compile_seconds: time of the compilation.
      notes: remarks on the FLOPs, in sentences.
      clocks: the estimate of a step, and of each program between steps, whose HLO is understood.
    """

    name: str
    fits: bool
    fits_share: dict[str, bool]
    refused: str | None = None
    failed: str | None = None
    per_chip_bytes: dict[str, int | None]
    flops_per_step: int | None = None
    flops_per_chip: int | None = None
    flops_source: str | None = None
    flops_traced: int | None
    collective_bytes: dict[str, int] | None = None
    between_slices_bytes: dict[str, int] | None = None
    kernels: tuple[str, ...] | None = None
    adapter_bytes: int
    checkpoint_bytes: int
    sampled_token_flops: int | None = 0
    cache_bytes: int = 0
    compile_seconds: float
    notes: tuple[str, ...] = ()
    clocks: dict[str, Clock] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedStep:
    """A lowered step, its model, the shapes of its arguments, and the programs between steps."""

    traced: jax.stages.Traced
    lowered: jax.stages.Lowered
    params: Any
    state: State
    base: Any
    batch: dict[str, Any]
    model: Any
    between: dict[str, Program]


def prepare(job: PlanJob, variant: PlanVariant, optim: OptimConfig) -> PreparedStep:
    """Lowers the step of a task for abstract weights, and the programs between its steps.

    Args:
      job: the model, the machine, and the batch.
      variant: the parameters that train, and the activations to recompute.
      optim: the optimiser's options; its remat is replaced by the variant's.

    Raises:
      UserError: the rules do not fit the model.
    """
    job = job.with_products(variant.products)
    layout, params = job.layout, abstract_params(job, variant)
    adapter, base = lj.split(params)
    schedule = make_schedule(optim, _RATE, _STEPS)
    setup = Setup.make(layout, params, make_optimizer(optim, schedule, params), schedule)
    batch = batch_shapes(job, variant.adapters)
    model = make_model(
        job.outline.config,
        jnp.dtype(job.dtype),
        jnp.dtype(job.dtype),
        remat=dataclasses.replace(optim, remat=variant.remat).remat_policy,
        attention=job.attention,
        experts=job.experts,
        params=lj.strip(params),
    )
    loss, forward = job.loss, setup.forward(model)
    with jax.set_mesh(layout.mesh):
        if variant.adapters is None:
            state = setup.abstract_state(adapter)
            traced = setup.trace(forward, loss, state, base, batch)
        else:
            key = jax.eval_shape(lambda: jax.random.key(0))  # nothing runs on devices elsewhere
            one = make_tenant(optim, params, schedule, _STEPS, loss=loss, key=key)
            options = layout.compiler_options
            traced, state = traced_step(forward, one, variant.adapters, batch, options)
        lowered = traced.lower()
    return PreparedStep(
        traced=traced,
        lowered=lowered,
        params=params,
        state=state,
        base=base,
        batch=batch,
        model=model,
        between=programs_between(
            model, layout, params, batch, chunk=job.loss_chunk, group=job.group
        ),
    )


def plan(job: PlanJob, variant: PlanVariant, optim: OptimConfig) -> Plan:
    """Compiles the step for the job's machine.

    Args:
      job: the model, the machine, and the batch.
      variant: the parameters that train, and the activations to recompute.
      optim: the optimiser's options; its remat is replaced by the variant's.

    Returns:
      The resources that the step needs, or the compiler's refusal or failure.

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
        "base": bytes_per_device(step.base),
        "adapter": bytes_per_device(step.state.adapter),
        "optimizer": bytes_per_device(step.state.opt_state),
    }
    whole = Program(step.traced, step.lowered, step.params, sum(held.values()))
    programs = {STEP: whole, **step.between}
    machine = job.machine
    in_hlo = machine.platform != "gpu"  # there, products are calls of cuBLAS and of Triton
    n_devices, slices = len(machine.devices), slices_in_hlo(job.layout.mesh)
    counts = {name: count_traced(one.traced.jaxpr) for name, one in programs.items()}

    def work(texts: Mapping[str, str | None]) -> StepWork:
        """Returns the work of a step, of compiled programs or as traced."""
        return together(
            [
                (one.times, step_work(texts.get(name), counts[name], n_devices, in_hlo, slices))
                for name, one in programs.items()
                if one.times
            ]
        )

    known: dict[str, Any] = {
        "name": variant.name,
        "adapter_bytes": tree_bytes(step.state.adapter),
        "checkpoint_bytes": tree_bytes(step.state.adapter) + tree_bytes(step.state.opt_state),
    }
    if SAMPLER in programs:
        known["cache_bytes"] = cache_bytes(step.model, job.batch_size, job.seq_len)
        known["sampled_token_flops"] = token_flops(step.model, step.params, job.batch_size)
    began = time.perf_counter()
    made: dict[str, jax.stages.Compiled] = {}
    for name, one in programs.items():
        try:
            made[name] = _largest(one.lowered, machine.compilations)
        except jax.errors.JaxRuntimeError as error:
            refusal = refused_bytes(str(error), held, machine.capacity)
            reason = ("" if name == STEP else f"the {name}: ") + reason_of(error)
            others = {before: compiled_bytes(found).get(STEP) for before, found in made.items()}
            return Plan(
                fits=False,
                fits_share={f"{share:g}": False for share in machine.shares},
                refused=reason if is_refusal(error) else None,
                failed=None if is_refusal(error) else f"the compiler failed: {reason}",
                per_chip_bytes={**refusal, name: refusal[STEP], **others},
                flops_traced=work({}).traced,
                compile_seconds=time.perf_counter() - began,
                **known,
            )
    texts = {name: hlo_of(made[name], one.lowered, machine) for name, one in programs.items()}
    seconds = time.perf_counter() - began
    found = work(texts)
    memory = _device_bytes(made, programs, held) | {"capacity": machine.capacity}
    fits = {f"{share:g}": memory["total"] <= share * machine.capacity for share in machine.shares}
    return Plan(
        fits=next(iter(fits.values())),
        fits_share=fits,
        per_chip_bytes=dict(memory),
        flops_per_step=found.per_step,
        flops_per_chip=found.per_chip,
        flops_source=found.source,
        flops_traced=found.traced,
        collective_bytes=found.sent,
        between_slices_bytes=found.between,
        kernels=found.kernels,
        compile_seconds=seconds,
        notes=found.notes,
        clocks=_clocks(texts, machine, _model_flops(job, step.params)),
        **known,
    )


def _clocks(
    texts: Mapping[str, str | None], machine: Machine, needed: int | None
) -> dict[str, Clock]:
    """Returns the estimates of programs, by name; the FLOPs needed are those of a step."""
    clocks = {
        "step" if name == STEP else name: clock_of(text, machine, needed if name == STEP else None)
        for name, text in texts.items()
    }
    return {name: clock for name, clock in clocks.items() if clock}


def _model_flops(job: PlanJob, params: Any) -> int | None:
    """Returns the FLOPs that a step needs, on all devices; None for a model that reads images."""
    config: Any = job.outline.config
    if isinstance(config, SmolVLMConfig):
        return None
    rows = job.grad_accum * job.batch_size * job.kind.sequences
    predicted = job.seq_len - job.prompt
    needed = model_flops(config, params, batch=rows, seq=job.seq_len, predicted=predicted)
    if job.share_prompt:  # all completions of a prompt but one go without it
        rows -= job.grad_accum * job.rows
        needed -= model_flops(config, params, batch=rows, seq=job.prompt, predicted=0)
    return round(needed)


def _largest(
    lowered: jax.stages.Lowered, compilations: Sequence[dict[str, Any]]
) -> jax.stages.Compiled:
    """Compiles a program with each of several options; returns the one with most temporaries."""
    made = [lowered.compile(compiler_options=options or None) for options in compilations]
    return max(made, key=lambda one: compiled_bytes(one).get(STEP, 0))


def hlo_of(
    compiled: jax.stages.Compiled, lowered: jax.stages.Lowered, machine: Machine
) -> str | None:
    """Returns the optimised HLO of a program; None where there is none.

    The XLA of JAX 0.10 fails to write what runs on SparseCores: an embedding's look-up, on v5p and
    v6e. Then it is the HLO of the same program without them, which differs in that alone.
    """
    text = text_of(compiled)
    if text is None and machine.platform == "tpu":
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            text = text_of(lowered.compile(compiler_options=_WITHOUT_SPARSE_CORES))
    return text


def _device_bytes(
    made: Mapping[str, jax.stages.Compiled], programs: Mapping[str, Program], held: dict[str, int]
) -> dict[str, int]:
    """Returns the memory of a device: what stays, what each program needs, and the most of all."""
    sizes = {name: compiled_bytes(one) for name, one in made.items()}
    if not all(sizes.values()):
        raise UserError("this compiler does not report how much memory a program needs")
    stays = sum(held.values())
    totals = {  # donated arguments become outputs; those that a program does not read are left out
        name: max(
            sum(of.values()) - 2 * of["aliased"] + stays - programs[name].shared, stays + of[STEP]
        )
        for name, of in sizes.items()
    }
    temporaries = {name: of[STEP] for name, of in sizes.items()}
    largest = max(totals, key=lambda name: totals[name])
    memories: list[Any] = [one.memory_analysis() for one in made.values()]
    return {
        **held,
        **temporaries,
        "other": totals[largest] - stays - temporaries[largest],
        "total": totals[largest],
        "host": max(getattr(memory, "host_temp_size_in_bytes", 0) for memory in memories),
    }


def refused_bytes(message: str, held: dict[str, int], capacity: int) -> dict[str, int | None]:
    """Returns the memory that the compiler's refusal names, with the bytes `held` by arguments."""
    temporaries = total = None
    if found := re.search(r"HLO temporaries \((\d[\d.]*[KMGT]?)\)", message):
        temporaries = _parsed_bytes(found[1])
        total = temporaries + sum(held.values())
    elif found := re.search(r"[Uu]sed (\d[\d.]*[KMGT]?) of \d[\d.]*[KMGT]? hbm", message):
        total = _parsed_bytes(found[1])
        temporaries = total - sum(held.values())
    return {
        **held,
        "temporaries": temporaries,
        "other": None,
        "total": total,
        "capacity": capacity,
        "host": None,
    }


def _parsed_bytes(text: str) -> int:
    """Parses a size such as "48.3G" into bytes."""
    number = text.rstrip("KMGT")
    return round(float(number) * _BYTE_UNITS[text[len(number) :]])


def reason_of(error: Exception) -> str:
    """Returns the compiler's message, without its links."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines[:2] if line and not line.startswith("See "))[:500]
