"""Asks the compiler what a run's own step needs on the devices that are here; reads no weights."""

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
from lora_jax.models.families import module_of
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss
from lora_jax.training.setup import Setup
from train.options.common import Options
from train.options.optim import make_optimizer, make_schedule
from train.plan.job import adapted_shapes, per_device, placed_shapes
from train.plan.plan_flops import count_traced, step_work
from train.run.intrinsic import moves_weights, running_in, space_of
from train.run.pretrained import Outline
from train.run.report import compiled_bytes, tree_bytes

_SIDE = 1024  # of the matrices of the measured product
_SECONDS = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """Memory of one device and work of a step.

    Attributes:
      base, adapter, optimizer: bytes of arrays that stay.
      temporaries: bytes of a step's own; None where the compiler does not report them.
      capacity: bytes of a device; None where it does not say.
      checkpoint: bytes of a checkpoint on disk.
      flops: FLOPs of a step on all devices; None where they could not be counted.
      compile_seconds: time of the compilation.
    """

    base: int
    adapter: int
    optimizer: int
    temporaries: int | None
    capacity: int | None
    checkpoint: int
    flops: int | None
    compile_seconds: float

    @property
    def total(self) -> int | None:
        """Returns the bytes of a device during a step."""
        held = self.base + self.adapter + self.optimizer
        return None if self.temporaries is None else held + self.temporaries


def needs(
    config: Options, outline: Outline, layout: Layout, loss: Loss, batch: dict[str, np.ndarray]
) -> Needs:
    """Compiles the step of a run for abstract weights, as the run will compile it.

    Args:
      config: the options of the run.
      outline: the model, without its weights.
      layout: the placement on the mesh of these devices.
      loss: the function to minimise.
      batch: a batch of the largest shape.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses the step, as a rule for want of memory.
    """
    optim = config.optim
    dtype = jnp.dtype("float32" if moves_weights(config.adapter) else optim.dtype)
    space = space_of(config, outline.params)
    if space is None:
        params = adapted_shapes(outline, config.adapter, dtype, layout)
    else:
        plain = outline.shapes(dtype, arrays=True)
        params = placed_shapes(subspace.tree_of(space, plain), layout)
    adapter, base = lj.split(params)
    schedule = make_schedule(optim, 1e-4, 1000)  # the memory depends on neither
    optimizer = make_optimizer(optim, schedule, params)
    setup = Setup.of(layout, params, optimizer, schedule, noise=optim.neftune)
    state = setup.abstract_state(adapter)
    model = module_of(
        outline.config,
        jnp.dtype(optim.dtype),
        dtype,
        remat=optim.remat_policy,
        attention=optim.attention,
        experts=optim.experts,
    )
    shapes = {
        name: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=layout.of_batch(array.shape, parts=True)
        )
        for name, array in batch.items()
    }
    began = time.perf_counter()
    with jax.set_mesh(layout.mesh):
        traced = setup.trace(setup.forward(running_in(space, model)), loss, state, base, shapes)
        compiled = traced.lower().compile()
    seconds = time.perf_counter() - began
    counted = count_traced(traced.jaxpr)
    work = step_work(compiled.as_text(), counted, layout.mesh.devices.size)
    return Needs(
        base=per_device(base),
        adapter=per_device(state.adapter),
        optimizer=per_device(state.opt_state),
        temporaries=compiled_bytes(compiled).get("temporaries"),
        capacity=capacity_of(layout.mesh.devices.flat[0]),
        checkpoint=tree_bytes(state.adapter) + tree_bytes(state.opt_state),
        flops=work.per_step,
        compile_seconds=seconds,
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
