"""Compiles one training variant for a machine, and reads its needs or the reason of a refusal."""

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
from train.plan.flops.checked import StepWork, combine_works, count_traced, hlo_text_of, step_work
from train.plan.flops.closed_form import model_flops
from train.plan.hlo.slices import slices_in_hlo
from train.plan.job import PlanJob, PlanVariant, abstract_params, batch_shapes, bytes_per_device
from train.plan.machines import Machine
from train.run.costs import tree_bytes
from train.run.model_code import make_model

STEP = "temporaries"  # the name of a step's temporaries in a plan
_WITHOUT_SPARSE_CORES: dict[str, Any] = {"xla_tpu_offload_gather_to_sparsecore": False}
_SCHEDULE_STEPS = 1000  # a plan takes no step
_LEARNING_RATE = 1e-4
_BYTE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The resources that one variant needs; None for unknown ones.

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
      estimated_seconds: the seconds of a step with its reference or scorer, by the compiler's
        estimate; None if the compiler estimates no time.
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
    estimated_seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedStep:
    """A lowered step with its model, its abstract arguments, and the programs between steps."""

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
    layout = job.layout
    params = abstract_params(job, variant)
    adapter, base = lj.split(params)
    schedule = make_schedule(optim, _LEARNING_RATE, _SCHEDULE_STEPS)
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
    loss = job.loss
    forward = setup.forward(model)
    with jax.set_mesh(layout.mesh):
        if variant.adapters is None:
            state = setup.abstract_state(adapter)
            traced = setup.trace(forward, loss, state, base, batch)
        else:
            key = jax.eval_shape(lambda: jax.random.key(0))  # nothing runs on devices elsewhere
            tenant = make_tenant(optim, params, schedule, _SCHEDULE_STEPS, loss=loss, key=key)
            compiler_options = layout.compiler_options
            traced, state = traced_step(forward, tenant, variant.adapters, batch, compiler_options)
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
    """Compiles the step of a variant for the job's machine.

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
            f"--attention {job.attention} needs cuDNN, because JAX reads the version of this "
            "library, but cuDNN is not installed. Run pip install --no-deps nvidia-cudnn-cu12, or "
            "use --attention flash."
        ) from None
    resident_bytes = {
        "base": bytes_per_device(step.base),
        "adapter": bytes_per_device(step.state.adapter),
        "optimizer": bytes_per_device(step.state.opt_state),
    }
    programs = {
        STEP: Program(
            traced=step.traced,
            lowered=step.lowered,
            params=step.params,
            shared_bytes=sum(resident_bytes.values()),
        ),
        **step.between,
    }
    machine = job.machine
    sizes: dict[str, Any] = {
        "name": variant.name,
        "adapter_bytes": tree_bytes(step.state.adapter),
        "checkpoint_bytes": tree_bytes(step.state.adapter) + tree_bytes(step.state.opt_state),
    }
    if SAMPLER in programs:
        sizes["cache_bytes"] = cache_bytes(step.model, job.batch_size, job.seq_len)
        sizes["sampled_token_flops"] = token_flops(step.model, step.params, job.batch_size)
    start_seconds = time.perf_counter()
    compiled_programs: dict[str, jax.stages.Compiled] = {}
    for name, program in programs.items():
        try:
            compiled_programs[name] = compile_largest(program.lowered, machine.compilations)
        except jax.errors.JaxRuntimeError as error:
            refusal = parse_refused_bytes(str(error), resident_bytes, machine.capacity)
            reason = compiler_message(error)
            if name != STEP:
                reason = f"the {name}: {reason}"
            compiled_temporaries = {
                compiled_name: compiled_bytes(compiled).get(STEP)
                for compiled_name, compiled in compiled_programs.items()
            }
            return Plan(
                fits=False,
                fits_share={f"{share:g}": False for share in machine.shares},
                refused=reason if is_refusal(error) else None,
                failed=None if is_refusal(error) else f"the compiler failed: {reason}",
                per_chip_bytes={**refusal, name: refusal[STEP], **compiled_temporaries},
                flops_traced=_sum_work_of_programs(job, programs, {}).traced,
                compile_seconds=time.perf_counter() - start_seconds,
                **sizes,
            )
    hlo_texts = {
        name: optimized_hlo_of(compiled_programs[name], program.lowered, machine)
        for name, program in programs.items()
    }
    compile_seconds = time.perf_counter() - start_seconds
    work = _sum_work_of_programs(job, programs, hlo_texts)
    memory = _device_memory_bytes(compiled_programs, programs, resident_bytes)
    fits_share = {
        f"{share:g}": memory["total"] <= share * machine.capacity for share in machine.shares
    }
    clocks = _clocks_of_programs(hlo_texts, machine, _needed_flops(job, step.params))
    return Plan(
        fits=fits_share[f"{machine.shares[0]:g}"],
        fits_share=fits_share,
        per_chip_bytes={**memory, "capacity": machine.capacity},
        flops_per_step=work.per_step,
        flops_per_chip=work.per_chip,
        flops_source=work.source,
        flops_traced=work.traced,
        collective_bytes=work.sent,
        between_slices_bytes=work.between,
        kernels=work.kernels,
        compile_seconds=compile_seconds,
        notes=work.notes,
        clocks=clocks,
        estimated_seconds=_estimated_step_seconds(programs, clocks),
        **sizes,
    )


def _sum_work_of_programs(
    job: PlanJob, programs: Mapping[str, Program], hlo_texts: Mapping[str, str | None]
) -> StepWork:
    """Returns the work of a step and of the programs that run a known number of times for it.

    Args:
      job: the model, the machine, and the batch.
      programs: the programs by name.
      hlo_texts: the optimised HLO by program; of a program without it, the jaxpr is counted.
    """
    machine = job.machine
    works: list[tuple[int, StepWork]] = []
    for name, program in programs.items():
        if program.runs_per_step == 0:
            continue
        program_work = step_work(
            hlo_texts.get(name),
            count_traced(program.traced.jaxpr),
            len(machine.devices),
            # On a GPU, products are calls of cuBLAS and of Triton.
            products_in_hlo=machine.platform != "gpu",
            slices=slices_in_hlo(job.layout.mesh),
        )
        works.append((program.runs_per_step, program_work))
    return combine_works(works)


def _clocks_of_programs(
    hlo_texts: Mapping[str, str | None], machine: Machine, step_flops: int | None
) -> dict[str, Clock]:
    """Returns the time estimates of the programs whose HLO is understood, by name."""
    clocks: dict[str, Clock] = {}
    for name, hlo_text in hlo_texts.items():
        is_step = name == STEP
        clock = clock_of(hlo_text, machine, step_flops if is_step else None)
        if clock:
            clocks[_clock_name(name)] = clock
    return clocks


def _clock_name(program_name: str) -> str:
    """Returns the name of a program's estimate among `Plan.clocks`."""
    return "step" if program_name == STEP else program_name


