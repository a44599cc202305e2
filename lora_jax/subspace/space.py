"""Trains in a random subspace: θ = θ₀ + P(θ_d), with d numbers for all parameters of a tree.

Li et al., arXiv 1804.08838; Aghajanyan et al., arXiv 2012.13255. Each tensor i has a projection Pᵢ
of its own (Fastfood), drawn from the seed and the tensor's logical path; all share one θ_d. Each is
weighted by its share of the entries, so that ‖P(θ_d)‖ ≈ ‖θ_d‖ over the tree.

- DID: θᵢ = θ₀ᵢ + Pᵢ(θ_d), with d numbers in θ_d.
- SAID: θᵢ = θ₀ᵢ + λ_l·Pᵢ(θ_{d−m}), with one λ_l for each of m layers, counted within d.

θ_d begins at zero and each λ at one, so the tree begins as it is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.core.base import is_base
from lora_jax.core.types import Leaf, Tree
from lora_jax.core.weight import is_node, leaves_of
from lora_jax.rules import Targets, TrainRule
from lora_jax.select.matching import LeafFacts, check_target_names
from lora_jax.select.resolve import resolve
from lora_jax.subspace.fastfood import MAX_ENTRIES
from lora_jax.subspace.layers import STACKS, Tensor, find_tensors
from lora_jax.subspace.moving import move_leaves, place_leaf, projection_keys

Kind = Literal["did", "said"]
Theta = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Subspace:
    """A random subspace of the parameters of a tree. It holds no arrays, and is hashable.

    Attributes:
      dimension: d, the number of parameters that train.
      kind: "did" or "said".
      seed: seed of all projections.
      targets, exclude, stacks: the selection; see `make`.
      tensors: tensors that move.
      layers: the names of the m layers; with "said", each has a λ.
    """

    dimension: int
    kind: Kind
    seed: int
    targets: Targets
    exclude: Targets
    stacks: tuple[str, ...]
    tensors: tuple[Tensor, ...] = dataclasses.field(repr=False)
    layers: tuple[str, ...] = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """D, the number of parameters that the subspace changes."""
        return sum(tensor.size for tensor in self.tensors)

    def zeros(self, dtype: DTypeLike = jnp.float32) -> Theta:
        """Returns the initial values: θ_d = 0, and each λ = 1.

        Args:
          dtype: fp32 or fp64; projections are computed in it.

        Returns:
          {"theta": [d]}, or {"theta": [d − m], "scale": [m]} with "said".
        """
        if self.kind == "did":
            return {"theta": jnp.zeros(self.dimension, dtype)}
        m = len(self.layers)
        return {"theta": jnp.zeros(self.dimension - m, dtype), "scale": jnp.ones(m, dtype)}

    def keys(self) -> jax.Array:
        """Returns the PRNG keys of the projections, uint32 [tensors, 2]."""
        return projection_keys(self.seed, self.tensors)

    def params_of(
        self, theta: Tree, base: Tree, shardings: Tree = None, keys: jax.Array | None = None
    ) -> Tree:
        """Returns θ₀ + P(θ_d): a plain tree for any function of the base.

        Tensors that do not move are the base's very leaves. Each sum is taken in fp32 (or wider)
        and rounded once to the leaf's dtype. Call it inside the function that is differentiated,
        under `jax.jit`: beside the tree (and its gradient) it needs the memory of one tensor, of a
        scanned stack that of one layer. Projections are drawn anew in the backward pass.

        Args:
          theta: as `zeros` returns it.
          base: θ₀, the tree that the subspace was made for.
          shardings: a `NamedSharding` for each leaf of `base`. By default, arrays on a mesh keep
            their sharding; under `jax.jit`, where that is not known, the compiler chooses.
          keys: as `keys` returns them. Given as an argument of a compiled function, they spare
            each seed a compilation of its own; by default they are constants of it.

        Raises:
          ValueError: `theta` or `base` does not belong to the subspace.
        """
        leaves, treedef = leaves_of(base)
        self._check_shapes(theta, dict(leaves))
        leaf_shardings = [None] * len(leaves)
        if shardings is not None:
            leaf_shardings = treedef.flatten_up_to(shardings)
        moved_leaves = move_leaves(
            keys=self.keys() if keys is None else keys,
            tensors=self.tensors,
            leaves=dict(leaves),
            theta=theta["theta"],
            scale=theta.get("scale"),
        )
        return treedef.unflatten(
            place_leaf(moved_leaves[path], leaf, sharding) if path in moved_leaves else leaf
            for (path, leaf), sharding in zip(leaves, leaf_shardings, strict=True)
        )

    def _check_shapes(self, theta: Mapping[str, jax.Array], leaves: Mapping[str, Leaf]) -> None:
        """Raises a ValueError unless θ_d and the leaves of a base have the subspace's shapes."""
        expected = {name: array.shape for name, array in jax.eval_shape(self.zeros).items()}
        shapes = {name: tuple(array.shape) for name, array in theta.items()}
        if shapes != expected:
            raise ValueError(
                f"params_of: theta has the structure {shapes}, but the subspace expects "
                f"{expected}. Start from space.zeros() and keep its structure."
            )
        for tensor in self.tensors:
            shape = getattr(leaves.get(tensor.path), "shape", None)
            if shape is None or tuple(shape) != tensor.shape:
                in_base = "is missing in the base"
                if shape is not None:
                    in_base = f"has the shape {list(shape)} in the base"
                raise ValueError(
                    f"params_of: {tensor.path!r} {in_base}, and has the shape "
                    f"{list(tensor.shape)} in the subspace. Pass the tree that the subspace was "
                    "made for."
                )


