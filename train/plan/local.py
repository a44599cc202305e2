"""Plans the step of a run for the present devices, before the run reads its weights."""

import dataclasses
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import subspace
from lora_jax.core.types import Model, Tree
from lora_jax.subspace import Subspace
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss
from lora_jax.training.optimizer import takes_from_base
from lora_jax.training.remat import compiled_bytes
from lora_jax.training.setup import Setup
from lora_jax.training.step import State
from train.live.reference import reference_params
from train.options.common import Options
from train.options.optim import make_optimizer, make_schedule
from train.plan.between import Program, programs_between
from train.plan.compile import STEP
from train.plan.flops.checked import StepWork, combine_works, count_traced, hlo_text_of, step_work
from train.plan.job import adapted_shapes, bytes_per_device, placed_shapes
from train.run.costs import tree_bytes
from train.run.intrinsic import model_in, moves_weights, space_of
from train.run.model_code import make_model
from train.run.pretrained import ModelInfo

_MATRIX_SIDE = 1024  # of the matrices of the measured product
_MEASURE_SECONDS = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalNeeds:
    """The memory of one device and the work of a step.

    Attributes:
      base, adapter, optimizer: bytes of arrays that stay.
      temporaries: bytes of a step's own; None where the compiler does not report them.
      between: the same of each program between steps, with what else it has in memory.
      capacity: bytes of a device; None where it does not say.
      checkpoint: bytes of a checkpoint on disk.
      flops: FLOPs of a step on all devices; None where they could not be counted.
      scored: FLOPs of what a reference or a scorer reads for a step; None likewise.
    """

    base: int
    adapter: int
    optimizer: int
    temporaries: int | None
    between: dict[str, int | None]
    capacity: int | None
    checkpoint: int
    flops: int | None
    scored: int | None

    @property
    def total(self) -> int | None:
        """The bytes of a device during a step, or between steps if that is more."""
        program_bytes = [self.temporaries, *self.between.values()]
        known_bytes = [size for size in program_bytes if size is not None]
        if len(known_bytes) < len(program_bytes):
            return None
        return self.base + self.adapter + self.optimizer + max(known_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalStep:
    """The step of a run for abstract weights.

    Attributes:
      config: the options of the run.
      outline: the model, without its weights.
      layout: the placement on the mesh of these devices.
      loss: the function to minimise.
      space: the subspace that trains; None for an adapter or the weights.
      params: the adapted tree, as shapes with shardings.
      setup: the parts of the step, but for the model.
      batch: the shapes of a batch, with shardings.
    """

    config: Options
    outline: ModelInfo
    layout: Layout
    loss: Loss
    space: Subspace | None
    params: Tree
    setup: Setup
    batch: dict[str, jax.ShapeDtypeStruct]

    @property
    def state(self) -> State:
        """The shapes of the state."""
        return self.setup.abstract_state(lj.split(self.params)[0])

    @property
    def base(self) -> Tree:
        """The shapes of the frozen half of the parameters."""
        return lj.split(self.params)[1]

    @property
    def base_bytes(self) -> int:
        """The bytes of the base on one device."""
        return bytes_per_device(self.base)

    def model(self, remat: str | None) -> Model:
        """Returns the model with a rematerialisation policy."""
        optim = dataclasses.replace(self.config.optim, remat=remat)
        return make_model(
            self.outline.config,
            jnp.dtype(optim.dtype),
            _param_dtype(self.config),
            remat=optim.remat_policy,
            attention=optim.attention,
            experts=optim.experts,
            params=self.outline.params,
        )

    def trace(self, remat: str | None) -> jax.stages.Traced:
        """Traces the step with a rematerialisation policy."""
        forward = self.setup.forward(model_in(self.space, self.model(remat)))
        return self.setup.trace(forward, self.loss, self.state, self.base, self.batch)


def local_step(
    config: Options, outline: ModelInfo, layout: Layout, loss: Loss, batch: dict[str, np.ndarray]
) -> LocalStep:
    """Returns the step of a run for abstract weights; see `LocalStep`.

    Args:
      config, outline, layout, loss: parts of the run; see `LocalStep`.
      batch: a batch of the largest shape.
    """
    optim = config.optim
    dtype = _param_dtype(config)
    space = space_of(config, outline.params)
    if space is None:
        params = adapted_shapes(outline, config.adapter, dtype, layout)
    else:
        model_params = outline.shapes(dtype, arrays=True)
        params = placed_shapes(subspace.tree_of(space, model_params), layout)
    schedule = make_schedule(optim, 1e-4, 1000)  # the memory depends on neither
    optimizer = make_optimizer(optim, schedule, params)
    batch_shapes = {
        name: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=layout.of_batch(array.shape, parts=True)
        )
        for name, array in batch.items()
    }
    return LocalStep(
        config=config,
        outline=outline,
        layout=layout,
        loss=loss,
        space=space,
        params=params,
        setup=Setup.make(layout, params, optimizer, schedule, noise=optim.neftune),
        batch=batch_shapes,
    )


