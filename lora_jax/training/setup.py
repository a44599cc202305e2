"""The training step on a mesh: the sharding of its state, and its compilation.

A run passes arrays, and a plan of the run passes their shapes; both compile the same step.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

import lora_jax as lj
from lora_jax.core.base import is_of_4_bits
from lora_jax.core.types import Adapter, Batch, Forward, Model, Shaped, Tree
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss
from lora_jax.training.neftune import neftune
from lora_jax.training.optimizer import has_dropout
from lora_jax.training.step import Metrics, State, init_state, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The parts of a training step, without the model.

    Attributes:
      where: the sharding of each array of the state; an optimiser's arrays are sharded like the
        adapter.
      step_shardings: the adapter's shardings within a step; see `Layout.step_shardings`.
      dropout: whether an adapter's input is dropped.
      noise: the size of the noise on embeddings; 0 for none. See `lora_jax.training.neftune`.
    """

    layout: Layout
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    where: State
    step_shardings: Any
    dropout: bool
    noise: float = 0.0

    @classmethod
    def make(
        cls,
        layout: Layout,
        params: Tree,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        *,
        noise: float = 0.0,
    ) -> "Setup":
        """Returns the setup for an adapted tree of placed arrays, or of shapes with shardings."""
        adapter, _ = lj.split(params)
        return cls(
            layout=layout,
            optimizer=optimizer,
            schedule=schedule,
            where=state_shardings(layout, adapter, optimizer),
            step_shardings=layout.step_shardings(params),
            dropout=has_dropout(params),
            noise=noise,
        )

    def forward(self, model: Model) -> Forward:
        """Returns a model's function for the loss, with its activations on the mesh.

        Compile its caller with the layout's `compiler_options`, as `trace` does: on a TPU, the
        experts of a mixture rely on them.
        """
        forward = lj.adapt(self.layout.constrained(model, dropout=self.dropout).apply)
        return neftune(forward, self.noise) if self.noise else forward

    def state(self, adapter: Adapter, key: jax.Array) -> State:
        """Returns the state before the first step, on the mesh."""
        init = functools.partial(init_state, optimizer=self.optimizer, key=key)
        state: State = jax.jit(init, out_shardings=self.where)(adapter)
        return state

    def abstract_state(self, adapter: Adapter) -> State:
        """Returns the shapes and shardings of that state."""
        shapes: State = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            _state_shapes(adapter, self.optimizer),
            self.where,
        )
        return shapes

    def trace(
        self, forward: Forward, loss: Loss, state: State, base: Tree, batch: Mapping[str, Shaped]
    ) -> jax.stages.Traced:
        """Traces the step for arrays like these; the step donates the state.

        Args:
          forward: the adapted function that the loss calls.
          loss: the function to minimise, and who divides it.
          state, base, batch: arrays, or shapes with shardings.

        Returns:
          The traced step, which has its jaxpr. It compiles with the layout's compiler options.
        """
        with jax.set_mesh(self.layout.mesh):
            traced: jax.stages.Traced = self._jitted(forward, loss).trace(state, base, batch)
        return traced

    def compile(
        self, forward: Forward, loss: Loss, state: State, base: Tree, batch: Mapping[str, Shaped]
    ) -> "jax.stages.Compiled | _Jitted":
        """Compiles the step for arrays like these; see `trace`."""
        jitted = self._jitted(forward, loss)
        with jax.set_mesh(self.layout.mesh):
            compiled: jax.stages.Compiled = jitted.lower(state, base, batch).compile()
        if self.layout.platform == "cpu" and any(map(is_of_4_bits, jax.tree.leaves(base))):
            return _Jitted(jitted, compiled, self.layout.mesh)
        return compiled

    def _jitted(self, forward: Forward, loss: Loss) -> Any:
        """Returns the jitted step on the layout's mesh."""
        step = make_step(
            forward,
            self.optimizer,
            self.schedule,
            dropout=self.dropout or self.noise > 0,
            loss=loss,
            gathered=lambda adapter: jax.lax.with_sharding_constraint(adapter, self.step_shardings),
        )
        with jax.set_mesh(self.layout.mesh):
            return jax.jit(
                step,
                donate_argnums=0,
                out_shardings=(self.where, self.layout.whole),
                compiler_options=self.layout.compiler_options,
            )


