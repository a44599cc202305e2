"""Will it fit, and what will it cost? `python -m train.plan` asks the compiler.

    python -m train.plan --model config.json --topology v5e:4x4 --mesh fsdp=16 --batch-size 16

Compiles the very step of `train.sft`, `train.dpo` or `train.grpo`, and what runs between its steps,
from a config.json alone, for a machine that need not be there: a TPU slice or NVIDIA GPUs, with
their own compilers (the extras `tpu` and `gpu-plan`), or virtual CPU devices.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console

from lora_jax.models.smolvlm.config import SmolVLMConfig
from lora_jax.training.layout import Layout
from lora_jax.training.run.log import duration
from lora_jax.training.sharded_products import Form
from train.console.errors import UserError, reported
from train.options.command import parse_options
from train.options.common import AUTO, AdapterConfig, OptimConfig, check_offload
from train.options.optim import fill_optimizer_defaults
from train.options.rope import parse_rope_scaling
from train.plan.clock.table import print_clocks
from train.plan.compile import Plan, plan
from train.plan.job import PlanJob, PlanVariant
from train.plan.ladder import Ladder, climb, print_ladder, rungs_of
from train.plan.machines import Machine, assuming, find_machine
from train.plan.options import PlanConfig, PlanOptions, check
from train.plan.table import print_plans
from train.plan.tasks import TASKS
from train.plan.token import Token, plan_token, print_token, rows_params
from train.processes.mesh import make_mesh, with_form
from train.run.pretrained import ModelInfo, read_shapes
from train.run.shared_prompts import PromptRows, obstacle

_ROW_UNIT = 256  # --longest counts rows in multiples of it
_MOST_ROWS = 2**16  # of a batch that --largest-batch tries
_SIZE_STEPS = 64  # the result is within one part of so many


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Bad input exits with code 2."""
    with reported():
        run(parse(args))


def parse(args: Sequence[str] | None = None) -> PlanOptions:
    """Parses a command line, by default this process's."""
    return parse_options(PlanOptions, args, "train.plan")


def run(options: PlanOptions) -> None:
    """Checks the options, compiles each variant, and prints the plans."""
    asked = options.plan
    jax.config.update("jax_platforms", "cpu")  # leave accelerators to other processes
    check(options)
    found: dict[str, int | None] = {}
    plans: list[Plan] = []
    ladder: Ladder | None = None
    if asked.longest or asked.largest_batch:
        found, largest, ladder = search(options)
        asked = _resized(asked, next(size for size in found.values() if size))
        plans = [largest]
    job, optim = make_job(asked)
    facts = {**described(asked, job), "largest": found}
    progress, token = Console(stderr=True, highlight=False), None

    def make_plan(variant: PlanVariant) -> Plan:
        with progress.status(f"compiling {variant.name}"):
            made = plan(job, variant, optim)
        progress.print(f"compiled {variant.name}: {duration(made.compile_seconds)}")
        return made

    trained = lora_of(options)
    if asked.decode_adapters is not None:  # its errors, before the plans are made
        rows_params(job, PlanVariant(trained, "full"), asked.decode_adapters)
    try:
        if asked.remat == AUTO and ladder is None:
            ladder = climb(job, trained, optim, make_plan, progress.print)
            plans = [ladder.plans[ladder.remat]]
        first, *others = variants(options, job, ladder)
        for variant in [first, *others][len(plans) :]:
            is_rung = variant == PlanVariant(trained, variant.remat)
            of_ladder = ladder.plans if ladder and is_rung else {}
            if variant.remat not in of_ladder:
                of_ladder[variant.remat] = make_plan(variant)
            plans.append(of_ladder[variant.remat])
        if asked.decode_rows:
            with progress.status("compiling a token"):
                token = plan_token(job, first, asked.decode_rows, asked.decode_adapters)
    finally:  # after Ctrl-C, the plans so far
        if plans:
            show(asked, job, facts, plans, ladder, token)


