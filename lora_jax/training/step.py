"""One optimiser step as one pure function: ``(state, base, batch) -> (state, metrics)``."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

import lora_jax as lj
from lora_jax.core.opaque import unwrap_opaque_leaves
from lora_jax.core.types import Adapter, Batch, Tree
from lora_jax.training.losses import CROSS_ENTROPY, UNITS, Logits, Loss, Sums

Metrics = dict[str, jax.Array]
_Sum = TypeVar("_Sum")


class State(NamedTuple):
    """All arrays that a step changes."""

    adapter: Adapter  # what trains: the first half of `lora_jax.split`
    opt_state: optax.OptState
    step: jax.Array  # int32 []: the number of completed steps, skipped ones included
    key: jax.Array  # a PRNG key that never changes; dropout folds the step into it


Step = Callable[[State, Tree, Batch], tuple[State, Metrics]]
Evaluation = Callable[[Adapter, Tree, Batch], Sums]


def init_state(adapter: Adapter, optimizer: optax.GradientTransformation, key: jax.Array) -> State:
    """Returns the state before the first step.

    Args:
      adapter: the first half of `lora_jax.split`.
      optimizer: Optax transformation of the adapter.
      key: a PRNG key, for dropout.

    See the example of `make_step`.
    """
    return State(
        adapter=adapter,
        opt_state=optimizer.init(adapter),
        step=jnp.int32(0),
        key=key,
    )


def make_step(
    forward: Logits,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    dropout: bool,
    loss: Loss = CROSS_ENTROPY,
    gathered: Callable[[Adapter], Adapter] = lambda adapter: adapter,
) -> Step:
    """Returns the step, a pure function to jit with its state donated.

    Each array of a batch has one more axis in front, the parts that are accumulated. The sums of
    the loss and the gradient are added up over the parts; they are divided by the count once, or
    never: see `lora_jax.training.losses.Loss`.

    Where the loss, its count or the gradient's norm is not finite, the step is skipped: adapter and
    optimiser state stay as they were, bit by bit, and `step` alone advances, so that other data
    follow. A step whose batch has no token that counts is skipped, too: momentum and weight decay
    would move the adapter without anything to learn from.

    Args:
      forward: the adapted function that the loss calls.
      optimizer: Optax transformation of the adapter.
      schedule: the learning rate that `optimizer` has at each update, to be logged.
      dropout: whether the loss gets a key, a different one for each step and part.
      loss: the function to minimise, and who divides it.
      gathered: returns the adapter with the sharding that it has within a step, which may differ
        from the one that it is kept with.

    Returns:
      ``(state, base, batch) -> (state, metrics)``. The metrics, fp32 []: `loss` (divided as its
      gradient is), `count` (0 where no token counts), each of the loss's logs divided by the
      count, `grad_norm` (before clipping), `lr`, `skipped` (1 or 0). What would be divided by a
      count of zero stays as it is.

    >>> from lora_jax import training
    >>> def squares(forward, params, batch, dropout_key):
    ...     error = jnp.sum((forward(params, batch["x"]) - batch["y"]) ** 2)
    ...     return training.Sums(error, jnp.float32(len(batch["x"])), {})
    >>> tree = lj.lorafy({"kernel": jnp.zeros((4, 3))}, [lj.LoraRule(targets=["kernel"], rank=2)])
    >>> adapter, base = lj.split(tree)
    >>> forward = lj.adapt(lambda params, x: x @ params["kernel"])
    >>> rate = optax.constant_schedule(1e-2)
    >>> step = training.make_step(
    ...     forward, optax.adam(rate), rate, dropout=False, loss=training.Loss(squares)
    ... )
    >>> state = training.init_state(adapter, optax.adam(rate), jax.random.key(0))
    >>> batch = {"x": jnp.ones((1, 8, 4)), "y": jnp.ones((1, 8, 3))}  # one part, eight rows
    >>> state, metrics = step(state, base, batch)
    >>> float(metrics["loss"])
    3.0
    >>> evaluate = training.make_evaluation(forward, training.Loss(squares))
    >>> float(evaluate(state.adapter, base, {"x": jnp.ones((8, 4)), "y": jnp.ones((8, 3))}).count)
    8.0
    """

    gradient = make_gradient(forward, dropout=dropout, loss=loss, gathered=gathered)
    update = make_update(optimizer, schedule, loss)

    def step(state: State, base: Tree, batch: Batch) -> tuple[State, Metrics]:
        sums, grads = gradient(state, base, batch)
        return update(state, sums, grads)

    return step


def make_gradient(
    forward: Logits,
    *,
    dropout: bool,
    loss: Loss = CROSS_ENTROPY,
    gathered: Callable[[Adapter], Adapter] = lambda adapter: adapter,
) -> Callable[[State, Tree, Batch], tuple[Sums, Adapter]]:
    """Returns the first part of a step: ``(state, base, batch) -> (sums, gradient)``.

    Both are sums over the parts of the batch, not divided; see `make_step`.
    """

    def total_and_sums(
        adapter: Adapter, base: Tree, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        sums = loss(forward, unwrap_opaque_leaves(lj.join(adapter, base)), batch, key)
        return sums.total, sums

    # Differentiates the first argument, the adapter: no gradient of the base exists.
    value_and_grad = jax.value_and_grad(total_and_sums, has_aux=True)

    def gradient(state: State, base: Tree, batch: Batch) -> tuple[Sums, Adapter]:
        """Computes the sums and the gradient of a batch."""
        key = jax.random.fold_in(state.key, state.step)
        gathered_adapter = gathered(state.adapter)

        def part_gradient(part: Batch, index: jax.typing.ArrayLike) -> tuple[Sums, Adapter]:
            part_key = jax.random.fold_in(key, index) if dropout else None
            (_, sums), grads = value_and_grad(gathered_adapter, base, part, part_key)
            return sums, grads

        return _sum_over_parts(part_gradient, batch)

    return gradient


def make_update(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss: Loss = CROSS_ENTROPY,
    *,
    either: Callable[..., Any] = jax.lax.cond,
) -> Callable[[State, Sums, Adapter], tuple[State, Metrics]]:
    """Returns the second part of a step: ``(state, sums, gradient) -> (state, metrics)``.

    It divides the sums as `loss` says. It skips a step that is not finite, and a batch without a
    counted token; see `make_step`.

    Args:
      optimizer, schedule, loss: see `make_step`.
      either: calls one of two functions, as ``jax.lax.cond(is_good, update, skip)`` does.
    """

    def apply_gradient(state: State, sums: Sums, grads: Adapter) -> tuple[State, Metrics]:
        """Applies the gradient, or skips a step that is not finite."""
        scale = _inverse_count(sums) if loss.reduction == "mean" else jnp.float32(1)
        grads = jax.tree.map(lambda grad: grad * scale.astype(grad.dtype), grads)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(sums.total) & jnp.isfinite(sums.count) & jnp.isfinite(grad_norm)
        n_tokens = sums.count if sums.tokens is None else sums.tokens
        has_tokens = n_tokens != 0
        is_good = is_finite & has_tokens

        def update() -> tuple[Adapter, optax.OptState]:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.adapter)
            return optax.apply_updates(state.adapter, updates), opt_state

        def skip() -> tuple[Adapter, optax.OptState]:
            return state.adapter, state.opt_state

        # By a branch: jnp.where would hold the old state and the new one at once.
        adapter, opt_state = either(is_good, update, skip)
        metrics = {
            "loss": sums.total * scale,
            "count": jnp.where(has_tokens, sums.count, 0),
            **_logs(sums),
            "grad_norm": grad_norm,
            "lr": jnp.asarray(schedule(_update_count(state)), jnp.float32),
            "skipped": 1 - is_good.astype(jnp.float32),
        }
        return state._replace(adapter=adapter, opt_state=opt_state, step=state.step + 1), metrics

    return apply_gradient


def _inverse_count(sums: Sums) -> jax.Array:
    """Returns 1 / count, fp32 []; 1 if the count is 0."""
    return 1 / jnp.where(sums.count == 0, 1, sums.count)


def _logs(sums: Sums) -> Metrics:
    """Divides each log by its count, and adds logs' own counts.

    A log whose own count (`Sums.log_counts`) is 0 is NaN.
    """
    inverse_count = _inverse_count(sums)
    logs = {name: value * inverse_count for name, value in sums.logs.items()}
    for name, count in (sums.log_counts or {}).items():
        logs[name] = jnp.where(count > 0, sums.logs[name] / count, jnp.nan)
        logs[f"{name}{UNITS}"] = count
    return logs


def _sum_over_parts(part_gradient: Callable[..., _Sum], batch: Batch) -> _Sum:
    """Returns the sum of ``part_gradient(part, index)`` over the parts of a batch."""
    first_part = jax.tree.map(lambda array: array[0], batch)
    n_parts = jax.tree.leaves(batch)[0].shape[0]
    if n_parts == 1:
        return part_gradient(first_part, 0)

    def add(total: _Sum, part_and_index: tuple[Batch, jax.Array]) -> tuple[_Sum, None]:
        return jax.tree.map(jnp.add, total, part_gradient(*part_and_index)), None

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part_gradient, first_part, 0))
    total: _Sum = jax.lax.scan(add, zeros, (batch, jnp.arange(n_parts)))[0]
    return total


def _update_count(state: State) -> jax.Array:
    """Returns the optimiser's count of updates, without skipped steps."""
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    return counts[0][1] if counts else state.step


def make_evaluation(forward: Logits, loss: Loss = CROSS_ENTROPY) -> Evaluation:
    """Returns ``(adapter, base, batch) -> sums``: the loss without dropout or gradient.

    Args:
      forward: the adapted function that the loss calls.
      loss: its sums are returned undivided, so that those of several batches can be added up.

    See the example of `make_step`.
    """

    def evaluate(adapter: Adapter, base: Tree, batch: Batch) -> Sums:
        return loss(forward, unwrap_opaque_leaves(lj.join(adapter, base)), batch)

    return evaluate