def _param_dtype(config: Options) -> jnp.dtype[Any]:
    return jnp.dtype("float32" if moves_weights(config.adapter) else config.optim.dtype)


def local_needs(step: LocalStep, compiled_step: jax.stages.Compiled) -> LocalNeeds:
    """Compiles the programs between steps for abstract weights, and sums up what a run needs.

    Args:
      step: the step, with the policy of rematerialisation in its options.
      compiled_step: the step as it was compiled.

    Raises:
      UserError: a reference would need a second base.
      jax.errors.JaxRuntimeError: the compiler refuses a program, as a rule for want of memory.
    """
    layout = step.layout
    remat = step.config.optim.remat
    n_devices = layout.mesh.devices.size
    between: dict[str, int | None] = {}
    between_work: list[tuple[int, StepWork]] = []
    with jax.set_mesh(layout.mesh):
        for name, program in _trace_programs_between(step, remat).items():
            compiled = program.lowered.compile()
            # The program's own parameters, such as a reference's, are in memory beside the step's.
            temporaries = compiled_bytes(compiled).get(STEP)
            param_bytes = bytes_per_device(program.params) - program.shared_bytes
            between[name] = temporaries and temporaries + param_bytes
            if program.runs_per_step:
                count = count_traced(program.traced.jaxpr)
                work = step_work(hlo_text_of(compiled), count, n_devices)
                between_work.append((program.runs_per_step, work))
    step_count = count_traced(step.trace(remat).jaxpr)
    state = step.state
    return LocalNeeds(
        base=step.base_bytes,
        adapter=bytes_per_device(state.adapter),
        optimizer=bytes_per_device(state.opt_state),
        temporaries=compiled_bytes(compiled_step).get(STEP),
        between=between,
        capacity=memory_capacity_of(layout.mesh.devices.flat[0]),
        checkpoint=tree_bytes(state.adapter) + tree_bytes(state.opt_state),
        flops=step_work(hlo_text_of(compiled_step), step_count, n_devices).per_step,
        scored=combine_works(between_work).per_step,
    )


def _trace_programs_between(step: LocalStep, remat: str | None) -> dict[str, Program]:
    """Returns the programs between steps of a run, by name, for abstract weights."""
    config = step.config
    base = lj.strip(step.params)
    reference = reference_params(config, step.outline, base, takes_from_base(step.params))
    return programs_between(
        step.model(remat),
        step.layout,
        step.params,
        step.batch,
        chunk=getattr(config.optim, "loss_chunk", 0),
        group=getattr(config.data, "group", 1),
        reference=reference and placed_shapes(reference, step.layout),
    )


def memory_capacity_of(device: Any) -> int | None:
    """Returns the memory of a device in bytes; None if the device does not report it.

    The virtual devices of a CPU share the machine's memory.
    """
    if device.platform == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        n_devices = sum(device.platform == "cpu" for device in jax.devices())
        return memory // n_devices
    try:
        return device.memory_stats()["bytes_limit"]
    except (AttributeError, KeyError, TypeError, jax.errors.JaxRuntimeError):
        return None


def measure_flop_rate(dtype: str, devices: list[Any]) -> float:
    """Measures the FLOP/s of a matrix product on all devices together.

    Takes the best of some products on one device; the devices of a CPU share its cores.
    """
    is_cpu = devices[0].platform == "cpu"
    side = _MATRIX_SIDE if is_cpu else 8 * _MATRIX_SIDE
    matrix = jax.device_put(jnp.ones((side, side), jnp.dtype(dtype)), devices[0])
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best_seconds = math.inf
    start = time.perf_counter()
    deadline = start + _MEASURE_SECONDS
    while start < deadline:
        product(matrix, matrix).block_until_ready()
        end = time.perf_counter()
        best_seconds = min(best_seconds, end - start)
        start = end
    device_rate = 2 * side**3 / best_seconds
    return device_rate if is_cpu else device_rate * len(devices)