def search(options: PlanOptions) -> tuple[dict[str, int | None], Plan, Ladder | None]:
    """Finds the largest size that fits, for each share of the memory, and says so.

    Returns:
      The size by share, None for a share into which not even the smallest fits; the plan of the
      first size that there is; and its policies with --remat auto, None without.

    Raises:
      UserError: not even the smallest fits.
    """
    asked = options.plan
    first, what = asked.seq_len, f"tokens a {TASKS[asked.task].row}"
    if asked.largest_batch:
        first, what = asked.batch_size, f"{TASKS[asked.task].rows} a batch"
    # The rows to begin with may be longer than the model allows.
    job, optim = make_job(_resized(asked, _ROW_UNIT) if asked.longest else asked)
    machine = job.machine
    parts = job.layout.sequence_parts if asked.longest else job.layout.batch_parts
    unit = math.lcm(_ROW_UNIT, 2 * parts) if asked.longest else math.lcm(parts, job.group)
    limit = job.outline.max_tokens if asked.longest else _MOST_ROWS
    progress = Console(stderr=True, highlight=False)
    trained, ladders = lora_of(options), dict[int, Ladder]()

    @functools.cache
    def plan_of_size(size: int) -> Plan:
        resized = make_job(_resized(asked, size))[0]

        def make_plan(variant: PlanVariant) -> Plan:
            with progress.status(f"compiling {variant.name}, {size:,} {what}"):
                made = plan(resized, variant, optim)
            if made.failed:
                raise UserError(f"{variant.name}, {size:,} {what}: {made.failed}")
            total, took = made.per_chip_bytes["total"], duration(made.compile_seconds)
            needs = "refused" if total is None else f"{total / 2**30:.2f} GiB"
            policy = f", --remat {variant.remat}" if asked.remat == AUTO else ""
            progress.print(f"{size:,} {what}{policy}: {needs} ({took})")
            return made

        if asked.remat != AUTO:
            (variant,) = variants(options)
            return make_plan(variant)
        # What fitted the last size is likely for this one, too.
        last = [ladder.remat for ladder in ladders.values()][-1:]
        ladders[size] = climb(resized, trained, optim, make_plan, first=last[0] if last else None)
        return ladders[size].plans[ladders[size].remat]

    found = {
        f"{share:g}": largest_fit(plan_of_size, first, unit, limit, share)
        for share in machine.shares
    }
    for share, size in found.items():
        within = f" within {share} of the memory" if len(found) > 1 else ""
        most = f"{size:,} {what}" if size else "nothing"
        most += " (the model's limit)" * (asked.longest and size == limit - limit % unit)
        progress.print(f"the most that fits{within}: {most}", soft_wrap=True)
    size = next((size for size in found.values() if size), None)
    if size is None:
        raise UserError(
            f"not even {unit} {what} fit into {machine.name}: give --quantize, --remat, a smaller "
            f"{'--batch-size' if asked.longest else '--seq-len'}, or more devices"
        )
    return found, plan_of_size(size), ladders.get(size)


def _resized(asked: PlanConfig, size: int) -> PlanConfig:
    if asked.longest:
        return dataclasses.replace(asked, seq_len=size)
    return dataclasses.replace(asked, batch_size=size)


def show(
    asked: PlanConfig,
    job: PlanJob,
    facts: dict[str, Any],
    plans: list[Plan],
    ladder: Ladder | None = None,
    token: Token | None = None,
) -> None:
    """Prints the plans, as JSON or as a table; the first plan is the requested one."""
    if asked.json:
        first, *others = (as_json(made, asked, job.machine) for made in plans)
        first |= {"token": dataclasses.asdict(token)} if token else {}
        made = [dataclasses.asdict(rung) for rung in rungs_of(ladder)] if ladder else []
        print(json.dumps({**facts, **first, "others": others, "ladder": made}, indent=2))
    else:
        estimates = [estimate(made, asked, job.machine) for made in plans]
        wide = None if sys.stdout.isatty() else 120
        console = Console(width=wide)
        print_plans(console, facts, plans, estimates)
        if ladder:
            print_ladder(console, ladder)
        print_clocks(console, job.machine, [(made.name, made.clocks.get("step")) for made in plans])
        if token:
            print_token(console, token)


