"""Adapters that train side by side: the settings of each, and those that a stack shares."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from lora_jax.core.types import BaseLike, Leaf, Tree
from lora_jax.core.weight import LoraWeight, Node, Trained, TrainedRows
from lora_jax.lorafy import nodes_of
from lora_jax.select.sharing import paths_with_shared_arrays
from lora_jax.training.losses import CROSS_ENTROPY, Loss
from lora_jax.training.optimizer import has_dropout, make_optimizer
from lora_jax.training.step import State

Arrays = dict[str, dict[str, Leaf]]  # by path and name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tenant:
    """An adapter that trains side by side with others over one base.

    Attributes:
      params: the adapted tree to begin with.
      schedule: the learning rate by the number of updates.
      steps: the number of steps after which it is done.
      loss: the function to minimise.
      optimizer: a name that `lora_jax.training.make_optimizer` takes.
      weight_decay, grad_clip, lora_plus, options: see `lora_jax.training.make_optimizer`.
      key: a PRNG key, for dropout and noise.
      noise: the size of the noise on embeddings; see `lora_jax.training.neftune`.
      state: the state to go on from, as `lora_jax.training.init_state` or `Together.state` returned
        it; the beginning by default.
    """

    params: Tree
    schedule: optax.Schedule
    steps: int
    loss: Loss = CROSS_ENTROPY
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    lora_plus: float | None = None
    options: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    key: jax.Array = dataclasses.field(default_factory=lambda: jax.random.key(0))
    noise: float = 0.0
    state: State | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Tenant: steps={self.steps} must be at least 1.")
        if not nodes_of(self.params):
            raise ValueError("Tenant: params is a plain tree. Pass the tree that lorafy returned.")
        if self.done > self.steps:
            raise ValueError(
                f"Tenant: the state has {self.done} steps, more than steps={self.steps}."
            )

    @property
    def done(self) -> int:
        """Returns the number of steps that the adapter has taken already."""
        return 0 if self.state is None else int(self.state.step)


@dataclasses.dataclass(frozen=True)
class StackKind:
    """Holds the settings that all adapters of a stack share, on which its compiled step depends.

    Attributes:
      shells: by path, a node without arrays; `shapes` has those of its arrays.
      shapes: by path, the structure of the node and the shapes and dtypes of its arrays.
      loss, optimizer, lora_plus, options: see `Tenant`.
      clips: whether gradients are clipped.
      dropout: whether the loss gets a key.
      noise: see `Tenant`.
    """

    shells: Mapping[str, Node] = dataclasses.field(compare=False)
    shapes: tuple[Any, ...]
    loss: Loss
    optimizer: str
    lora_plus: float | None
    options: tuple[tuple[str, float], ...]
    clips: bool
    dropout: bool
    noise: float = 0.0

    @classmethod
    def from_tenant(cls, tenant: Tenant) -> "StackKind":
        """Returns the kind of an adapter; raises a ValueError if its weights share arrays."""
        nodes = nodes_of(tenant.params)
        sharing_paths = paths_with_shared_arrays(nodes)
        if sharing_paths:
            raise ValueError(
                f"{sharing_paths[0]!r} shares the A or the vector of another weight "
                "(share_a=True, weight_tying), which is not possible for adapters that "
                "train side by side. Train it alone, or give each weight its own."
            )
        activated_paths = [p for p, node in nodes.items() if getattr(node, "invocation", None)]
        if activated_paths:
            raise ValueError(
                f"{activated_paths[0]!r} belongs to an activated LoRA, which cannot train "
                "side by side with others. Train it alone."
            )
        options = {name: value for name, value in tenant.options.items() if value is not None}
        return cls(
            shells={path: replace_arrays(node, None, {}) for path, node in nodes.items()},
            shapes=tuple((path, *_form(node)) for path, node in sorted(nodes.items())),
            loss=tenant.loss,
            optimizer=tenant.optimizer,
            lora_plus=tenant.lora_plus,
            options=tuple(sorted(options.items())),
            clips=bool(tenant.grad_clip),
            dropout=has_dropout(tenant.params) or tenant.noise > 0,
            noise=tenant.noise,
        )

    def make_optimizer(
        self, schedule: optax.Schedule, params: Tree, weight_decay: Leaf, grad_clip: Leaf
    ) -> optax.GradientTransformation:
        """Returns the optimiser of one adapter; its numbers may be traced."""
        return make_optimizer(
            self.optimizer,
            schedule,
            params,
            weight_decay=weight_decay,
            grad_clip=grad_clip if self.clips else 0.0,
            lora_plus=self.lora_plus,
            options=dict(self.options),
        )

    def slot_axis(self, path: str, name: str | None = None) -> int:
        """Returns the slot axis of a weight's arrays, which follows the batch axes.

        Args:
          path: path of the weight.
          name: name of the array; without it, of one that has all batch axes.
        """
        shell = self.shells[path]
        if not isinstance(shell, LoraWeight):
            return 0
        has_batch_axes = name is None or "batch" in shell.axes_of(name)
        if not has_batch_axes:
            return 0
        ndim_of_path = {node_path: ndim for node_path, _, _, ndim, _ in self.shapes}
        n_axes: int = ndim_of_path[path]
        return n_axes - len(shell.roles.in_axes) - len(shell.roles.out_axes)


def arrays_of(node: Node) -> dict[str, Leaf]:
    """Returns the arrays of a node, without W."""
    return node.arrays if isinstance(node, LoraWeight) else node.parts()


def replace_arrays(node: Node, base: BaseLike, arrays: Mapping[str, jax.Array]) -> Node:
    """Returns a node of the same structure with another base and other arrays."""
    if isinstance(node, LoraWeight):
        return node.replace(base=base, arrays=dict(arrays))
    value = arrays.get("value")
    if isinstance(node, Trained):
        return Trained(value)
    return node.replace(base=base, value=value)


def _form(node: Node) -> tuple[Hashable, ...]:
    """Returns a key of a node: its type, its settings, its number of axes and its shapes."""
    settings: tuple[Hashable, ...] = ()
    if isinstance(node, LoraWeight):
        settings = (node.roles, node.ranks, node.dropout, node.extras, node.frozen, node.uses)
    elif isinstance(node, TrainedRows):
        settings = (node.rows, node.is_table)
    shapes = []
    for name, array in sorted(arrays_of(node).items()):
        shapes.append((name, tuple(array.shape), np.dtype(array.dtype).name))
    return type(node).__name__, settings, len(node.shape), tuple(shapes)
