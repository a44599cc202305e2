"""One optimiser step, as one pure function: ``(state, base, batch) -> (state, metrics)``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lora_jax as lj
from train.losses import Logits, Loss, summed_loss

Adapter = dict[str, dict[str, Any]]
Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """All that a step changes."""

    adapter: Adapter  # what trains: the first half of `lora_jax.split`
    opt_state: optax.OptState
    step: jax.Array  # int32 []: the steps done
    key: jax.Array  # a PRNG key that never changes; dropout folds the step into it


Step = Callable[[State, Any, dict[str, Any]], tuple[State, Metrics]]


def init_state(adapter: Adapter, optimizer: optax.GradientTransformation, key: jax.Array) -> State:
    """The state before the first step."""
    return State(adapter, optimizer.init(adapter), jnp.int32(0), key)


def make_step(
    forward: Logits,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    dropout: bool,
    loss: Loss = summed_loss,
    gathered: Callable[[Adapter], Adapter] = lambda adapter: adapter,
) -> Step:
    """The step; pure, to be jitted with its state donated.

    The batch's arrays have a first axis more, the parts that are accumulated. Losses and gradients
    are summed over all of it and divided by its number of predictions once, so that accumulation
    is the large batch exactly, however they are spread.

    Where the loss or the gradient's norm is not finite, the step is skipped: adapter and optimiser
    state stay as they were, bit by bit, and `step` alone advances, so that other data follow.

    `gathered` says where on a mesh the adapter is worked with, which may be another place than
    where it is kept.

    The metrics, fp32 []: `loss` (the mean over predictions), `count` (how many predictions, the sum
    of the batch's `weights`), `grad_norm` (before clipping), `lr`, `skipped` (1 or 0).
    """

    def of_adapter(adapter: Adapter, base: Any, batch: Any, key: jax.Array | None) -> jax.Array:
        return loss(forward, lj.join(adapter, base), batch, key)

    # Of the adapter: no gradient of the base exists.
    value_and_grad = jax.value_and_grad(of_adapter)

    def step(state: State, base: Any, batch: dict[str, Any]) -> tuple[State, Metrics]:
        accumulate = batch["weights"].shape[0]
        key = jax.random.fold_in(state.key, state.step)
        at_work = gathered(state.adapter)

        def of_part(part: dict[str, Any], index: Any) -> tuple[jax.Array, Adapter]:
            part_key = jax.random.fold_in(key, index) if dropout else None
            return value_and_grad(at_work, base, part, part_key)

        def add(total: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of_part(*xs)), None

        if accumulate == 1:
            total, grads = of_part({name: array[0] for name, array in batch.items()}, 0)
        else:
            zeros = (jnp.float32(0), jax.tree.map(jnp.zeros_like, at_work))
            (total, grads), _ = jax.lax.scan(add, zeros, (batch, jnp.arange(accumulate)))
        count = jnp.sum(batch["weights"]).astype(jnp.float32)
        scale = 1 / jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)

        def update() -> tuple[Adapter, optax.OptState]:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.adapter)
            return optax.apply_updates(state.adapter, updates), opt_state

        def skip() -> tuple[Adapter, optax.OptState]:
            return state.adapter, state.opt_state

        # Not jnp.where, which would hold the old state and the new one at once.
        adapter, opt_state = jax.lax.cond(finite, update, skip)
        metrics = {
            "loss": total * scale,
            "count": count,
            "grad_norm": norm,
            "lr": jnp.asarray(schedule(_updates(state)), jnp.float32),
            "skipped": 1 - finite.astype(jnp.float32),
        }
        return State(adapter, opt_state, state.step + 1, state.key), metrics

    return step


def _updates(state: State) -> jax.Array:
    """The updates so far, by the optimiser's own count: skipped steps are none of them."""
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    return counts[0][1] if counts else state.step


def make_evaluation(
    forward: Logits, loss: Loss = summed_loss
) -> Callable[[Adapter, Any, dict[str, Any]], Metrics]:
    """``(adapter, base, batch) -> {"loss", "count"}``, both sums, of a batch."""

    def evaluate(adapter: Adapter, base: Any, batch: dict[str, Any]) -> Metrics:
        total = loss(forward, lj.join(adapter, base), batch, None)
        return {"loss": total, "count": jnp.sum(batch["weights"])}

    return evaluate