def make_job(asked: PlanConfig) -> tuple[PlanJob, OptimConfig]:
    """Returns the job and the options of an optimiser.

    Raises:
      UserError: model, machine and mesh do not fit together.
    """
    outline = read_shapes(asked.model, asked.model_code)
    outline = outline.scaled(parse_rope_scaling(asked.rope_scaling))
    outline = outline.quantized(asked.quantize)
    outline.check_length(asked.seq_len, f"--seq-len {asked.seq_len}")
    outline.check_experts(asked.experts)
    _check_images(asked, outline)
    if asked.decode_rows and outline.is_torch:
        raise UserError(
            f"--decode-rows {asked.decode_rows}: {asked.model} runs as a torch module, whose "
            "tokens are not planned: leave it out"
        )
    machine = find_machine(
        asked.topology, asked.capacity_gib, asked.peak_tflops, asked.mem_fraction
    )
    machine = assuming(machine, asked.kernel_share, asked.link_gbytes)
    mesh = make_mesh(asked.mesh, asked.batch_size, machine.devices, asked.slice_axis)
    layout = Layout.of(mesh, outline.config)
    layout, form = with_form(layout, asked.collective_matmul)
    check_offload(asked.remat, layout.platform)
    for n in asked.adapters:
        if (asked.batch_size // n) % layout.batch_parts:
            raise UserError(
                f"--adapters {n}: each has {asked.batch_size // n} of the {asked.batch_size} "
                f"sequences, and the mesh splits a batch into {layout.batch_parts} parts: give a "
                f"larger --batch-size, or a --mesh with less of data and fsdp"
            )
    draws = TASKS[asked.task].draws
    group, max_new_tokens = asked.drawn if draws else (1, 0)
    job = PlanJob(
        outline=outline,
        layout=layout,
        machine=machine,
        batch_size=asked.batch_size,
        grad_accum=asked.grad_accum,
        seq_len=asked.seq_len,
        loss_chunk=asked.loss_chunk,
        dtype=asked.dtype,
        attention=asked.attention,
        experts=asked.experts,
        products=form,
        task=asked.task,
        group=group,
        max_new_tokens=max_new_tokens,
        prompt=asked.seq_len - max_new_tokens if draws else asked.prompt_len or 0,
        images=asked.images,
    )
    job = _share_prompts(job, asked)
    layout.check_lengths([job.row])
    optim = OptimConfig(optimizer=asked.optimizer, batch_size=asked.batch_size)
    return job, fill_optimizer_defaults(optim, lr=1e-4, beta2=0.999)


def _share_prompts(job: PlanJob, asked: PlanConfig) -> PlanJob:
    """Returns the job with prompts that completions share, if a run's would.

    Raises:
      UserError: --no-share-prompt has no effect.
    """
    shared = dataclasses.replace(job, share_prompt=True)
    rows = PromptRows(
        completions=job.completions,
        share=job.prompt / job.seq_len,
        rows=shared.rows,
        shared=(shared.rows, shared.row),
        alone=(job.rows, job.row),
    )
    why = "there is no prompt that completions share"
    if job.completions > 1 and job.prompt:
        how = {"attention": asked.attention, "dtype": asked.dtype}
        why = obstacle([job.outline], job.layout, rows, **how) or ""
    if why and not asked.share_prompt:
        raise UserError(f"--no-share-prompt has no effect: {why}; leave it out")
    return shared if asked.share_prompt and not why else job


def _check_images(asked: PlanConfig, outline: ModelInfo) -> None:
    if not asked.images:
        return
    if not isinstance(outline.config, SmolVLMConfig):
        raise UserError(
            f"--images {asked.images}: the model {asked.model} reads texts alone here; images of "
            "any size, as Qwen3.5's, are not planned"
        )
    needed = asked.images * outline.config.tokens_per_image
    if needed > asked.seq_len:
        raise UserError(
            f"--images {asked.images}: they take {needed} tokens of a row, and --seq-len is "
            f"{asked.seq_len}"
        )


def lora_of(options: PlanOptions) -> AdapterConfig:
    """Returns the parameters that the requested variant trains."""
    if options.adapter.full:
        return AdapterConfig(full=True)
    return dataclasses.replace(options.adapter, full=False)


def variants(
    options: PlanOptions, job: PlanJob | None = None, ladder: Ladder | None = None
) -> list[PlanVariant]:
    """Returns the requested variant and, without --alone, others to compare it with.

    Args:
      options: the options.
      job: if given, the variant with the other form of products with sharded kernels is one, too.
      ladder: policies of --remat auto: the requested variant is the one that the search ended
        with, and the others are its other policies.
    """
    asked_alone = options.plan.alone or options.plan.longest or options.plan.largest_batch
    trained = lora_of(options)
    lora = dataclasses.replace(options.adapter, full=False)
    remat = ladder.remat if ladder else options.plan.remat or "none"
    if options.plan.adapters:
        return [PlanVariant(lora, remat, n) for n in options.plan.adapters]
    full = AdapterConfig(full=True)
    asked = PlanVariant(trained, remat)
    if ladder:
        others = [PlanVariant(trained, name) for name in ladder.search.rungs]
    else:
        policies = ("full", "dots_with_no_batch_dims_saveable", "none")
        others = [PlanVariant(lora, name) for name in policies]
    others.append(PlanVariant(full, "full"))
    if asked_alone:
        return [asked]
    if job is not None and job.products is not None:
        other: Form = "windowed" if job.products.form == "whole" else "whole"
        others.insert(0, dataclasses.replace(asked, products=other))
    return [*dict.fromkeys((asked, *others))]  # each once


def described(asked: PlanConfig, job: PlanJob) -> dict[str, Any]:
    """Returns the facts that all plans share: model, machine, mesh, and batch."""
    machine, mesh = job.machine, job.layout.mesh.shape
    return {
        "model": asked.model,
        "topology": machine.name,
        "devices": len(machine.devices),
        "chips": machine.n_chips,
        "compiler": machine.platform,
        "slices": machine.n_slices,
        "mesh": {axis: size for axis, size in mesh.items() if size > 1},
        "batch_size": asked.batch_size,
        "grad_accum": asked.grad_accum,
        "seq_len": asked.seq_len,
        "task": asked.task,
        "group": job.group,
        "max_new_tokens": job.max_new_tokens,
        "images": job.images,
        "rows": _rows(job),
        "dtype": asked.dtype,
        "quantize": job.outline.head.get("quantize", "none"),
        "attention": str(job.chosen),
        "experts": asked.experts,
        "collective_matmul": None if job.products is None else str(job.products),
        "loss_chunk": job.head_chunk // job.layout.token_parts,
        "optimizer": asked.optimizer,
        "peak_flops_per_device": machine.flops,
        "memory_bytes_per_second": machine.bandwidth,
        "memory_shares": machine.shares,
        "kernel_share": machine.kernel_share if machine.clock else None,
        "link_bytes_per_second": machine.link,
        "remarks": machine.remarks,
        "utilisation": asked.utilisation,
        "tokens": asked.tokens,
        "price": asked.price,
    }


def _rows(job: PlanJob) -> str:
    """Returns the batch of a step in words."""
    n, what = job.batch_size * job.grad_accum, f"{job.seq_len} tokens"
    once = ", a prompt once" * job.share_prompt
    if (each := job.kind.sequences) > 1:
        rows = job.kind.rows
        pairs = f"{n} {rows.removesuffix('s') if n == 1 else rows} of {each} × {what}"
        return f"{pairs}, {job.prompt} of them a prompt's{once}" if job.prompt else pairs
    if job.kind.draws:
        parts = f"{job.seq_len - job.max_new_tokens} + {job.max_new_tokens}"
        return f"{n} completions, {job.group} of a prompt, of {parts} tokens{once}"
    if job.images:
        what += f" with {job.images} {'image' if job.images == 1 else 'images'}"
    return f"{n} × {what}"


def as_json(made: Plan, asked: PlanConfig, machine: Machine) -> dict[str, Any]:
    """Returns a plan and its estimates as JSON."""
    return {**dataclasses.asdict(made), **estimate(made, asked, machine)}


def estimate(made: Plan, asked: PlanConfig, machine: Machine) -> dict[str, float | None]:
    """Returns the seconds of a step, the chip-hours and the cost; None for what is not known."""
    seconds = hours = cost = None
    if made.flops_per_chip is not None and machine.flops is not None:
        seconds = made.flops_per_chip / (machine.flops * asked.utilisation)
        if asked.tokens is not None:
            tokens_a_step = asked.batch_size * asked.grad_accum * asked.seq_len
            tokens_a_step *= TASKS[asked.task].sequences
            hours = asked.tokens / tokens_a_step * seconds * machine.n_chips / 3600
            cost = None if asked.price is None else hours * asked.price
    return {"step_seconds": seconds, "chip_hours": hours, "cost": cost}


def largest_fit(
    plan_of: Callable[[int], Plan], first: int, unit: int, limit: int, share: float
) -> int | None:
    """Returns the largest size that fits into a share of the memory; None if even a unit does not.

    Args:
      plan_of: makes the plan of a size.
      first: the size to begin with.
      unit: sizes are multiples of it.
      limit: the largest size that there is.
      share: the share of a device's memory.

    Returns:
      The size, within a unit or a 64th of it.
    """
    limit -= limit % unit
    size = min(limit, max(unit, first - first % unit))
    if limit < unit:
        return None
    fit, over = 0, limit + unit  # the largest that fits, the smallest that does not
    totals: dict[int, int] = {}
    over_before = False
    while True:
        made = plan_of(size)
        total = made.per_chip_bytes["total"]
        if total is not None:
            totals[size] = total
        if made.fits_share[f"{share:g}"]:
            fit = size
        else:
            over = size
        step = max(unit, fit // _SIZE_STEPS // unit * unit)
        if over - fit <= step:
            return fit or None
        capacity = share * (made.per_chip_bytes["capacity"] or 0)
        guess = _size_for(totals, capacity) if len(totals) > 1 else None
        if guess is None or (over_before and size == over):  # a curve leads the line astray
            guess = 2 * fit if over > limit else (fit + over) // 2
        elif size == fit and guess < fit + step:
            guess = fit + step  # the one before it fits: does the next?
        over_before = size == over
        size = min(over - unit, max(fit + unit, int(guess) // unit * unit))


def _size_for(totals: dict[int, int], capacity: float) -> float | None:
    """Returns the size at which a line through the two nearest plans meets the capacity."""
    (one, low), (other, high) = sorted(
        sorted(totals.items(), key=lambda item: abs(item[1] - capacity))[:2]
    )
    return one + (other - one) * (capacity - low) / (high - low) if high > low else None


if __name__ == "__main__":
    main(sys.argv[1:])
