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
from train.console.errors import UserError, flag, reported
from train.options.command import parse_options
from train.options.common import AUTO, AdapterConfig, OptimConfig, check_remat
from train.options.optim import fill_optimizer_defaults
from train.options.rope import parse_rope_scaling
from train.plan.clock.table import print_clocks
from train.plan.compile import Plan, plan
from train.plan.facts import describe_job
from train.plan.job import PlanJob, PlanVariant
from train.plan.ladder import Ladder, planned_rungs, print_ladder, search_policies
from train.plan.machines import Machine, find_machine, with_assumptions
from train.plan.options import DEFAULT_UTILISATION, PlanConfig, PlanOptions, check_options
from train.plan.table import print_plans
from train.plan.tasks import TASKS
from train.plan.token import Token, param_shapes_for_rows, plan_token, print_token
from train.plan.user_command import asks_for_function, run_function_plan
from train.processes.apart import ProcessCrash, run_apart
from train.processes.mesh import choose_product_form, make_mesh
from train.run.pretrained import ModelInfo, read_shapes
from train.run.shared_prompts import PromptRows, obstacle

_LONGEST_UNIT_TOKENS = 256  # --longest tries multiples of it
_MAX_BATCH_ROWS = 2**16  # the largest batch that --largest-batch tries
_STEPS_PER_SIZE = 64  # a search ends within a 64th of the largest size that fits


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. Bad input exits with code 2."""
    with reported():
        if asks_for_function(args):
            run_function_plan(args)
        else:
            run(parse(args))


def parse(args: Sequence[str] | None = None) -> PlanOptions:
    """Parses a command line, by default this process's."""
    return parse_options(PlanOptions, args, "train.plan")


def run(options: PlanOptions) -> None:
    """Checks the options, compiles each variant, and prints the plans."""
    config = options.plan
    jax.config.update("jax_platforms", "cpu")  # leave accelerators to other processes
    check_options(options)
    largest_sizes: dict[str, int | None] = {}
    plans: list[Plan] = []
    ladder: Ladder | None = None
    if config.longest or config.largest_batch:
        largest_sizes, largest_plan, ladder = find_largest_size(options)
        fitting_sizes = [size for size in largest_sizes.values() if size]
        config = _with_size(config, fitting_sizes[0])
        plans = [largest_plan]
    job, optim = make_job(config)
    facts = {**describe_job(config, job), "largest": largest_sizes}
    progress = Console(stderr=True, highlight=False)
    token: Token | None = None

    def make_plan(variant: PlanVariant) -> Plan:
        with progress.status(f"compiling {variant.name}"):
            variant_plan = plan_variant(config, job, variant, optim)
        progress.print(f"compiled {variant.name}: {duration(variant_plan.compile_seconds)}")
        return variant_plan

    adapter = requested_adapter(options)
    if config.decode_adapters is not None:  # raise its errors before the compilations
        param_shapes_for_rows(job, PlanVariant(adapter, "full"), config.decode_adapters)
    try:
        if config.remat == AUTO and ladder is None:
            ladder = search_policies(job, adapter, optim, make_plan, progress.print)
            plans = [ladder.plans[ladder.remat]]
        planned_variants = variants_to_plan(options, job, ladder)
        # A search has planned the first variant already.
        for variant in planned_variants[len(plans) :]:
            is_rung = variant == PlanVariant(adapter, variant.remat)
            if not (ladder and is_rung):
                plans.append(make_plan(variant))
                continue
            if variant.remat in ladder.crashed:
                continue
            if variant.remat not in ladder.plans:
                try:
                    ladder.plans[variant.remat] = make_plan(variant)
                except ProcessCrash:
                    progress.print(f"{variant.name}: the compiler crashed, so there is no plan")
                    continue
            plans.append(ladder.plans[variant.remat])
        if config.decode_rows:
            with progress.status("compiling a token"):
                token = plan_token(
                    job, planned_variants[0], config.decode_rows, config.decode_adapters
                )
    finally:  # after Ctrl-C, the plans so far
        if plans:
            print_results(config, job, facts, plans, ladder, token)


