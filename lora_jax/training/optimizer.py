"""The optimiser of an adapter, its weight decay, and properties of an adapted tree's training."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import optax
from optax import contrib

import lora_jax as lj
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.types import Adapter, Leaf, Tree
from lora_jax.core.weight import LoraWeight, is_node
from lora_jax.training.optimizers.named import optimizer_named, settings
from lora_jax.variants import PARTS


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    params: Tree = None,
    *,
    weight_decay: float | jax.Array = 0.0,
    grad_clip: float | jax.Array = 1.0,
    lora_plus: float | None = None,
    options: Mapping[str, float | None] | None = None,
) -> optax.GradientTransformation:
    """Returns an optimiser by name, for an adapter or for full fine-tuning.

    Each computes a direction from the gradient clipped to a norm. Weight decay is added to it, and
    the learning rate multiplies the sum; so decay is decoupled from the gradient in all of them
    (Loshchilov & Hutter, arXiv 1711.05101). Norms and biases do not decay.

    "schedule-free" takes gradients between its average and its newest parameters; evaluate and keep
    the average, see `averaged`. Give it a schedule that is a warmup, then constant.

    Args:
      name: "adamw", "lion", "adafactor", "muon", "schedule-free" or "sgd".
      schedule: the learning rate at each step.
      params: the adapted tree. "muon" needs it for the roles of the axes, and all need it where A
        is frozen, for B's gradient to be projected.
      weight_decay: weight decay of A, B, kernels and embeddings. It and grad_clip may be tracers.
      grad_clip: the largest norm of the gradient; the number 0 for no limit.
      lora_plus: the ratio of B's learning rate to A's (LoRA+).
      options: beta1, beta2, eps and momentum, of which each optimiser reads its own; None for its
        default. See `lora_jax.training.optimizers.named.OPTIMIZERS`.

    Raises:
      ValueError: there is no optimiser of this name, it does not read one of the options, or "muon"
        lacks `params`.

    >>> from lora_jax import training
    >>> tree = lj.lorafy({"kernel": jnp.ones((4, 3))}, [lj.LoraRule(targets=["kernel"], rank=2)])
    >>> muon = training.make_optimizer("muon", optax.constant_schedule(1e-3), tree)
    """
    optimizer = optimizer_named(name)
    option_values = settings(name, options or {})
    if name == "muon" and params is None:
        raise ValueError(
            "muon needs the adapted tree, because it orthogonalizes each factor along its axes. "
            "Pass params=, the tree that lorafy returned."
        )
    gradient_transforms = []
    is_clipped = isinstance(grad_clip, jax.Array) or bool(grad_clip)
    if is_clipped:
        gradient_transforms.append(optax.clip_by_global_norm(grad_clip))
    if any(weight.frozen == ("a",) for weight in _adapted_weights(params)):
        gradient_transforms.append(lj.optim.project_b(params))
    update_transforms = [
        optimizer.direction(params, **option_values),
        optax.add_decayed_weights(weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule),
    ]
    if lora_plus is not None:
        update_transforms.append(lj.optim.lora_plus(lora_plus))
    update: Any = optax.chain(*update_transforms)
    if optimizer.averages:
        update = contrib.schedule_free(update, schedule, b1=option_values["beta1"])
    return optax.chain(*gradient_transforms, update)


def adamw(
    schedule: optax.Schedule,
    params: Tree = None,
    *,
    b2: float = 0.999,
    weight_decay: float = 0.0,
    grad_clip: float = 1.0,
    lora_plus: float | None = None,
) -> optax.GradientTransformation:
    """Returns AdamW with gradient clipping by norm; norms and biases do not decay.

    Args:
      schedule: the learning rate at each step.
      params: the adapted tree; needed where A is frozen, for B's gradient to be projected.
      b2: Adam's memory of squared gradients.
      weight_decay: weight decay of A, B, kernels and embeddings.
      grad_clip: the largest norm of the gradient; 0 for no limit.
      lora_plus: the ratio of B's learning rate to A's (LoRA+).

    >>> from lora_jax import training
    >>> tree = lj.lorafy({"kernel": jnp.ones((4, 3))}, [lj.LoraRule(targets=["kernel"], rank=2)])
    >>> optimizer = training.adamw(optax.constant_schedule(1e-3), tree)
    """
    return make_optimizer(
        "adamw",
        schedule,
        params,
        weight_decay=weight_decay,
        grad_clip=grad_clip,
        lora_plus=lora_plus,
        options={"beta2": b2},
    )


def averaged(opt_state: optax.OptState, adapter: Adapter) -> Adapter:
    """Returns the adapter to evaluate and save: an average, or the adapter itself.

    Args:
      opt_state: the optimiser's state; schedule-free's holds what the average follows from.
      adapter: the parameters at which gradients are taken.

    >>> from lora_jax.training.optimizer import averaged, make_optimizer
    >>> adapter = {"kernel": {"value": jnp.ones(3)}}
    >>> free = make_optimizer("schedule-free", optax.constant_schedule(1e-3))
    >>> averaged(free.init(adapter), adapter)["kernel"]["value"]
    Array([1., 1., 1.], dtype=float32)
    """

    def is_schedule_free(node: Leaf) -> bool:
        return isinstance(node, contrib.ScheduleFreeState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_schedule_free)
    averaging_states = [node for node in nodes if is_schedule_free(node)]
    if not averaging_states:
        return adapter
    average: Adapter = contrib.schedule_free_eval_params(averaging_states[0], adapter)
    return average


def decays(adapter: Adapter) -> dict[str, dict[str, bool]]:
    """Returns the weight decay mask: True for matrices such as A and B, kernels, embeddings."""
    matrix_names = {"a", "b"}
    for name, part in PARTS.items():
        if part.axes.count("rank") == 2:
            matrix_names.add(name)

    def is_matrix(path: str, name: str) -> bool:
        if name == "value":  # an array that trains in full
            return re.search(r"(^|/)(kernel|embedding|w)$", path) is not None
        return name in matrix_names

    mask = {}
    for path, arrays in adapter.items():
        mask[path] = {name: is_matrix(path, name) for name in arrays}
    return mask


def takes_from_base(params: Tree) -> bool:
    """Returns True if an adapter was initialised from the base (PiSSA, OLoRA)."""
    return any(weight.start is not None for weight in _adapted_weights(params))


def has_dropout(params: Tree) -> bool:
    """Returns True if an adapter has dropout in training."""
    return any(weight.dropout > 0 for weight in _adapted_weights(params))


def _adapted_weights(params: Tree) -> list[LoraWeight]:
    leaves, _ = flatten_with_paths(params, is_leaf=is_node)
    return [leaf for _, leaf in leaves if isinstance(leaf, LoraWeight)]