@dataclasses.dataclass(frozen=True)
class _Jitted:
    """A compiled step that is called through `jax.jit` instead of its executable.

    A program compiled ahead of time for CPUs refuses arrays of 4 bits: their `format` says another
    layout than the program's (JAX 0.10). The call compiles anew, or takes the compilation cache's.
    """

    jitted: Any
    compiled: jax.stages.Compiled
    mesh: Any

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self.jitted(*args)

    def memory_analysis(self) -> Any:
        return self.compiled.memory_analysis()

    def as_text(self) -> str | None:
        return self.compiled.as_text()


class CompiledStep:
    """Runs a step, compiled once for each shape of a batch."""

    def __init__(self, compiled: Callable[[State, Tree, Batch], Any]) -> None:
        self._compiled = compiled
        self._by_shape: dict[tuple[tuple[int, ...], ...], Any] = {}

    def __len__(self) -> int:
        """Returns the number of shapes compiled so far."""
        return len(self._by_shape)

    def __call__(self, state: State, base: Tree, batch: Batch) -> tuple[State, Metrics]:
        """Runs the step, which donates the state."""
        program = self.program(state, base, batch)
        state_and_metrics: tuple[State, Metrics] = program(state, base, batch)
        return state_and_metrics

    def program(self, state: State, base: Tree, batch: Batch) -> Any:
        """Returns the compiled step for a batch, compiled at the first batch of a shape."""
        shape = tuple(array.shape for array in batch.values())
        if shape not in self._by_shape:
            self._by_shape[shape] = self._compiled(state, base, batch)
        return self._by_shape[shape]

    def memory_analysis(self) -> Any:
        """Returns the memory use of the first compiled shape, the largest one."""
        return self._first_program().memory_analysis()

    def as_text(self) -> str | None:
        """Returns the optimised HLO of the first compiled shape."""
        text: str | None = self._first_program().as_text()
        return text

    def _first_program(self) -> Any:
        return next(iter(self._by_shape.values()))


def state_shardings(
    layout: Layout, adapter: Adapter, optimizer: optax.GradientTransformation
) -> State:
    """Returns the sharding of each array of a state."""
    replicated: Any = layout.whole
    opt_state = _state_shapes(adapter, optimizer).opt_state
    return State(
        adapter=jax.tree.map(lambda array: array.sharding, adapter),
        opt_state=_opt_state_shardings(opt_state, adapter, replicated),
        step=replicated,
        key=replicated,
    )


def _state_shapes(adapter: Adapter, optimizer: optax.GradientTransformation) -> State:
    """Returns the shapes of the state before the first step."""

    def init(adapter: Adapter) -> State:
        return init_state(adapter, optimizer, jax.random.key(0))

    shapes: State = jax.eval_shape(init, adapter)
    return shapes


def _opt_state_shardings(
    opt_state: optax.OptState, adapter: Adapter, replicated: NamedSharding
) -> Tree:
    """Returns the sharding of each array of the optimiser's state.

    An optimiser keeps its arrays in trees like the adapter's, so the last two keys of an array's
    path name the parameter. An array of the parameter's shape is sharded like it. An array that
    lacks one axis of the parameter (a row or a column of Adafactor's) is sharded like the other
    axes. All others are replicated, and so are rows where it is unclear which of two equal axes is
    missing.

    Args:
      opt_state: the state's shapes.
      adapter: the parameters, or their shapes with shardings.
      replicated: the sharding of a replicated array.
    """

    def sharding(keys: Any, array: Shaped) -> Sharding:
        """Returns the sharding of one array."""
        names = [getattr(key, "key", "") for key in keys]
        if len(names) < 2 or not isinstance(names[-2], str):  # a count, and the like
            return replicated
        path, name = names[-2:]
        parameter = adapter.get(path, {}).get(name)
        return (
            replicated if parameter is None else _sharding_like(parameter, array.shape, replicated)
        )

    return jax.tree_util.tree_map_with_path(sharding, opt_state)


def _sharding_like(
    parameter: jax.Array, shape: tuple[int, ...], replicated: NamedSharding
) -> Sharding:
    """Returns the sharding of an array shaped like a parameter, perhaps without one axis."""
    sharding: Sharding = parameter.sharding
    if shape == parameter.shape:
        return sharding
    if not isinstance(sharding, NamedSharding):
        return replicated
    mesh_axes = [*sharding.spec, *[None] * (parameter.ndim - len(sharding.spec))]
    specs = {
        PartitionSpec(*mesh_axes[:axis], *mesh_axes[axis + 1 :])
        for axis in range(parameter.ndim)
        if parameter.shape[:axis] + parameter.shape[axis + 1 :] == shape
    }
    return NamedSharding(sharding.mesh, specs.pop()) if len(specs) == 1 else replicated
