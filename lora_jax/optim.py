"""Optax transformations for adapted trees: freezing the base, rates for A and B, and rate formulas.

`freeze_base` is for those who optimise the whole adapted tree. The other transforms take updates of
an adapter (the first half of `lora_jax.split`) or of a whole tree, and chain with any optimiser:

    optax.chain(optax.adamw(2e-4), lora_plus(ratio=16))
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lora_jax.core.axes import EMBEDDING_NAMES
from lora_jax.core.base import is_abstract
from lora_jax.core.paths import leaf_name
from lora_jax.core.types import Tree
from lora_jax.core.weight import LoraWeight
from lora_jax.lorafy import map_parts, nodes_of, trainable_mask


def freeze_base(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `optimizer` for a whole adapted tree; it updates only the trained arrays.

    The frozen arrays get updates of zero (weight decay included) and no optimiser state. It is for
    gradients of the whole tree. Differentiating the adapter alone (`lora_jax.split`) costs less,
    since no gradient of the base is computed, and needs no `freeze_base`.
    (`optax.masked` alone would pass the base's gradients through as updates.)

    Args:
      optimizer: the optimiser of the arrays that train.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> optimizer = lj.optim.freeze_base(optax.adam(1e-3))
    >>> state = optimizer.init(tree)
    >>> updates, state = optimizer.update(jax.tree.map(jnp.ones_like, tree), state, tree)
    >>> float(updates["dense"]["bias"][0])
    0.0
    """

    def labels(params: Tree) -> Tree:
        return jax.tree.map(lambda trains: "train" if trains else "freeze", trainable_mask(params))

    return optax.partition({"train": optimizer, "freeze": optax.set_to_zero()}, labels)


def scale_factors(
    *, a: float = 1.0, b: float = 1.0, embedding: float | None = None
) -> optax.GradientTransformation:
    """Multiplies the updates of A by `a` and those of B by `b`, like separate learning rates.

    Chain it after an optimiser with its weight decay: A then learns at ``lr·a``, B at ``lr·b``, and
    all else that trains at `lr`.

    Args:
      a, b: the factors.
      embedding: the factor for both A and B of embeddings; None: as for other weights.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> adapter, base = lj.split(tree)
    >>> scaled = lj.optim.scale_factors(b=4.0)
    >>> updates, _ = scaled.update(jax.tree.map(jnp.ones_like, adapter), scaled.init(adapter))
    >>> float(updates["dense/kernel"]["a"][0, 0]), float(updates["dense/kernel"]["b"][0, 0])
    (1.0, 4.0)
    """

    def scale_update(path: str, name: str, update: jax.Array) -> jax.Array:
        """Scales the update of one array."""
        if name not in ("a", "b"):
            return update
        factor = a if name == "a" else b
        if embedding is not None and leaf_name(path) in EMBEDDING_NAMES:
            factor = embedding
        return update * jnp.asarray(factor, update.dtype)

    return optax.stateless(lambda updates, _: map_parts(scale_update, updates))


def lora_plus(
    ratio: float = 16.0, *, embedding: float | None = None
) -> optax.GradientTransformation:
    """Makes B learn `ratio` times as fast as A: LoRA+ (Hayou et al., arXiv 2402.12354).

    Args:
      ratio: λ, of B's learning rate to A's, which is the optimiser's; 16 in the paper.
      embedding: the factor for the factors of embeddings. (PEFT sets their learning rate to 1e-6:
        give 1e-6 / lr for that.)

    Raises:
      ValueError: `ratio` is not a positive number.

    >>> optimizer = optax.chain(optax.adamw(2e-4), lj.optim.lora_plus(16.0))
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise ValueError(
            f"ratio={ratio!r} is not valid. Pass a positive number, the learning rate of B divided "
            "by that of A."
        )
    return scale_factors(b=ratio, embedding=embedding)


class ProjectionState(NamedTuple):
    """The state of `project_b`.

    Attributes:
      inverse: (AᵀA + δI)⁺ / s² of each weight, by path, [batch…, r, r]; constant, as A is frozen.
    """

    inverse: dict[str, jax.Array]


def project_b(params: Tree, *, damping: float = 1e-8) -> optax.GradientTransformation:
    """Projects the gradient of B as LoRA-FA does: g ← (AᵀA + δI)⁺ g / s².

    Chain it before an optimiser. With A fixed, B's step then changes W as closely as possible to
    a step of full fine-tuning (Zhang et al., arXiv 2308.03303; PEFT's
    ``create_lorafa_optimizer``). It is for weights with ``freeze_a=True``, and leaves a weight
    whose A trains alone.

    Args:
      params: the adapted tree: A and s are read from it once.
      damping: δ.

    Raises:
      ValueError: A trains in every weight.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> rule = lj.LoraRule(targets=["dense"], rank=2, freeze_a=True)
    >>> tree = lj.lorafy(params, [rule])
    >>> optimizer = optax.chain(lj.optim.project_b(tree), optax.adam(1e-3))
    """
    inverse = {
        path: _inverse_gram(node, damping)
        for path, node in nodes_of(params).items()
        if isinstance(node, LoraWeight) and node.frozen == ("a",)
    }
    if not inverse:
        raise ValueError(
            "project_b needs weights whose A is frozen. Use LoraRule(freeze_a=True, …)."
        )

    def update(
        updates: Tree, state: ProjectionState, params: Tree = None
    ) -> tuple[Tree, ProjectionState]:
        """Projects the gradients of all B's."""
        del params

        def project(path: str, name: str, gradient: jax.Array) -> jax.Array:
            """Projects one gradient."""
            if name != "b" or path not in state.inverse:
                return gradient
            inverse = state.inverse[path].astype(gradient.dtype)  # [batch…, r, r]
            n_batch = inverse.ndim - 2
            batch = tuple(range(n_batch))
            dims = (((n_batch + 1,), (n_batch,)), (batch, batch))
            return lax.dot_general(inverse, gradient, dims, precision=lax.Precision.HIGHEST)

        return map_parts(project, updates), state

    return optax.GradientTransformation(lambda _: ProjectionState(inverse), update)