def _estimated_step_seconds(
    programs: Mapping[str, Program], clocks: Mapping[str, Clock]
) -> float | None:
    """Returns the estimated seconds of a step with the programs that run for it.

    Args:
      programs: the programs by name.
      clocks: their estimates by name; see `Plan.clocks`.

    Returns:
      The seconds; None if a program that runs a known number of times has no estimate.
    """
    total_seconds = 0.0
    for name, program in programs.items():
        if program.runs_per_step == 0:
            continue
        clock = clocks.get(_clock_name(name))
        if clock is None or clock.seconds is None:
            return None
        total_seconds += program.runs_per_step * clock.seconds
    return total_seconds


def _needed_flops(job: PlanJob, params: Any) -> int | None:
    """Returns the FLOPs that a step needs on all devices; None for a model that reads images."""
    config: Any = job.outline.config
    if isinstance(config, SmolVLMConfig):
        return None
    n_sequences = job.grad_accum * job.batch_size * job.task_facts.sequences
    flops = model_flops(
        config,
        params,
        batch=n_sequences,
        seq=job.seq_len,
        predicted=job.seq_len - job.prompt,
    )
    if job.share_prompt:
        # All completions of a prompt but one go without it.
        n_skipped_prompts = n_sequences - job.grad_accum * job.rows
        flops -= model_flops(config, params, batch=n_skipped_prompts, seq=job.prompt, predicted=0)
    return round(flops)


