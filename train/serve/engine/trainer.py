"""Gradients and updates of adapters: one compiled function for those of all tenants."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.core.types import Tree
from lora_jax.models.sampling.choice import likeliest, log_probabilities
from lora_jax.training.layout import Layout
from lora_jax.training.losses.tokens import token_values
from train.serve.engine.adapter import Adapter, Factors, TrainingState
from train.serve.engine.base import ServedBase
from train.serve.engine.losses import DEFAULTS, ORDER, sum_loss
from train.serve.engine.sizes import TARGETS, Sizes
from train.serve.protocol.requests import LOSSES, TOP, Datum, Gradient, RequestError, Top, Update

_EMPTY = -99999.0  # the log-probability of a token that there is none of
_HUGE = 1e30
EachToken = Callable[[jax.Array, jax.Array], Tree]  # of logits and targets


class TrainBatch(NamedTuple):
    """Some rows of a request, filled up to a shape.

    Attributes:
      at: the places of the rows among the request's data.
      batch: arrays for `lora_jax.training.losses.tokens.token_values`, and those of losses.
    """

    at: list[int]
    batch: dict[str, np.ndarray]


class LossInputs(NamedTuple):
    """The inputs of a loss besides the factors.

    Attributes:
      scales: s of each weight.
      shell: the base, without its adapter's arrays.
      batch: see `TrainBatch`, and β of a loss, "beta".
      which: place of the loss in `ORDER`.
    """

    scales: dict[str, jax.Array]
    shell: Tree
    batch: Mapping[str, jax.Array]
    which: jax.Array


class Trainer:
    """Computes with an adapter that is an argument, so that all share what is compiled."""

    def __init__(self, base: ServedBase, sizes: Sizes, layout: Layout, chunk: int) -> None:
        """Makes the functions; nothing is compiled yet.

        Args:
          base: the base.
          sizes: shapes.
          layout: the mesh.
          chunk: predictions whose logits are there at a time.
        """
        self._base, self._sizes, self._layout, self._chunk = base, sizes, layout, chunk
        # Samples run on the model as it is: mixed batches cannot be followed into `shard_map`.
        model = base.model if layout.mesh.size == 1 else layout.constrained(base.model)
        self._forward = lj.adapt(model.apply)
        self.compiled = 0
        jitted = layout.jitted
        self._gradient = jitted(self._gradients)
        self._scores = jitted(self._scored)
        self._add = jitted(lambda one, other: jax.tree.map(jnp.add, one, other))
        self._update = jitted(self._updated)
        self._finite = jitted(lambda factors: jnp.isfinite(optax.tree.norm(factors)))

    @property
    def steps(self) -> int:
        """The number of steps of `warm_up`."""
        return 2 * len(self._sizes.lengths) + 3

    def warm_up(self, state: TrainingState) -> Iterator[None]:
        """Compiles all functions, for all shapes, step by step.

        Args:
          state: that of an adapter, which stays as it is.
        """
        for length in self._sizes.lengths:
            tokens = np.zeros(length, np.int32)
            request = Gradient([Datum(tokens, {"target_tokens": tokens})], "cross_entropy")
            (part,) = self.parts(request)
            grads, *_ = self.gradient(state.adapter, None, request, part)
            yield
            self.loss(state.adapter, request, part)
            yield
        grads = self.add(grads, grads)
        yield
        self.is_finite(grads)
        yield
        self.update(state, grads, Update())
        yield

    def parts(self, request: Gradient) -> list[TrainBatch]:
        """Returns the batches of a request, data of like length together.

        Raises:
          RequestError: a datum does not fit, or lacks something.
        """
        if request.loss not in LOSSES:
            raise RequestError(f"the loss {request.loss!r}: there are {', '.join(LOSSES)}")
        if wrong := [name for name, value in request.config.items() if not np.isfinite(value)]:
            raise RequestError(f"{wrong[0]} is {request.config[wrong[0]]}: give a finite number")
        if not request.data:
            raise RequestError("there are no data: give at least one datum")
        for i, datum in enumerate(request.data):
            self._check(i, datum, request.loss)
        shapes: dict[tuple[int, int], list[int]] = {}
        for i, datum in enumerate(request.data):
            shapes.setdefault(self._shape(datum), []).append(i)
        return [
            TrainBatch(rows, self._batch([request.data[i] for i in rows], request, *shape))
            for shape, places in shapes.items()
            for rows in _groups(places, self._sizes.rows(shape[0]))
        ]

    def gradient(
        self, adapter: Adapter, total: Factors | None, request: Gradient, part: TrainBatch
    ) -> tuple[Factors, float, np.ndarray]:
        """Returns the gradient so far, the part's loss and its log-probabilities."""
        inputs = self._inputs(adapter, request, part)
        loss, p, grads_of_part = self._gradient(adapter.factors, inputs)
        return self.add(total, grads_of_part), float(loss), np.asarray(p)

    def loss(
        self, adapter: Adapter, request: Gradient, part: TrainBatch
    ) -> tuple[float, np.ndarray]:
        """Returns a part's loss and its log-probabilities, without a gradient."""
        inputs = self._inputs(adapter, request, part)
        loss, p, _ = self._scores(adapter.factors, inputs, np.bool_(False))
        return float(loss), np.asarray(p)

    def prompt(
        self, adapter: Adapter, tokens: np.ndarray, top: int, targets: np.ndarray | None = None
    ) -> tuple[np.ndarray, Top | None, np.ndarray | None]:
        """Scores a prompt.

        Args:
          adapter: the adapter.
          tokens: [n] int32.
          top: the number of likeliest tokens wanted at each place.
          targets: other tokens at each place; see `SampleRequest.targets`.

        Returns:
          The log-probabilities of its tokens, the likeliest ones at each place if they are wanted,
          and the log-probabilities of the targets if there are any.
        """
        wanted, n = np.append(tokens[1:], 0)[:, None], len(tokens) - 1
        if targets is not None:
            others = np.pad(np.maximum(targets, 0), ((0, 1), (0, 0)))
            wanted = np.concatenate([wanted, others], axis=1)
        scores: list[np.ndarray] = []
        for first in range(0, wanted.shape[1], TARGETS[-1]):
            columns = wanted[:, first : first + TARGETS[-1]].astype(np.int32)
            datum = Datum(tokens, {"target_tokens": columns})
            request = Gradient([datum], "cross_entropy", forward_only=True)
            (part,) = self.parts(request)
            with_top = np.bool_(top > 0 and not scores)
            inputs = self._inputs(adapter, request, part)
            _, p, likely = self._scores(adapter.factors, inputs, with_top)
            if with_top:
                ids, top_logps = likely
            scores.append(np.asarray(p)[0, :n, : columns.shape[1]])
        logps = np.concatenate(scores, axis=1)
        own = np.append(np.float32(np.nan), logps[:, 0])
        asked = None if targets is None else np.where(targets < 0, np.float32(0), logps[:, 1:])
        if not top:
            return own, None, asked
        none = (np.zeros((1, top), np.int32), np.full((1, top), _EMPTY, np.float32))
        both = [
            np.concatenate([empty, np.asarray(x)[0, :n, :top]])
            for empty, x in zip(none, (ids, top_logps), strict=True)
        ]
        return own, Top(*both), asked

    def add(self, total: Factors | None, grads: Factors) -> Factors:
        """Returns the sum of two gradients."""
        return grads if total is None else self._add(total, grads)

    def is_finite(self, factors: Factors) -> bool:
        """Returns True if all numbers are finite, and so is the norm, by which updates clip."""
        return bool(self._finite(factors))

    def update(
        self, state: TrainingState, grads: Factors | None, how: Update
    ) -> tuple[TrainingState, float]:
        """Returns the state after a step of AdamW, and the norm of the gradient before clipping.

        Raises:
          RequestError: the state would not be finite.
        """
        if grads is None:
            grads = jax.tree.map(jnp.zeros_like, state.adapter.factors)
        clip, steps = how.grad_clip_norm or _HUGE, state.steps + 1
        given = [how.learning_rate, how.eps, 1 - how.learning_rate * how.weight_decay, clip]
        for beta in (how.beta1, how.beta2):  # 1 - beta in fp32 would lose half of its digits
            given += [beta, 1 - beta, 1 - beta**steps]
        with np.errstate(over="ignore"):
            numbers = np.array(given, np.float32)
        moved, first, second, norm, is_finite = self._update(
            state.adapter.factors, state.first, state.second, grads, numbers
        )
        if not is_finite:
            raise RequestError(
                "the update is not finite: adapter and gradient stay as they are; load a saved "
                "state to go on without this gradient"
            )
        adapter = dataclasses.replace(state.adapter, factors=moved)
        return TrainingState(adapter, first, second, steps), float(norm)

    def _shape(self, datum: Datum) -> tuple[int, int]:
        targets = datum.inputs["target_tokens"]
        k = 1 if targets.ndim == 1 else targets.shape[1]
        return self._sizes.length(len(datum.tokens)), next(n for n in TARGETS if n >= k)

    def _check(self, i: int, datum: Datum, loss: str) -> None:
        """Raises a RequestError if a datum does not fit."""
        n, vocab = len(datum.tokens), self._base.model.config.vocab_size
        if not 1 <= n <= self._sizes.max_length:
            raise RequestError(
                f"datum {i} has {n} tokens: from 1 to {self._sizes.max_length} are possible"
            )
        targets = datum.inputs.get("target_tokens")
        if targets is None:
            raise RequestError(f"datum {i} lacks target_tokens, which {loss} needs")
        for name, ids in (("tokens", datum.tokens), ("target_tokens", targets)):
            if ids.size and not (0 <= ids.min() and ids.max() < vocab):
                raise RequestError(f"datum {i}: {name} holds an id outside 0 to {vocab - 1}")
        if targets.ndim not in (1, 2) or len(targets) != n:
            raise RequestError(f"datum {i}: target_tokens has the shape {targets.shape}, not {n}")
        if targets.ndim == 2 and not 1 <= targets.shape[1] <= TARGETS[-1]:
            raise RequestError(f"datum {i}: {targets.shape[1]} targets a place; at most 32")
        needed = () if loss == "cross_entropy" else ("logprobs", "advantages")
        for name in needed:
            if name not in datum.inputs:
                raise RequestError(f"datum {i} lacks {name}, which {loss} needs")
        for name in DEFAULTS.keys() & datum.inputs.keys():
            array = datum.inputs[name]
            if array.shape not in (targets.shape, (n,)):
                raise RequestError(
                    f"datum {i}: {name} has the shape {array.shape}, target_tokens {targets.shape}"
                )
            if not np.isfinite(array).all():
                raise RequestError(f"datum {i}: {name} holds a value that is not finite")

    def _batch(
        self, data: Sequence[Datum], request: Gradient, length: int, k: int
    ) -> dict[str, np.ndarray]:
        rows = self._sizes.rows(length)
        shape = (rows, length, k)
        ids = np.zeros((rows, length), np.int32)
        targets, there = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        given = {
            name: np.full(shape, request.config.get(name, value), np.float32)
            for name, value in DEFAULTS.items()
        }
        for row, datum in enumerate(data):
            n = len(datum.tokens)
            ids[row, :n] = datum.tokens
            wanted = _wide(datum.inputs["target_tokens"])
            used = (row, slice(n), slice(wanted.shape[1]))
            targets[used], there[used] = wanted, 1
            for name in DEFAULTS.keys() & datum.inputs.keys():
                given[name][used] = _wide(datum.inputs[name])
        place = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
        whole = {"ids": ids, "positions": place, "predict_at": place, "targets": targets}
        whole["segment_ids"] = (there[:, :, 0] > 0).astype(np.int32)
        return whole | given | {"there": there}

    def _inputs(self, adapter: Adapter, request: Gradient, part: TrainBatch) -> LossInputs:
        batch = {**self._layout.batch(part.batch, parts=False)}
        batch["beta"] = cast(jax.Array, np.float32(request.config.get("beta", 0.05)))
        which = cast(jax.Array, np.int32(ORDER.index(request.loss)))
        return LossInputs(adapter.scales, self._base.shell_of(adapter), batch, which)

    def _values(self, each: EachToken, factors: Factors, inputs: LossInputs) -> Tree:
        tree = self._base.tree(factors, inputs.scales, inputs.shell)
        batch = {name: array for name, array in inputs.batch.items() if name != "beta"}
        return token_values(each, self._forward, tree, batch, chunk=self._chunk)

    def _gradients(
        self, factors: Factors, inputs: LossInputs
    ) -> tuple[jax.Array, jax.Array, Factors]:
        self.compiled += 1

        def loss(factors: Factors) -> tuple[jax.Array, jax.Array]:
            p = self._values(log_probabilities, factors, inputs)
            return sum_loss(inputs.which, p, inputs.batch), p

        (total, p), grads = jax.value_and_grad(loss, has_aux=True)(factors)
        return total, p, grads

    def _scored(
        self, factors: Factors, inputs: LossInputs, with_top: jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        self.compiled += 1

        def each(logits: jax.Array, targets: jax.Array) -> Tree:
            return log_probabilities(logits, targets), likeliest(logits, TOP, with_top)

        p, top = self._values(each, factors, inputs)
        return sum_loss(inputs.which, p, inputs.batch), p, top

    def _updated(
        self, factors: Factors, first: Factors, second: Factors, grads: Factors, how: jax.Array
    ) -> tuple[Factors, Factors, Factors, jax.Array, jax.Array]:
        self.compiled += 1
        rate, eps, kept, clip, beta1, new1, fix1, beta2, new2, fix2 = how
        norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / (norm + 1e-6)), grads)
        first = jax.tree.map(lambda m, g: beta1 * m + new1 * g, first, grads)
        second = jax.tree.map(lambda v, g: beta2 * v + new2 * g * g, second, grads)

        def moved(x: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            size = jnp.sqrt(v / fix2) + eps
            return x * kept - rate * jnp.where(m == 0, 0.0, m / fix1 / size)

        new = jax.tree.map(moved, factors, first, second)
        return new, first, second, norm, _are_finite((new, first, second, norm))


def _are_finite(arrays: Tree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(arrays)]))


def _wide(array: np.ndarray) -> np.ndarray:
    return array if array.ndim == 2 else array[:, None]


def _groups(places: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(places), size):
        yield places[first : first + size]