def plan_variant(
    config: PlanConfig, job: PlanJob, variant: PlanVariant, optim: OptimConfig
) -> Plan:
    """Compiles a variant; for --remat auto on TPUs, in a process of its own.

    A TPU's compiler may end its process. The search of --remat auto then goes on.

    Args:
      config: the options of the plan.
      job, optim: the job of these options; see `make_job`.
      variant: the parameters that train, and the activations to recompute.

    Raises:
      ProcessCrash: the compiler ended its process.
      UserError: see `train.plan.compile.plan`.
    """
    if config.remat != AUTO or job.machine.platform != "tpu":
        return plan(job, variant, optim)
    result: Plan | str = run_apart(_plan_from_options, config, variant)
    if isinstance(result, str):
        raise UserError(result)
    return result


def _plan_from_options(config: PlanConfig, variant: PlanVariant) -> Plan | str:
    """Returns the plan of a variant, or the message of a UserError, which cannot be pickled."""
    jax.config.update("jax_platforms", "cpu")
    try:
        job, optim = make_job(config)
        return plan(job, variant, optim)
    except UserError as error:
        return error.said(flag)


def find_largest_size(options: PlanOptions) -> tuple[dict[str, int | None], Plan, Ladder | None]:
    """Finds and prints the largest size that fits into each share of the memory.

    Returns:
      The size by share: None for a share into which the smallest size does not fit. The plan of
      the first size that fits. The policies of --remat auto, None for another --remat.

    Raises:
      UserError: the smallest size does not fit into any share.
    """
    config = options.plan
    task = TASKS[config.task]
    if config.longest:
        # --seq-len may be longer than the model allows, so the job begins with the shortest rows.
        job, optim = make_job(_with_size(config, _LONGEST_UNIT_TOKENS))
        start_size = config.seq_len
        size_words = f"tokens per {task.row}"
        unit = math.lcm(_LONGEST_UNIT_TOKENS, 2 * job.layout.sequence_parts)
        size_limit = job.outline.max_tokens
    else:
        job, optim = make_job(config)
        start_size = config.batch_size
        size_words = f"{task.rows} per batch"
        unit = math.lcm(job.layout.batch_parts, job.group)
        size_limit = _MAX_BATCH_ROWS
    machine = job.machine
    progress = Console(stderr=True, highlight=False)
    adapter = requested_adapter(options)
    ladders: dict[int, Ladder] = {}

    @functools.cache
    def plan_of_size(size: int) -> Plan:
        """Returns the plan of a size, with the policy that --remat auto chooses for it."""
        resized_job, _ = make_job(_with_size(config, size))

        def make_plan(variant: PlanVariant) -> Plan:
            """Compiles a variant, and prints the memory that it needs."""
            with progress.status(f"compiling {variant.name}, {size:,} {size_words}"):
                resized_config = _with_size(config, size)
                variant_plan = plan_variant(resized_config, resized_job, variant, optim)
            if variant_plan.failed:
                raise UserError(f"{variant.name}, {size:,} {size_words}: {variant_plan.failed}")
            total = variant_plan.per_chip_bytes["total"]
            memory = "refused" if total is None else f"{total / 2**30:.2f} GiB"
            policy = f", --remat {variant.remat}" if config.remat == AUTO else ""
            compile_time = duration(variant_plan.compile_seconds)
            progress.print(f"{size:,} {size_words}{policy}: {memory} ({compile_time})")
            return variant_plan

        if config.remat != AUTO:
            (variant,) = variants_to_plan(options)
            return make_plan(variant)
        # The policy that fitted the last size is likely for this one, too.
        policies = [ladder.remat for ladder in ladders.values()]
        first_policy = policies[-1] if policies else None
        # A size that fits needs no policy for some of the layers.
        ladder = search_policies(
            resized_job, adapter, optim, make_plan, first=first_policy, counts_layers=False
        )
        ladders[size] = ladder
        return ladder.plans[ladder.remat]

    largest_sizes = {
        f"{share:g}": find_largest_fit(plan_of_size, start_size, unit, size_limit, share)
        for share in machine.shares
    }
    for share, size in largest_sizes.items():
        condition = f" within {share} of the memory" if len(largest_sizes) > 1 else ""
        size_text = f"{size:,} {size_words}" if size else "nothing"
        if config.longest and size == size_limit - size_limit % unit:
            size_text += " (the model's limit)"
        progress.print(f"the largest size that fits{condition}: {size_text}", soft_wrap=True)
    fitting_sizes = [size for size in largest_sizes.values() if size]
    if not fitting_sizes:
        raise UserError(
            f"the smallest size, {unit} {size_words}, does not fit into {machine.name}. Use "
            f"--quantize, --remat, a smaller {'--batch-size' if config.longest else '--seq-len'}, "
            "or more devices."
        )
    fitting_size = fitting_sizes[0]
    return largest_sizes, plan_of_size(fitting_size), ladders.get(fitting_size)


