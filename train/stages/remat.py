"""Chooses the rematerialisation policy of runs: its default, a resumed run's, and --remat auto."""

import contextlib
import functools
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.types import Tree
from lora_jax.folders import cache_folder
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.layout import Layout
from lora_jax.training.processes import is_first
from lora_jax.training.remat import (
    Attempt,
    RematSearch,
    countable_layers,
    expected_bytes,
    is_refusal,
    rungs_for,
)
from lora_jax.training.step import State
from train.console.errors import UserError
from train.options.common import AUTO, Options
from train.options.file import replace_options
from train.plan.compile import compiler_message
from train.plan.job import bytes_per_device
from train.plan.local import memory_capacity_of
from train.processes import hosts
from train.run.costs import versions
from train.run.output import saved_options
from train.stages.inputs import Inputs

_POLICY_CACHE = "remat"  # the folder of found policies in the user's cache


def settle_remat(config: Options, platform: str) -> Options:
    """Returns the options with the --remat of a resumed run, or with the platform's default.

    "auto" remains for a new run on an accelerator, or if the user passed it. `settle_step` then
    chooses a policy.

    Raises:
      UserError: --resume was passed, but there is no run to resume.
    """
    requested = config.optim.remat
    if requested not in (None, AUTO):
        return config
    saved = saved_options(config)
    if saved:
        return replace_options(config, {"remat": saved.get("remat", "none")})
    if requested is None:
        requested = "none" if platform == "cpu" else AUTO
    return replace_options(config, {"remat": requested})


def settle_step(
    config: Options,
    inputs: Inputs,
    batches: Sequence[HostBatch],
    base: Tree,
    states: Sequence[State],
    compile_rung: Callable[[str], tuple[Any, int | None]],
    notice: Callable[[str], object],
) -> tuple[str, Any]:
    """Compiles the step of runs. With --remat auto, it tries policies until one fits.

    All processes must call this function. They use the memory of the smallest device, the largest
    step, and the clock of the first process. The policy is cached for later runs with the same
    shapes, devices and versions.

    Args:
      config: the options of one of the runs, which share the options that count here.
      inputs: the inputs of one of the runs.
      batches: a batch of each run, of the largest shape.
      base: the frozen parameters that the runs share, arrays or shapes.
      states: the state of each run, arrays or shapes.
      compile_rung: compiles the step with a policy; returns the step and its bytes, which are None
        if the compiler does not report them.
      notice: receives the reason why another policy is compiled, and the result of the search.

    Returns:
      The policy with its compiled step.

    Raises:
      UserError: with --remat auto, no policy that was tried fits, or the compiler failed for
        another reason.
    """
    requested = config.optim.remat
    if requested is not None and requested != AUTO:
        step, _ = compile_rung(requested)
        return requested, step
    outline = inputs.read.outline
    layout = inputs.layout
    length = inputs.read.data.facts["sequence_length"]
    arguments = [base, *((state.adapter, state.opt_state) for state in states)]
    capacity = smallest_device(layout)
    rungs = rungs_for(layout.platform, inputs.attention)
    batch_shapes: list[dict[str, tuple[int, ...]]] = []
    for batch in batches:
        batch_shapes.append({name: array.shape for name, array in batch.items()})
    # The policy that an earlier run with the same facts found.
    policy_facts = [
        capacity,
        rungs,
        layout.mesh.devices.flat[0].device_kind,
        dict(layout.mesh.shape),
        versions(),
        outline.config,
        inputs.attention,
        config.optim.dtype,
        [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments)],
        batch_shapes,
        (config.optim.experts, getattr(config.optim, "loss_chunk", None)),
    ]
    digest = hashlib.sha256(repr(policy_facts).encode()).hexdigest()
    cache_file = cache_folder() / _POLICY_CACHE / digest
    cached_policy: str | None = None
    if is_first():
        with contextlib.suppress(OSError):
            cached_policy = cache_file.read_text(encoding="utf-8")
    # The search starts with the cached policy, or the first one that is expected to fit.
    expected = expected_bytes(
        outline.config,
        outline.params,
        outline.kinds,
        tokens=sum(_tokens_per_device(layout, batch, length) for batch in batches),
        itemsize=jnp.dtype(config.optim.dtype).itemsize,
        arguments=bytes_per_device(arguments),
    )
    first_policy = hosts.gather(cached_policy)[0]
    # With --full, gradients would be sums of arrays as large as a stack.
    n_layers = 0 if config.adapter.full else countable_layers(outline.config)
    search = RematSearch.begin(rungs, capacity, expected, first_policy, n_layers)
    attempts = search.run(functools.partial(_try_policy, compile_rung), notice)
    best = search.best(attempts)
    line = search.describe(attempts)
    if best is None:
        raise UserError(
            f"{line}. Use a smaller --batch-size, shorter rows, --quantize or more devices. With "
            "--remat full, the run starts anyway, unless the compiler refuses the step."
        )
    notice(line)
    if is_first() and not config.run.dry_run:
        with contextlib.suppress(OSError):
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            cache_file.write_text(best.remat, encoding="utf-8")
    return best.remat, best.step


def _try_policy(compile_rung: Callable[[str], tuple[Any, int | None]], remat: str) -> Attempt:
    """Compiles the step with a policy, and returns the same attempt in all processes.

    Raises:
      UserError: the compiler failed for another reason than memory.
    """
    start_time = time.perf_counter()
    step: Any = None
    size: int | None = None
    refusal: str | None = None
    try:
        step, size = compile_rung(remat)
    except jax.errors.JaxRuntimeError as error:
        if not is_refusal(error):
            raise UserError(
                f"The compiler failed on the step with --remat {remat}, but not because of memory: "
                f"{compiler_message(error)}. Pass another policy, such as --remat full."
            ) from error
        refusal = str(error)
    seconds = time.perf_counter() - start_time
    # The attempt is refused if one process refused it, and its size is the largest one.
    process_results = hosts.gather([refusal, size, seconds])
    is_refused = any(process_refusal for process_refusal, _, _ in process_results)
    process_sizes = [
        process_size for _, process_size, _ in process_results if process_size is not None
    ]
    are_sizes_known = len(process_sizes) == len(process_results)
    _, _, first_seconds = process_results[0]
    return Attempt(
        remat=remat,
        size=max(process_sizes) if are_sizes_known else None,
        refused=is_refused,
        seconds=first_seconds,
        step=None if is_refused else step,
    )


def _tokens_per_device(layout: Layout, batch: HostBatch, length: int) -> int:
    """Returns the tokens of a batch on one device. A row without tokens counts as `length`."""
    first = next(iter(batch.values()))
    shape = batch["ids"].shape if "ids" in batch else (*first.shape[:2], length)
    sharding = layout.of_batch(shape, parts=True)
    return math.prod(sharding.shard_shape(shape)[1:])


def smallest_device(layout: Layout) -> int | None:
    """Returns the memory of the smallest device of all processes; None if one is unknown."""
    local_sizes = [memory_capacity_of(device) for device in layout.mesh.local_devices]
    sizes = [size for process_sizes in hosts.gather(local_sizes) for size in process_sizes]
    known_sizes = [size for size in sizes if size is not None]
    are_all_known = len(known_sizes) == len(sizes)
    return min(known_sizes) if sizes and are_all_known else None
