"""Training in a random subspace: θ = θ₀ + P(θ_d), d numbers for all parameters of a tree.

Li et al., arXiv 1804.08838; Aghajanyan et al., arXiv 2012.13255. Each tensor i has a projection Pᵢ
of its own (Fastfood), drawn from the seed and the tensor's logical path; all share one θ_d.

- DID: θᵢ = θ₀ᵢ + Pᵢ(θ_d), with d numbers in θ_d.
- SAID: θᵢ = θ₀ᵢ + λ_l·Pᵢ(θ_{d−m}), with one λ_l for each of m layers, counted within d.

θ_d begins at zero and each λ at one, so the tree begins as it is.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lora_jax.base import is_base
from lora_jax.lorafy import Tree
from lora_jax.magnitude import wide
from lora_jax.paths import fold_in_path
from lora_jax.resolve import resolve
from lora_jax.rules import Targets, TrainRule
from lora_jax.subspace.fastfood import MOST, project
from lora_jax.subspace.layers import STACKS, Tensor, tensors_of
from lora_jax.weight import is_node, leaves_of

Kind = Literal["did", "said"]
Theta = dict[str, jax.Array]
_GENERATOR = "threefry2x32"  # of the draws, whatever JAX's default is


@dataclasses.dataclass(frozen=True)
class Subspace:
    """A random subspace of the parameters of a tree. It holds no arrays, and can be hashed.

    Attributes:
      dimension: d, the numbers that train.
      kind: "did" or "said".
      seed: of all projections.
      targets, exclude, stacks: the selection; see `make`.
      tensors: those that move.
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
        """D, the number of parameters that move."""
        return sum(tensor.size for tensor in self.tensors)

    def zeros(self, dtype: Any = jnp.float32) -> Theta:
        """Returns the start: θ_d = 0, and each λ = 1.

        Args:
          dtype: fp32 or fp64; projections are computed in it.

        Returns:
          {"theta": [d]}, or {"theta": [d − m], "scale": [m]} with "said".
        """
        if self.kind == "did":
            return {"theta": jnp.zeros(self.dimension, dtype)}
        m = len(self.layers)
        return {"theta": jnp.zeros(self.dimension - m, dtype), "scale": jnp.ones(m, dtype)}

    def params_of(self, theta: Mapping[str, Any], base: Tree, shardings: Tree = None) -> Tree:
        """Returns θ₀ + P(θ_d): the whole tree, as arrays that any function of the base runs on.

        Tensors that do not move are the base's very leaves. Each sum is taken in fp32 (or wider)
        and rounded once to the leaf's dtype. Call it inside the function that is differentiated,
        under `jax.jit`: beside the tree (and its gradient) it needs the memory of one tensor, of a
        scanned stack that of one layer. Projections are drawn anew in the backward pass.

        Args:
          theta: as `zeros` returns it.
          base: θ₀, the tree that the subspace was made for.
          shardings: a `NamedSharding` for each leaf of `base`. By default, arrays on a mesh keep
            their sharding; under `jax.jit`, where that is not known, the compiler chooses.

        Raises:
          ValueError: `theta` or `base` does not belong to the subspace.
        """
        leaves, treedef = leaves_of(base)
        self._check(theta, dict(leaves))
        where = [None] * len(leaves) if shardings is None else treedef.flatten_up_to(shardings)
        tensors = {tensor.path: tensor for tensor in self.tensors}

        def moved(path: str, leaf: Any, sharding: Any) -> Any:
            return self._moved(tensors[path], leaf, theta, sharding) if path in tensors else leaf

        return treedef.unflatten(
            moved(path, leaf, sharding)
            for (path, leaf), sharding in zip(leaves, where, strict=True)
        )

    def _moved(self, tensor: Tensor, leaf: Any, theta: Mapping[str, Any], sharding: Any) -> Any:
        keys = _keys(self.seed, tensor)
        shape = () if not tensor.is_stack else (len(tensor.names),)
        scales = jnp.ones(shape, theta["theta"].dtype)
        if self.kind == "said":
            scales = theta["scale"][jnp.asarray(tensor.layers)].reshape(shape)
        if (
            sharding is None
            and isinstance(leaf, jax.Array)
            and not isinstance(leaf, jax.core.Tracer)
        ):
            sharding = leaf.sharding if len(leaf.sharding.device_set) > 1 else None
        total = (_of_stack if tensor.is_stack else _of_tensor)(
            leaf, theta["theta"], keys.reshape(shape), scales
        )
        return total if sharding is None else _placed(total, sharding)

    def _check(self, theta: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
        wanted = {name: array.shape for name, array in jax.eval_shape(self.zeros).items()}
        found = {name: tuple(array.shape) for name, array in theta.items()}
        if found != wanted:
            raise ValueError(
                f"params_of: theta has {found}, and the subspace {wanted}: begin with "
                "space.zeros(), and keep to its structure"
            )
        for tensor in self.tensors:
            shape = getattr(leaves.get(tensor.path), "shape", None)
            if shape is None or tuple(shape) != tensor.shape:
                here = "missing" if shape is None else f"{list(shape)}"
                raise ValueError(
                    f"params_of: {tensor.path!r} is {here} in the base, and {list(tensor.shape)} "
                    "in the subspace: give the tree that it was made for"
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
      seed: of the projections, from 0 to 2³² − 1; with θ_d, all that has to be stored.
      targets, exclude: the leaves that move, as in `lora_jax.TrainRule`; all by default.
      stacks: names of the modules whose leaves have the layers on their first axis, each a run of
        whole path segments.

    Raises:
      ValueError: nothing is selected; d is more than there are parameters or, with "said", no more
        than there are layers; the tree is adapted; or a stack is none.

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
        raise ValueError(f"dimension={dimension!r}: d is an integer of at least 1")
    if kind not in ("did", "said"):
        raise ValueError(f"kind={kind!r}: choose 'did' or 'said'")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r}: a seed is an integer from 0 to 2**32 - 1")
    rule = TrainRule(targets=targets, exclude=exclude)
    chosen = _chosen(params, rule)
    stacks = (stacks,) if isinstance(stacks, str) else tuple(stacks)
    tensors, layers = tensors_of(chosen, stacks)
    space = Subspace(dimension, kind, seed, rule.targets, rule.exclude, stacks, tensors, layers)
    _check_sizes(space)
    return space


def _chosen(params: Tree, rule: TrainRule) -> dict[str, Any]:
    """Returns the leaves that move, by path."""
    leaves, _ = leaves_of(params)
    if adapted := [path for path, leaf in leaves if is_node(leaf)]:
        raise ValueError(
            f"the tree is adapted already (at {adapted[0]!r}): a subspace is one of a plain tree, "
            "lora_jax.strip(params) or lora_jax.merge(params)"
        )
    arrays = [(path, leaf) for path, leaf in leaves if hasattr(leaf, "shape")]
    if not any(jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in arrays):
        raise ValueError("the tree has no leaf of floating-point numbers: nothing can train")
    selected = resolve(arrays, [rule])
    chosen = {path: leaf for path, leaf in arrays if path in selected and 0 not in leaf.shape}
    for path, leaf in chosen.items():
        if is_base(leaf):
            raise ValueError(
                f"{path!r} is in codes, which cannot move by small steps: leave it out with "
                "exclude=[…], or decode the tree with lora_jax.quantized.dequantize(params)"
            )
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(f"{path!r} is complex: leave it out with exclude=[…]")
    return chosen


def _check_sizes(space: Subspace) -> None:
    m, d = len(space.layers), space.dimension
    if d > space.size:
        raise ValueError(
            f"dimension={d}, and the tensors have {space.size:,} entries in all: a subspace has at "
            "most as many dimensions"
        )
    if space.kind == "said" and d <= m:
        raise ValueError(
            f"dimension={d} with kind='said', and there are {m} layers with a number each "
            f"({', '.join(space.layers[:3])}, …): d has to be larger than {m}"
        )
    for tensor in space.tensors:
        if 2 * max(tensor.size // len(tensor.names), d) > MOST:
            raise ValueError(
                f"{tensor.path!r} has {tensor.size:,} entries, d is {d:,}: at most {MOST // 2:,} "
                "a tensor are supported; leave it out with exclude=[…]"
            )


def draws_of(seed: int) -> jax.Array:
    """Returns some random bits, to tell whether another JAX draws the same from a seed: uint32."""
    return jax.random.bits(jax.random.key(seed, impl=_GENERATOR), (8,), jnp.uint32)


def _keys(seed: int, tensor: Tensor) -> jax.Array:
    """Returns the key of each tensor of a leaf, [n].

    They are constants to the compiler, which must not compute the draws itself.
    """
    with jax.ensure_compile_time_eval():
        key = jax.random.key(seed, impl=_GENERATOR)
        data = [jax.random.key_data(fold_in_path(key, name)) for name in tensor.names]
    data = jax.lax.optimization_barrier(jnp.stack(data))
    return jax.random.wrap_key_data(data, impl=_GENERATOR)


def _change(theta: jax.Array, key: jax.Array, scale: jax.Array, shape: Any) -> jax.Array:
    """Returns λP(θ_d) of one tensor. The scale comes first: λP(x) = P(λx), in d numbers."""
    dtype = wide(theta.dtype)
    x = theta.astype(dtype) * scale.astype(dtype)
    return project(x, key, math.prod(shape)).reshape(shape)


def _sum(leaf: Any, change: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(change.dtype, wide(leaf.dtype))
    return (leaf.astype(dtype) + change.astype(dtype)).astype(leaf.dtype)


# Keeps θ_d and a key for the backward pass, rather than the draws.
_drawn_again = jax.checkpoint(_change, static_argnums=3)


@jax.jit  # tensors of one shape share one compiled function
def _of_tensor(leaf: Any, theta: jax.Array, key: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns θ₀ + λP(θ_d) of one tensor."""
    return _sum(leaf, _drawn_again(theta, key, scale, leaf.shape))


@jax.custom_jvp
def _layer_by_layer(leaf: Any, theta: jax.Array, keys: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns θ₀ + λP(θ_d) of a stack, each layer in its place.

    (`jax.lax.map` begins with a stack of zeros, of which two loops of one shape make a copy.)
    """

    def layer(i: jax.Array, total: jax.Array) -> jax.Array:
        change = _change(theta, keys[i], scales[i], leaf.shape[1:])
        return total.at[i].set(_sum(total[i], change))

    return jax.lax.fori_loop(0, leaf.shape[0], layer, leaf)


@functools.partial(_layer_by_layer.defjvp, symbolic_zeros=True)
def _layer_by_layer_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the sum and its tangent, dθ₀ + P(λ·dθ_d + dλ·θ_d)."""
    leaf, theta, keys, scales = primals
    fixed = isinstance(tangents[0], SymbolicZero)  # no array of zeros for a base that is constant
    d_leaf, d_theta, d_scales = (
        jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
        for x in (scales if fixed else tangents[0], tangents[1], tangents[3])
    )

    def layer(one: Any) -> jax.Array:
        d_one, key, scale, d_scale = one
        x = d_theta * scale + d_scale * theta
        change = _drawn_again(x, key, jnp.ones_like(scale), leaf.shape[1:])
        return change.astype(leaf.dtype) if fixed else _sum(d_one, change)

    total = _layer_by_layer(leaf, theta, keys, scales)
    return total, jax.lax.map(layer, (d_leaf, keys, scales, d_scales))


_of_stack = jax.jit(_layer_by_layer)


def _placed(array: jax.Array, sharding: Any) -> jax.Array:
    if isinstance(array, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(array, sharding)
    return jax.device_put(array, sharding)
