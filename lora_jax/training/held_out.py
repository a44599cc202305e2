"""Evaluation with the forward pass of training: a held-out loss, or log-probabilities of tokens."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax as lj
from lora_jax.core.types import Adapter, Batch, Forward, Tree
from lora_jax.models.layers.placement import UNPLACED, Placement
from lora_jax.training.data.batches import Examples
from lora_jax.training.layout import Layout
from lora_jax.training.loop import PeriodicMeasure
from lora_jax.training.losses import HELD_OUT, Logits, Loss, Sums, token_values
from lora_jax.training.losses.tokens import cross_entropy, entropy_of
from lora_jax.training.optimizer import averaged
from lora_jax.training.processes import Agreement
from lora_jax.training.ready import TrainingStart
from lora_jax.training.run.stop import Stop
from lora_jax.training.step import State, make_evaluation


class FormedTree(NamedTuple):
    """Evaluates a tree with expensive weights, which are computed once per measurement.

    Attributes:
      form: returns a plain tree from the adapted one.
      forward: the function of plain trees that the loss calls.
    """

    form: Callable[[Any], Any]
    forward: Forward


def held_out_loss(
    ready: TrainingStart,
    forward: Forward,
    loss: Loss,
    examples: Examples,
    *,
    every: int,
    stop: Stop,
    evaluation: Callable[..., Sums] | None = None,
    formed: FormedTree | None = None,
) -> PeriodicMeasure:
    """Returns the periodic measurement of a loss and its logs on held-out examples.

    Args:
      ready: the run; its `measured` may give numbers to the batches.
      forward: the adapted function that the loss calls.
      loss: the function that trains; its `held_out` is measured.
      examples: are taken in batches of the run's size, none twice.
      every: steps between two measurements.
      stop: tells of a signal, which cuts a measurement short.
      evaluation: what `compile_evaluation` returned, for runs that share it.
      formed: runs the examples in place of `forward`.
    """
    layout = ready.setup.layout
    loss = loss.held_out
    if formed is not None:
        forward = formed.forward
    evaluate = evaluation or compile_evaluation(layout, forward, loss)

    def evaluated_trees(state: State) -> tuple[Adapter, Tree]:
        """Returns the adapter and the base; a formed tree has no adapter."""
        adapter = averaged(state.opt_state, state.adapter)
        if formed is None:
            return adapter, ready.base
        return {}, formed.form(lj.join(adapter, ready.base))

    def take(state: State) -> dict[str, float] | None:
        """Returns the loss and its logs, or None after a signal."""
        agreement = Agreement()
        adapter, base = evaluated_trees(state)
        batch_constants: Mapping[str, float] | None = {}
        if ready.measured is not None:
            params = lj.join(adapter, base)
            batch_constants = ready.measured(params, lambda: stop.agreed(agreement))
        if batch_constants is None:
            return None
        sums_of_batches: list[Sums] = []
        for host_batch in examples.parts(ready.feed.batch_size):
            for name, value in batch_constants.items():
                host_batch[name] = np.full_like(host_batch[name], value)
            batch = layout.batch(host_batch, parts=False)
            with jax.set_mesh(layout.mesh):
                batch_sums = evaluate(adapter, base, batch)
                sums_of_batches.append(jax.tree.map(float, batch_sums))
            if stop.agreed(agreement):
                return None
        return average_sums(loss, jax.tree.map(lambda *values: sum(values), *sums_of_batches))

    return PeriodicMeasure(every=every, prefix=HELD_OUT, take=take)


def compile_evaluation(layout: Layout, forward: Forward, loss: Loss) -> Callable[..., Sums]:
    """Returns ``(adapter, base, batch) -> sums``, jitted on the layout's mesh.

    The sums are those of the loss's `held_out`.
    """
    return jax.jit(
        make_evaluation(forward, loss.held_out),
        out_shardings=layout.whole,
        compiler_options=layout.compiler_options,
    )


def average_sums(loss: Loss, sums: Sums) -> dict[str, float]:
    """Returns the reduced loss, and its logs divided by their counts.

    Returns {} where nothing counts: what was not measured is no loss of 0.
    """
    count: Any = sums.count
    if not count:
        return {}
    loss_value: Any = sums.total
    if loss.reduction == "mean":
        loss_value = sums.total / count
    line = {"loss": loss_value}
    for name, log_sum in sums.logs.items():
        log_count = sums.count_of(name)
        if log_count:
            line[name] = log_sum / log_count
    return line


class Scores(NamedTuple):
    """Scores of the predicted tokens of a batch, fp32 [batch, m] each.

    Attributes:
      logps: log p of each token.
      entropy: -Σ p log p over the vocabulary, at each token's place.
    """

    logps: jax.Array
    entropy: jax.Array


def make_scorer(
    forward: Logits,
    *,
    layout: Layout | None = None,
    temperature: float = 1.0,
    chunk: int | None = 0,
    parts: int = 1,
    placement: Placement = UNPLACED,
) -> Callable[[Tree, Batch], Scores]:
    """Returns ``(params, batch) -> scores``, compiled per shape, without dropout or gradient.

    Args:
      forward: see `lora_jax.training.losses.token_values`.
      layout: where parameters and batches lie; by default on one device. Each device gets all the
        scores.
      temperature: divides the logits, as it did where the tokens were drawn; above 0.
      chunk, parts, placement: see `lora_jax.training.losses.token_values`.

    Returns:
      The function. It takes parameters, adapted or plain, and a batch whose ``weights`` matter only
      with several parts.

    Raises:
      ValueError: the temperature is not above 0.

    >>> from lora_jax import models, training
    >>> fields = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 16}
    >>> model = models.GPT2(models.read_config(fields | {"n_positions": 16}))
    >>> ids = jnp.array([[1, 2, 3]])
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> batch = {"ids": ids, "segment_ids": jnp.ones_like(ids), "positions": jnp.array([[0, 1, 2]])}
    >>> batch |= {"predict_at": jnp.array([[0, 1]]), "targets": ids[:, 1:]}
    >>> training.make_scorer(model.apply)(params, batch).logps.shape
    (1, 2)
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}, but it divides the logits, so it must be above 0. Pass "
            "1."
        )

    def scores_of_tokens(logits: jax.Array, targets: jax.Array) -> Scores:
        logits = logits / temperature
        return Scores(logps=-cross_entropy(logits, targets), entropy=entropy_of(logits))

    def score(params: Tree, batch: Batch) -> Any:
        """Computes the scores of a batch."""
        return token_values(
            scores_of_tokens,
            forward,
            params,
            batch,
            chunk=chunk,
            parts=parts,
            placement=placement,
        )

    return jax.jit(score) if layout is None else layout.jitted(score)