def compile_largest(
    lowered: jax.stages.Lowered, compilations: Sequence[dict[str, Any]]
) -> jax.stages.Compiled:
    """Compiles a program with each option; returns the one with the largest temporaries.

    A compilation that fails for another reason than memory does not count if another one works.

    Raises:
      JaxRuntimeError: the compiler refuses the program for want of memory, or every compilation
        fails.
    """
    programs: list[jax.stages.Compiled] = []
    failure: jax.errors.JaxRuntimeError | None = None
    for options in compilations:
        try:
            programs.append(lowered.compile(compiler_options=options or None))
        except jax.errors.JaxRuntimeError as error:
            if is_refusal(error):
                raise
            failure = error
    if not programs and failure is not None:
        raise failure
    return max(programs, key=lambda program: compiled_bytes(program).get(STEP, 0))


def optimized_hlo_of(
    compiled: jax.stages.Compiled, lowered: jax.stages.Lowered, machine: Machine
) -> str | None:
    """Returns the optimised HLO of a program; None if it cannot be read.

    The XLA of JAX 0.10 fails to write what runs on SparseCores: an embedding's look-up, on v5p and
    v6e. Then it is the HLO of the same program without them, which differs in that alone.
    """
    text = hlo_text_of(compiled)
    if text is None and machine.platform == "tpu":
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            text = hlo_text_of(lowered.compile(compiler_options=_WITHOUT_SPARSE_CORES))
    return text


def _device_memory_bytes(
    compiled_programs: Mapping[str, jax.stages.Compiled],
    programs: Mapping[str, Program],
    resident_bytes: dict[str, int],
) -> dict[str, int]:
    """Returns the memory of a device by use: resident arrays, temporaries, and the total."""
    total_resident = sum(resident_bytes.values())
    temporaries: dict[str, int] = {}
    totals: dict[str, int] = {}
    host_bytes: list[int] = []
    for name, compiled in compiled_programs.items():
        sizes = compiled_bytes(compiled)
        if not sizes:
            raise UserError(
                "this compiler does not report how much memory a program needs, so there is no "
                "plan. Use another --topology."
            )
        temporaries[name] = sizes[STEP]
        # Donated arguments become outputs, so that both of them count the aliased bytes.
        program_bytes = sum(sizes.values()) - 2 * sizes["aliased"]
        # The program's arguments may leave out arrays that stay in memory between steps.
        unread_bytes = total_resident - programs[name].shared_bytes
        totals[name] = max(program_bytes + unread_bytes, total_resident + sizes[STEP])
        memory: Any = compiled.memory_analysis()
        host_bytes.append(getattr(memory, "host_temp_size_in_bytes", 0))
    largest_program = max(totals, key=lambda name: totals[name])
    total = totals[largest_program]
    return {
        **resident_bytes,
        **temporaries,
        "other": total - total_resident - temporaries[largest_program],
        "total": total,
        "host": max(host_bytes),
    }


def parse_refused_bytes(
    message: str, resident_bytes: dict[str, int], capacity: int
) -> dict[str, int | None]:
    """Parses the bytes in a compiler's refusal; None if the message names no size.

    Args:
      message: the compiler's message.
      resident_bytes: the bytes of the arrays that stay on a device, by name.
      capacity: the bytes of a device's memory.
    """
    total_resident = sum(resident_bytes.values())
    temporaries: int | None = None
    total: int | None = None
    temporaries_match = re.search(r"HLO temporaries \((\d[\d.]*[KMGT]?)\)", message)
    total_match = re.search(r"[Uu]sed (\d[\d.]*[KMGT]?) of \d[\d.]*[KMGT]? hbm", message)
    if temporaries_match:
        temporaries = _parse_byte_size(temporaries_match[1])
        total = temporaries + total_resident
    elif total_match:
        total = _parse_byte_size(total_match[1])
        temporaries = total - total_resident
    return {
        **resident_bytes,
        "temporaries": temporaries,
        "other": None,
        "total": total,
        "capacity": capacity,
        "host": None,
    }


def _parse_byte_size(text: str) -> int:
    """Parses a size such as "48.3G" into bytes."""
    number = text.rstrip("KMGT")
    return round(float(number) * _BYTE_UNITS[text[len(number) :]])


def compiler_message(error: Exception) -> str:
    """Returns the compiler's message without its links."""
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines[:2] if line and not line.startswith("See "))[:500]