def _with_size(config: PlanConfig, size: int) -> PlanConfig:
    """Returns the options with another row length (for --longest) or another batch size."""
    if config.longest:
        return dataclasses.replace(config, seq_len=size)
    return dataclasses.replace(config, batch_size=size)


def print_results(
    config: PlanConfig,
    job: PlanJob,
    facts: dict[str, Any],
    plans: list[Plan],
    ladder: Ladder | None = None,
    token: Token | None = None,
) -> None:
    """Prints the plans, as JSON or as a table; the first plan is the requested one."""
    if config.json:
        _print_json(config, job, facts, plans, ladder, token)
        return
    estimates = [
        estimate_time_and_cost(variant_plan, config, job.machine) for variant_plan in plans
    ]
    console = Console(width=None if sys.stdout.isatty() else 120)
    print_plans(console, facts, plans, estimates)
    if ladder:
        print_ladder(console, ladder)
    step_clocks = [(variant_plan.name, variant_plan.clocks.get("step")) for variant_plan in plans]
    clocks_between = [
        (f"{plans[0].name}: {program}", clock)
        for program, clock in plans[0].clocks.items()
        if program != "step"
    ]
    print_clocks(console, job.machine, [*step_clocks, *clocks_between])
    if token:
        print_token(console, token)


def _print_json(
    config: PlanConfig,
    job: PlanJob,
    facts: dict[str, Any],
    plans: list[Plan],
    ladder: Ladder | None,
    token: Token | None,
) -> None:
    """Prints the requested plan as JSON, with the other plans and the policies of the ladder."""
    plans_json = [plan_as_json(variant_plan, config, job.machine) for variant_plan in plans]
    result = {**facts, **plans_json[0]}
    if token:
        result["token"] = dataclasses.asdict(token)
    result["others"] = plans_json[1:]
    result["ladder"] = (
        [dataclasses.asdict(rung) for rung in planned_rungs(ladder)] if ladder else []
    )
    print(json.dumps(result, indent=2))