def _inverse_gram(node: LoraWeight, damping: float) -> jax.Array:
    """Returns (AᵀA + δI)⁺ / s²; zeros where factors are abstract (`jax.ShapeDtypeStruct`)."""
    batch = node.a.shape[: node.n_batch]
    if is_abstract(node.a):
        return jnp.zeros((*batch, node.rank, node.rank), node.a.dtype)
    a = node.a.reshape(*batch, node.rank, -1)  # [batch…, r, in]
    gram = jnp.matmul(a, a.mT, precision=lax.Precision.HIGHEST)
    damped = gram + jnp.asarray(damping, gram.dtype) * jnp.eye(node.rank, dtype=gram.dtype)
    scale = node.scale[..., None, None].astype(gram.dtype)
    # A layer that is not adapted has s = 0, and no gradient either.
    squared_scale = jnp.where(scale == 0, 1, scale * scale)
    return jnp.linalg.pinv(damped, hermitian=True) / squared_scale


def learning_rate(
    hidden_size: int,
    *,
    family: Literal["llama", "qwen"] = "llama",
    steps: int | None = None,
    full: bool = False,
) -> float:
    """Returns a first guess of the learning rate: lr = 5e-5 · 10 · (2000 / hidden_size)^p.

    Fitted over 14 models by *LoRA Without Regret* (Schulman et al., Thinking Machines, 2025), with
    alpha = 32 and a constant schedule; nearly independent of the rank. For short runs, under 100
    steps, the best rate is about 15 times that of full fine-tuning rather than 10.

    Args:
      hidden_size: the model's width, d_model.
      family: sets the exponent p: 0.781 for Llama, 0.0775 for Qwen.
      steps: length of the run, in optimiser steps; None: 100 or more.
      full: full fine-tuning's rate, without the factor.

    Raises:
      ValueError: the family is unknown, or a size or a number of steps is below 1.

    >>> round(lj.optim.learning_rate(2048, family="llama"), 6)
    0.000491
    """
    exponents = {"llama": 0.781, "qwen": 0.0775}
    if family not in exponents:
        raise ValueError(
            f"family={family!r} is unknown. The rule was fitted for {' and '.join(exponents)} "
            "models. Use one of these names."
        )
    if hidden_size < 1 or (steps is not None and steps < 1):
        raise ValueError(
            f"hidden_size={hidden_size} and steps={steps} must be at least 1. Pass the width of "
            "the model and the length of the run."
        )
    is_short = steps is not None and steps < 100
    factor = 15.0 if is_short else 10.0
    width_factor: float = (2000 / hidden_size) ** exponents[family]
    return 5e-5 * (1.0 if full else factor) * width_factor


def expert_rank(rank: int, active: int) -> int:
    """Returns the rank per expert such that a token's experts together have `rank`, at least 1.

    It is `rank` divided by the number of experts that are active for a token (*LoRA Without
    Regret*): ``LoraRule(targets=["experts"], rank=expert_rank(16, active=8))``.

    Args:
      rank: rank of a dense layer's adapter.
      active: the number of experts that a token is sent to.

    Raises:
      ValueError: a number below 1.

    >>> lj.optim.expert_rank(16, active=8)
    2
    """
    if rank < 1 or active < 1:
        raise ValueError(f"rank={rank} and active={active} must be at least 1.")
    return max(1, rank // active)
