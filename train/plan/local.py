"""Plans the step of a run for the devices that are here, before its weights are read."""

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
from train.plan.flops.checked import count_traced, step_work, text_of, together
from train.plan.job import adapted_shapes, bytes_per_device, placed_shapes
from train.run.costs import tree_bytes
from train.run.intrinsic import model_in, moves_weights, space_of
from train.run.model_code import make_model
from train.run.pretrained import ModelInfo

_SIDE = 1024  # of the matrices of the measured product
_SECONDS = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalNeeds:
    """Memory of one device and work of a step.

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
        """Returns the bytes of a device during a step, or between steps where it needs more."""
        held, most = self.base + self.adapter + self.optimizer, 0
        for needed in (self.temporaries, *self.between.values()):
            if needed is None:
                return None
            most = max(most, needed)
        return held + most


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
        """The bytes of a device that the base takes."""
        return bytes_per_device(self.base)

    def model(self, remat: str | None) -> Model:
        """Returns the model, with a policy of rematerialisation by its name among the options."""
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
        """Traces the step with a policy of rematerialisation."""
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
    optim, dtype = config.optim, _param_dtype(config)
    space = space_of(config, outline.params)
    if space is None:
        params = adapted_shapes(outline, config.adapter, dtype, layout)
    else:
        plain = outline.shapes(dtype, arrays=True)
        params = placed_shapes(subspace.tree_of(space, plain), layout)
    schedule = make_schedule(optim, 1e-4, 1000)  # the memory depends on neither
    optimizer = make_optimizer(optim, schedule, params)
    shapes = {
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
        batch=shapes,
    )


def _param_dtype(config: Options) -> jnp.dtype[Any]:
    return jnp.dtype("float32" if moves_weights(config.adapter) else config.optim.dtype)


def local_needs(step: LocalStep, compiled_step: jax.stages.Compiled) -> LocalNeeds:
    """Compiles the programs between steps, for abstract weights; returns the needs of all programs.

    Args:
      step: the step, with the policy of rematerialisation in its options.
      compiled_step: the step as it was compiled.

    Raises:
      UserError: a reference would need a second base.
      jax.errors.JaxRuntimeError: the compiler refuses a program, as a rule for want of memory.
    """
    config, outline, layout, params = step.config, step.outline, step.layout, step.params
    optim, state = config.optim, step.state
    adapted = takes_from_base(params)
    reference = reference_params(config, outline, lj.strip(params), adapted)
    traced = step.trace(optim.remat)
    with jax.set_mesh(layout.mesh):
        lowered = traced.lower()
        programs = {
            STEP: Program(traced, lowered, params, bytes_per_device(params))
        } | programs_between(
            step.model(optim.remat),
            layout,
            params,
            step.batch,
            chunk=getattr(optim, "loss_chunk", 0),
            group=getattr(config.data, "group", 1),
            reference=reference and placed_shapes(reference, layout),
        )
        compiled = {
            name: compiled_step if name == STEP else one.lowered.compile()
            for name, one in programs.items()
        }
    work = {
        name: step_work(
            text_of(compiled[name]), count_traced(one.traced.jaxpr), layout.mesh.devices.size
        )
        for name, one in programs.items()
        if one.times
    }
    temporaries = {name: compiled_bytes(one).get(STEP) for name, one in compiled.items()}
    between = {
        name: found and found + bytes_per_device(programs[name].params) - programs[name].shared
        for name, found in temporaries.items()
    }
    of_step = between.pop(STEP)
    return LocalNeeds(
        base=step.base_bytes,
        adapter=bytes_per_device(state.adapter),
        optimizer=bytes_per_device(state.opt_state),
        temporaries=of_step,
        between=between,
        capacity=capacity_of(layout.mesh.devices.flat[0]),
        checkpoint=tree_bytes(state.adapter) + tree_bytes(state.opt_state),
        flops=work.pop(STEP).per_step,
        scored=together([(programs[name].times, one) for name, one in work.items()]).per_step,
    )


def capacity_of(device: Any) -> int | None:
    """Returns the memory of a device, in bytes; None if it does not say.

    The virtual devices of a CPU share the machine's memory.
    """
    if device.platform == "cpu":
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return memory // len([one for one in jax.devices() if one.platform == "cpu"])
    try:
        return device.memory_stats()["bytes_limit"]
    except (AttributeError, KeyError, TypeError, jax.errors.JaxRuntimeError):
        return None


def measured_rate(dtype: str, devices: list[Any]) -> float:
    """Measures the FLOP/s of a product of two matrices here, on all devices together.

    Takes the best of some products on one device; the devices of a CPU share its cores.
    """
    side = _SIDE if devices[0].platform == "cpu" else 8 * _SIDE
    a = jax.device_put(jnp.ones((side, side), jnp.dtype(dtype)), devices[0])
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best, until = math.inf, time.perf_counter() + _SECONDS
    while (began := time.perf_counter()) < until:
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best * (1 if devices[0].platform == "cpu" else len(devices))