def make_job(config: PlanConfig) -> tuple[PlanJob, OptimConfig]:
    """Builds the job of a plan, and the options of its optimiser.

    Raises:
      UserError: model, machine and mesh do not fit together.
    """
    outline = read_shapes(config.model, config.model_code)
    outline = outline.scaled(parse_rope_scaling(config.rope_scaling))
    outline = outline.quantized(config.quantize)
    outline.check_length(config.seq_len, f"--seq-len {config.seq_len}")
    outline.check_experts(config.experts)
    _check_images(config, outline)
    if config.decode_rows and outline.is_torch:
        raise UserError(
            f"--decode-rows {config.decode_rows} needs a decoder of this library, but "
            f"{config.model} "
            "runs as a torch module. Remove --decode-rows."
        )
    machine = find_machine(
        config.topology, config.capacity_gib, config.peak_tflops, config.mem_fraction
    )
    machine = with_assumptions(machine, config.kernel_share, config.link_gbytes)
    if config.utilisation is not None and machine.clock is not None:
        raise UserError(
            f"--utilisation {config.utilisation:g} has no effect, because the compiler of "
            f"{machine.name} estimates the time of a step. Remove --utilisation. To change the "
            "assumptions of the estimate, use --kernel-share or --link-gbytes."
        )
    mesh = make_mesh(config.mesh, config.batch_size, machine.devices, config.slice_axis)
    layout = Layout.of(mesh, outline.config)
    layout, form = choose_product_form(layout, config.collective_matmul)
    check_remat(config.remat, layout.platform, outline.config)
    for n in config.adapters:
        if (config.batch_size // n) % layout.batch_parts:
            raise UserError(
                f"--adapters {n} gives each adapter {config.batch_size // n} of the "
                f"{config.batch_size} sequences, but the mesh splits them into "
                f"{layout.batch_parts} parts. Increase --batch-size, or use a --mesh with smaller "
                "data and fsdp axes."
            )
    draws = TASKS[config.task].draws
    group, max_new_tokens = config.drawn if draws else (1, 0)
    job = PlanJob(
        outline=outline,
        layout=layout,
        machine=machine,
        batch_size=config.batch_size,
        grad_accum=config.grad_accum,
        seq_len=config.seq_len,
        loss_chunk=config.loss_chunk,
        dtype=config.dtype,
        attention=config.attention,
        experts=config.experts,
        products=form,
        task=config.task,
        group=group,
        max_new_tokens=max_new_tokens,
        prompt=config.seq_len - max_new_tokens if draws else config.prompt_len or 0,
        images=config.images,
    )
    job = _with_shared_prompts(job, config)
    layout.check_lengths([job.row_tokens])
    optim = OptimConfig(optimizer=config.optimizer, batch_size=config.batch_size)
    return job, fill_optimizer_defaults(optim, lr=1e-4, beta2=0.999)


def _with_shared_prompts(job: PlanJob, config: PlanConfig) -> PlanJob:
    """Returns the job with a prompt once per row, if a run would compute it once.

    Raises:
      UserError: --no-share-prompt has no effect.
    """
    sharing_job = dataclasses.replace(job, share_prompt=True)
    rows = PromptRows(
        completions=job.completions,
        share=job.prompt / job.seq_len,
        rows=sharing_job.rows,
        shared=(sharing_job.rows, sharing_job.row_tokens),
        alone=(job.rows, job.row_tokens),
    )
    reason: str | None = "there is no prompt that completions share"
    if job.completions > 1 and job.prompt:
        reason = obstacle(
            [job.outline], job.layout, rows, attention=config.attention, dtype=config.dtype
        )
    if reason and not config.share_prompt:
        raise UserError(
            f"--no-share-prompt has no effect, because {reason}. Remove --no-share-prompt."
        )
    return job if reason or not config.share_prompt else sharing_job


def _check_images(config: PlanConfig, outline: ModelInfo) -> None:
    """Raises a UserError if the model cannot read --images, or a row is too short for them."""
    if not config.images:
        return
    if not isinstance(outline.config, SmolVLMConfig):
        raise UserError(
            f"--images {config.images} needs a model that reads images of one size, but a plan "
            "treats "
            f"{config.model} as a model of text. Remove --images, or use a SmolVLM model."
        )
    image_tokens = config.images * outline.config.tokens_per_image
    if image_tokens > config.seq_len:
        raise UserError(
            f"--images {config.images} takes {image_tokens} tokens of a row, but --seq-len is only "
            f"{config.seq_len}. Increase --seq-len, or reduce --images."
        )


def requested_adapter(options: PlanOptions) -> AdapterConfig:
    """Returns the parameters that the requested variant trains."""
    if options.adapter.full:
        return AdapterConfig(full=True)
    return dataclasses.replace(options.adapter, full=False)


def variants_to_plan(
    options: PlanOptions, job: PlanJob | None = None, ladder: Ladder | None = None
) -> list[PlanVariant]:
    """Returns the requested variant and, without --alone, others to compare it with.

    Args:
      options: the options.
      job: if given, the variant with the other form of products with sharded kernels is one, too.
      ladder: policies of --remat auto: the requested variant is the one that the search ended
        with, and the others are its other policies.
    """
    config = options.plan
    adapter = requested_adapter(options)
    lora = dataclasses.replace(options.adapter, full=False)
    remat = ladder.remat if ladder else config.remat or "none"
    if config.adapters:
        return [PlanVariant(lora, remat, n_adapters) for n_adapters in config.adapters]
    requested = PlanVariant(adapter, remat)
    if config.alone or config.longest or config.largest_batch:
        return [requested]
    comparisons: list[PlanVariant] = []
    if job is not None and job.products is not None:
        other_form: Form = "windowed" if job.products.form == "whole" else "whole"
        comparisons.append(dataclasses.replace(requested, products=other_form))
    if ladder:
        comparisons += [PlanVariant(adapter, policy) for policy in ladder.search.rungs]
    else:
        policies = ("full", "dots_with_no_batch_dims_saveable", "none")
        comparisons += [PlanVariant(lora, policy) for policy in policies]
    comparisons.append(PlanVariant(AdapterConfig(full=True), "full"))
    return [*dict.fromkeys((requested, *comparisons))]  # without duplicates


def plan_as_json(variant_plan: Plan, config: PlanConfig, machine: Machine) -> dict[str, Any]:
    """Returns a plan and its estimates as JSON."""
    return {
        **dataclasses.asdict(variant_plan),
        **estimate_time_and_cost(variant_plan, config, machine),
    }


def estimate_time_and_cost(
    variant_plan: Plan, config: PlanConfig, machine: Machine
) -> dict[str, float | None]:
    """Returns the seconds of a step, the chip-hours and the cost; None for unknown ones.

    The time is the compiler's estimate. Without an estimate, it assumes a share of the peak.
    """
    step_seconds = variant_plan.estimated_seconds
    flops = variant_plan.flops_per_chip
    if step_seconds is None and flops is not None and machine.flops is not None:
        utilisation = config.utilisation or DEFAULT_UTILISATION
        step_seconds = flops / (machine.flops * utilisation)
    chip_hours: float | None = None
    cost: float | None = None
    if step_seconds is not None and config.tokens is not None:
        n_sequences = config.batch_size * config.grad_accum * TASKS[config.task].sequences
        n_steps = config.tokens / (n_sequences * config.seq_len)
        chip_hours = n_steps * step_seconds * machine.n_chips / 3600
        cost = None if config.price is None else chip_hours * config.price
    return {"step_seconds": step_seconds, "chip_hours": chip_hours, "cost": cost}


def find_largest_fit(
    plan_of: Callable[[int], Plan], start_size: int, unit: int, size_limit: int, share: float
) -> int | None:
    """Finds the largest size that fits into a share of the memory; None if a unit does not fit.

    Args:
      plan_of: makes the plan of a size.
      start_size: the first size to try.
      unit: all sizes that are tried are multiples of it.
      size_limit: the largest size to try.
      share: the share of a device's memory.

    Returns:
      The size, within a unit or a 64th of it.
    """
    size_limit -= size_limit % unit
    if size_limit < unit:
        return None
    size = min(size_limit, max(unit, start_size - start_size % unit))
    # The answer is at least largest_fitting, and below smallest_refused.
    largest_fitting = 0
    smallest_refused = size_limit + unit
    total_bytes: dict[int, int] = {}  # size -> bytes of a device
    was_refused = False
    while True:
        # Plan the size, and move one of the two bounds to it.
        size_plan = plan_of(size)
        is_fitting = size_plan.fits_share[f"{share:g}"]
        size_bytes = size_plan.per_chip_bytes["total"]
        if size_bytes is not None:
            total_bytes[size] = size_bytes
        if is_fitting:
            largest_fitting = size
        else:
            smallest_refused = size
        # Stop when the bounds are as close as the precision of the search.
        step = max(unit, largest_fitting // _STEPS_PER_SIZE // unit * unit)
        if smallest_refused - largest_fitting <= step:
            return largest_fitting or None
        # Guess the next size from the memory of the sizes so far.
        capacity = share * (size_plan.per_chip_bytes["capacity"] or 0)
        guess = _interpolate_size(total_bytes, capacity)
        # After two refusals, memory grows as a curve, and a line through two points misleads.
        is_line_misleading = was_refused and not is_fitting
        if guess is None or is_line_misleading:
            is_refusal_known = smallest_refused <= size_limit
            if is_refusal_known:
                guess = (largest_fitting + smallest_refused) // 2
            else:
                guess = 2 * largest_fitting
        elif is_fitting:
            guess = max(guess, largest_fitting + step)
        was_refused = not is_fitting
        # The next size is a multiple of the unit, strictly between the bounds.
        rounded_guess = int(guess) // unit * unit
        size = min(smallest_refused - unit, max(largest_fitting + unit, rounded_guess))


def _interpolate_size(total_bytes: dict[int, int], capacity: float) -> float | None:
    """Returns the size at which a line through the two nearest plans meets the capacity.

    Args:
      total_bytes: the bytes of a device by size.
      capacity: the bytes that a device has.

    Returns:
      The size; None for fewer than two plans, or if the larger size does not take more memory.
    """
    if len(total_bytes) < 2:
        return None
    nearest_sizes = sorted(total_bytes, key=lambda size: abs(total_bytes[size] - capacity))[:2]
    small_size, large_size = sorted(nearest_sizes)
    small_bytes = total_bytes[small_size]
    large_bytes = total_bytes[large_size]
    if large_bytes <= small_bytes:
        return None
    free_bytes = capacity - small_bytes
    return small_size + (large_size - small_size) * free_bytes / (large_bytes - small_bytes)


if __name__ == "__main__":
    main(sys.argv[1:])