def make(
    params: Tree,
    *,
    dimension: int,
    kind: Kind = "did",
    seed: int = 0,
    targets: Targets = ".*",
    exclude: Targets = (),
    stacks: tuple[str, ...] = STACKS,
) -> Subspace:
    """Returns a random subspace of `dimension` numbers for the parameters of a tree.

    A tensor of a scanned stack gets the projection that it has in an unrolled tree: projections are
    drawn from logical paths, ``model/layers/3/mlp/kernel`` for layer 3 of the stack
    ``model/layers``, and for ``model/layers_3/mlp/kernel`` alike. A tensor of fewer than d entries
    gets a sum of projections, one for each block of θ_d (see `lora_jax.subspace.fastfood`).

    Args:
      params: a plain tree; its leaves may be `jax.ShapeDtypeStruct`\\ s.
      dimension: d.
      kind: "did", or "said" for a λ a layer, whose m numbers are counted in d. A layer is a block
        (of a list, or of a stack), or a module that stands beside the blocks.
      seed: seed of the projections, from 0 to 2³² − 1; with θ_d, all that has to be stored.
      targets, exclude: the leaves that move, as in `lora_jax.TrainRule`; all by default.
      stacks: names of the modules whose leaves have the layers on their first axis, each a run of
        whole path segments.

    Raises:
      ValueError: nothing is selected, or nothing by one of the names in `targets`; d is more than
        there are parameters or, with "said", no more than there are layers; the tree is adapted; or
        a stack is none.

    >>> params = {"up": {"kernel": jnp.ones((4, 3))}, "down": {"kernel": jnp.ones((3, 2))}}
    >>> space = lj.subspace.make(params, dimension=5, kind="said")
    >>> space.size, space.layers
    (18, ('down', 'up'))
    >>> theta = space.zeros()
    >>> jax.tree.map(jnp.shape, theta)
    {'scale': (2,), 'theta': (3,)}
    >>> def loss(theta):
    ...     moved = space.params_of(theta, params)
    ...     return jnp.sum((moved["up"]["kernel"] @ moved["down"]["kernel"]) ** 2)
    >>> gradient = jax.jit(jax.grad(loss))(theta)
    >>> gradient["theta"].shape
    (3,)
    """
    if isinstance(dimension, bool) or not isinstance(dimension, int) or dimension < 1:
        raise ValueError(
            f"dimension={dimension!r} is not valid. Pass an integer of at least 1, such as 1000."
        )
    if kind not in ("did", "said"):
        raise ValueError(f"kind={kind!r} is unknown. Choose 'did' or 'said'.")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r} is not valid. Pass an integer from 0 to 2**32 - 1.")
    rule = TrainRule(targets=targets, exclude=exclude)
    stacks = (stacks,) if isinstance(stacks, str) else tuple(stacks)
    tensors, layers = find_tensors(_selected_leaves(params, rule), stacks)
    space = Subspace(
        dimension=dimension,
        kind=kind,
        seed=seed,
        targets=rule.targets,
        exclude=rule.exclude,
        stacks=stacks,
        tensors=tensors,
        layers=layers,
    )
    _check_sizes(space)
    return space


def _selected_leaves(params: Tree, rule: TrainRule) -> dict[str, Leaf]:
    """Returns the leaves that the subspace changes, by path.

    Raises:
      ValueError: the tree is adapted, nothing is selected, or a selected leaf cannot move.
    """
    leaves, _ = leaves_of(params)
    for path, leaf in leaves:
        if is_node(leaf):
            raise ValueError(
                f"The tree is already adapted (at {path!r}), but a subspace needs a plain "
                "tree. Pass lora_jax.strip(params) or lora_jax.merge(params)."
            )
    arrays = [(path, leaf) for path, leaf in leaves if hasattr(leaf, "shape")]
    if not any(jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in arrays):
        raise ValueError(
            "The tree has no floating-point leaf, so there is nothing to train. Pass the "
            "parameters of your model."
        )
    decisions = resolve(arrays, [rule])
    check_target_names([rule], dict(arrays), LeafFacts())
    selected = {path: leaf for path, leaf in arrays if path in decisions and 0 not in leaf.shape}
    for path, leaf in selected.items():
        if is_base(leaf):
            raise ValueError(
                f"{path!r} is quantized, so it cannot change in small steps. Exclude it with "
                "exclude=[…], or dequantize the tree with "
                "lora_jax.quantized.dequantize(params)."
            )
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"{path!r} is complex, which a subspace does not support. Exclude it with "
                "exclude=[…]."
            )
    return selected


def _check_sizes(space: Subspace) -> None:
    """Raises a ValueError unless d is valid for the tensors and layers of a tree."""
    m = len(space.layers)
    d = space.dimension
    if d > space.size:
        raise ValueError(
            f"dimension={d} is larger than the number of parameters, {space.size:,}. Choose "
            "a smaller dimension."
        )
    if space.kind == "said" and d <= m:
        raise ValueError(
            f"dimension={d} is too small for kind='said', which spends one number on each of "
            f"the {m} layers ({', '.join(space.layers[:3])}, …). Choose a dimension larger "
            f"than {m}."
        )
    for tensor in space.tensors:
        if 2 * max(tensor.size // len(tensor.names), d) > MAX_ENTRIES:
            raise ValueError(
                f"{tensor.path!r} has {tensor.size:,} entries and the dimension is {d:,}, "
                f"but at most {MAX_ENTRIES // 2:,} entries per tensor are supported. Exclude the "
                "tensor with exclude=[…]."
            )
