"""Training in a random subspace (--intrinsic): the subspace, and the model that runs in it."""

import dataclasses
from typing import Any

import lora_jax as lj
from lora_jax import subspace
from lora_jax.subspace import Subspace
from lora_jax.training.layout import Layout
from train.console.errors import as_user_errors
from train.options.common import AdapterConfig, Options


def space_of(config: Options, params: Any) -> Subspace | None:
    """Returns the subspace of --intrinsic; None without --intrinsic.

    Args:
      config: the options; --seed draws the projections.
      params: the model's parameters, or their shapes. All parameters change, including the head.

    Raises:
      UserError: the model has fewer parameters, or too many layers for --intrinsic-kind said.
    """
    adapter: Any = config.adapter
    if not is_intrinsic(adapter):
        return None
    with as_user_errors(ValueError, prefix=f"--intrinsic {adapter.intrinsic}: "):
        return subspace.make(
            params, dimension=adapter.intrinsic, kind=adapter.intrinsic_kind, seed=config.optim.seed
        )


def is_intrinsic(adapter: AdapterConfig) -> bool:
    """Returns True if --intrinsic is given, which only classifiers have."""
    return getattr(adapter, "intrinsic", None) is not None


def moves_weights(adapter: AdapterConfig) -> bool:
    """Returns True if the weights themselves train, and therefore must be float32."""
    return adapter.full or is_intrinsic(adapter)


def about_space(space: Subspace | None) -> dict[str, Any]:
    """Returns the facts of a subspace for its adapter's folder; see `lora_jax.subspace.load`."""
    return {} if space is None else {subspace.FACTS: subspace.facts_of(space)}


def model_in(space: Subspace | None, model: Any) -> Any:
    """Returns a model that runs on the trees of `lora_jax.subspace.tree_of`, or the model itself.

    Without a subspace, the result is the model itself.
    """
    return model if space is None else _SubspaceModel(model, space)


def merge_trained(space: Subspace | None, tree: Any) -> Any:
    """Returns the plain tree that contains the trained changes."""
    return lj.merge(tree) if space is None else subspace.merge(space, tree)


@dataclasses.dataclass(frozen=True)
class _SubspaceModel:
    """Runs a model on θ₀ + P(θ_d), which each call computes. It has all attributes of the model."""

    model: Any
    space: Subspace

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def clone(self, **changes: Any) -> "_SubspaceModel":
        """Returns a copy with a changed model."""
        return dataclasses.replace(self, model=self.model.clone(**changes))

    def apply(self, variables: Any, *args: Any, **options: Any) -> Any:
        """Runs the model on the changed parameters, with the sharding of the base."""
        tree = variables["params"]
        layout = self.model.placement
        shardings = None
        if isinstance(layout, Layout) and layout.mesh.size > 1:
            base = subspace.base_of(tree)
            shardings = lj.sharding.shardings(base, layout.table, layout.mesh)
        params = subspace.merge(self.space, tree, shardings)
        return self.model.apply({**variables, "params": params}, *args, **options)
