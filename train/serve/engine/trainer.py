"""Computes gradients and updates of adapters, with functions compiled once for all tenants.

A token has one target or several: the tokens whose log-probabilities a loss is computed from. All
arrays of a batch have the same number of targets a token.
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.core.types import Tree
from lora_jax.models.sampling.choice import find_likeliest, log_probabilities
from lora_jax.training.layout import Layout
from lora_jax.training.losses.tokens import token_values
from train.serve.engine.adapter import Adapter, Factors, TrainingState
from train.serve.engine.base import ServedBase
from train.serve.engine.jobs import PromptScores
from train.serve.engine.losses import DEFAULTS, ORDER, sum_loss
from train.serve.engine.sizes import N_TARGETS, Sizes
from train.serve.protocol.requests import LOSSES, TOP, Datum, Gradient, RequestError, Top, Update

_NO_LOGPROB = -99999.0  # in the place of the log-probability of a token, where there is no token
_NO_CLIP_NORM = 1e30
TokenFunction = Callable[[jax.Array, jax.Array], Tree]  # of logits and targets


class TrainBatch(NamedTuple):
    """Some rows of a request, padded to a compiled shape.

    Attributes:
      data_indices: indices of the rows among the request's data.
      batch: arrays for `lora_jax.training.losses.tokens.token_values`, and those of losses.
    """

    data_indices: list[int]
    batch: dict[str, np.ndarray]


class LossInputs(NamedTuple):
    """The inputs of a loss besides the factors.

    Attributes:
      scales: s of each weight.
      shell: the base, without its adapter's arrays.
      batch: see `TrainBatch`, and β of a loss, "beta".
      loss_index: index of the loss in `ORDER`.
    """

    scales: dict[str, jax.Array]
    shell: Tree
    batch: Mapping[str, jax.Array]
    loss_index: jax.Array


class AdamSettings(NamedTuple):
    """The settings of an AdamW step, fp32 [] each.

    Attributes:
      learning_rate, eps: as in `Update`.
      decay: by which the factors are multiplied.
      max_norm: largest norm of the gradient.
      beta1, beta2: as in `Update`.
      weight1, weight2: factors of the gradient and of its square, 1 - beta.
      correction1, correction2: divisors of the moments for their bias, 1 - beta**steps.
    """

    learning_rate: Any
    eps: Any
    decay: Any
    max_norm: Any
    beta1: Any
    weight1: Any
    correction1: Any
    beta2: Any
    weight2: Any
    correction2: Any


class Trainer:
    """Trains adapters. They are arguments of the compiled functions, which all adapters share."""

    def __init__(self, base: ServedBase, sizes: Sizes, layout: Layout, chunk: int) -> None:
        """Creates the functions without compiling them.

        Args:
          base: the base.
          sizes: shapes.
          layout: the mesh.
          chunk: predictions whose logits are there at a time.
        """
        self._base = base
        self._sizes = sizes
        self._layout = layout
        self._chunk_tokens = chunk
        # Samples run on the model as it is: mixed batches cannot be followed into `shard_map`.
        model = base.model if layout.mesh.size == 1 else layout.constrained(base.model)
        self._forward = lj.adapt(model.apply)
        self.compiled = 0
        jitted = layout.jitted
        self._gradient = jitted(self._compute_gradient)
        self._scores = jitted(self._compute_scores)
        self._add = jitted(lambda total, grads: jax.tree.map(jnp.add, total, grads))
        self._update = jitted(self._compute_update)
        self._finite = jitted(lambda factors: jnp.isfinite(optax.tree.norm(factors)))

    @property
    def steps(self) -> int:
        """The number of steps of `warm_up`."""
        return 2 * len(self._sizes.row_lengths) + 3

    def warm_up(self, state: TrainingState) -> Iterator[None]:
        """Compiles all functions for all shapes, one per iteration.

        Args:
          state: the state of an adapter, which stays as it is.
        """
        for length in self._sizes.row_lengths:
            tokens = np.zeros(length, np.int32)
            request = Gradient([Datum(tokens, {"target_tokens": tokens})], "cross_entropy")
            (batch,) = self.batches(request)
            grads, _, _ = self.gradient(state.adapter, None, request, batch)
            yield
            self.loss(state.adapter, request, batch)
            yield
        grads = self.add(grads, grads)
        yield
        self.is_finite(grads)
        yield
        self.update(state, grads, Update())
        yield

    def batches(self, request: Gradient) -> list[TrainBatch]:
        """Returns the batches of a request. All rows of a batch have one shape.

        Raises:
          RequestError: a datum does not fit, or lacks something.
        """
        if request.loss not in LOSSES:
            raise RequestError(
                f"the loss {request.loss!r} is unknown. Use one of {', '.join(LOSSES)}."
            )
        for name, value in request.config.items():
            if not np.isfinite(value):
                raise RequestError(f"{name} is {value}. Pass a finite number.")
        if not request.data:
            raise RequestError("there are no data. Pass at least one datum.")
        for i, datum in enumerate(request.data):
            self._check_datum(i, datum, request.loss)
        indices_of_shape: dict[tuple[int, int], list[int]] = {}
        for i, datum in enumerate(request.data):
            indices_of_shape.setdefault(self._row_shape_for(datum), []).append(i)
        batches: list[TrainBatch] = []
        for (row_length, n_targets), indices in indices_of_shape.items():
            for batch_indices in _split_indices(indices, self._sizes.n_rows(row_length)):
                batch_data = [request.data[i] for i in batch_indices]
                arrays = self._make_batch_arrays(batch_data, request, row_length, n_targets)
                batches.append(TrainBatch(batch_indices, arrays))
        return batches

    def gradient(
        self, adapter: Adapter, total: Factors | None, request: Gradient, batch: TrainBatch
    ) -> tuple[Factors, float, np.ndarray]:
        """Returns the summed gradient, and the batch's loss and log-probabilities."""
        inputs = self._make_loss_inputs(adapter, request, batch)
        loss, logps, batch_grads = self._gradient(adapter.factors, inputs)
        return self.add(total, batch_grads), float(loss), np.asarray(logps)

    def loss(
        self, adapter: Adapter, request: Gradient, batch: TrainBatch
    ) -> tuple[float, np.ndarray]:
        """Returns a batch's loss and its log-probabilities, without a gradient."""
        inputs = self._make_loss_inputs(adapter, request, batch)
        loss, logps, _ = self._scores(adapter.factors, inputs, np.bool_(False))
        return float(loss), np.asarray(logps)

    def score_prompt(
        self, adapter: Adapter, tokens: np.ndarray, top: int, targets: np.ndarray | None = None
    ) -> PromptScores:
        """Scores a prompt.

        Args:
          adapter: the adapter.
          tokens: [n] int32.
          top: the number of likeliest tokens to return for each token.
          targets: other tokens in the place of each one; see `SampleRequest.targets`.
        """
        n_scored = len(tokens) - 1  # all but the first
        scored_ids = np.append(tokens[1:], 0)[:, None]
        if targets is not None:
            padded_targets = np.pad(np.maximum(targets, 0), ((0, 1), (0, 0)))
            scored_ids = np.concatenate([scored_ids, padded_targets], axis=1)
        column_logps: list[np.ndarray] = []
        top_of_prompt = None
        max_targets = N_TARGETS[-1]
        for start in range(0, scored_ids.shape[1], max_targets):
            columns = scored_ids[:, start : start + max_targets].astype(np.int32)
            datum = Datum(tokens, {"target_tokens": columns})
            request = Gradient([datum], "cross_entropy", forward_only=True)
            (batch,) = self.batches(request)
            is_first_call = not column_logps
            inputs = self._make_loss_inputs(adapter, request, batch)
            _, logps, top_arrays = self._scores(
                adapter.factors, inputs, np.bool_(top > 0 and is_first_call)
            )
            if top and is_first_call:
                top_ids, top_logps = top_arrays
                top_of_prompt = _prompt_top(top_ids, top_logps, n_scored, top)
            column_logps.append(np.asarray(logps)[0, :n_scored, : columns.shape[1]])
        all_logps = np.concatenate(column_logps, axis=1)
        target_logps = None
        if targets is not None:
            target_logps = np.where(targets < 0, np.float32(0), all_logps[:, 1:])
        return PromptScores(
            prompt_logprobs=np.append(np.float32(np.nan), all_logps[:, 0]),
            top_prompt=top_of_prompt,
            targets=target_logps,
        )

    def add(self, total: Factors | None, grads: Factors) -> Factors:
        """Returns the sum of two gradients."""
        return grads if total is None else self._add(total, grads)

    def is_finite(self, factors: Factors) -> bool:
        """Returns True if all elements and their norm, by which updates clip, are finite."""
        return bool(self._finite(factors))

    def update(
        self, state: TrainingState, grads: Factors | None, settings: Update
    ) -> tuple[TrainingState, float]:
        """Returns the state after a step of AdamW, and the norm of the gradient before clipping.

        Raises:
          RequestError: the state would not be finite.
        """
        if grads is None:
            grads = jax.tree.map(jnp.zeros_like, state.adapter.factors)
        steps = state.steps + 1
        adam = AdamSettings(
            learning_rate=settings.learning_rate,
            eps=settings.eps,
            decay=1 - settings.learning_rate * settings.weight_decay,
            max_norm=settings.grad_clip_norm or _NO_CLIP_NORM,
            beta1=settings.beta1,
            # Computed here, since 1 - beta in fp32 would lose half of its digits.
            weight1=1 - settings.beta1,
            correction1=1 - settings.beta1**steps,
            beta2=settings.beta2,
            weight2=1 - settings.beta2,
            correction2=1 - settings.beta2**steps,
        )
        with np.errstate(over="ignore"):
            adam_array = np.array(adam, np.float32)
        factors, first, second, norm, is_finite = self._update(
            state.adapter.factors, state.first, state.second, grads, adam_array
        )
        if not is_finite:
            raise RequestError(
                "the update is not finite, so adapter and gradient stay as they are. Load a saved "
                "state to go on without this gradient."
            )
        adapter = dataclasses.replace(state.adapter, factors=factors)
        return TrainingState(adapter=adapter, first=first, second=second, steps=steps), float(norm)

    def _row_shape_for(self, datum: Datum) -> tuple[int, int]:
        """Returns the length and the number of targets per token of a datum's row."""
        targets = datum.inputs["target_tokens"]
        n_targets = 1 if targets.ndim == 1 else targets.shape[1]
        row_targets = N_TARGETS[bisect.bisect_left(N_TARGETS, n_targets)]
        return self._sizes.row_length(len(datum.tokens)), row_targets

    def _check_datum(self, i: int, datum: Datum, loss: str) -> None:
        """Raises a RequestError if a datum is too long or its inputs are wrong."""
        n_tokens = len(datum.tokens)
        vocab_size = self._base.model.config.vocab_size
        if not 1 <= n_tokens <= self._sizes.max_length:
            raise RequestError(
                f"datum {i} has {n_tokens} tokens. Pass from 1 to {self._sizes.max_length} tokens."
            )
        targets = datum.inputs.get("target_tokens")
        if targets is None:
            raise RequestError(f"datum {i} lacks target_tokens. Pass them for the loss {loss}.")
        for name, ids in (("tokens", datum.tokens), ("target_tokens", targets)):
            if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
                raise RequestError(
                    f"datum {i}: {name} holds an id outside 0 to {vocab_size - 1}. Use the "
                    "tokenizer of the served model."
                )
        if targets.ndim not in (1, 2) or len(targets) != n_tokens:
            raise RequestError(
                f"datum {i}: target_tokens has the shape {targets.shape}. Pass as many targets as "
                f"tokens, {n_tokens}."
            )
        if targets.ndim == 2 and not 1 <= targets.shape[1] <= N_TARGETS[-1]:
            raise RequestError(
                f"datum {i} has {targets.shape[1]} targets per token. Pass at most {N_TARGETS[-1]}."
            )
        needed_inputs = () if loss == "cross_entropy" else ("logprobs", "advantages")
        for name in needed_inputs:
            if name not in datum.inputs:
                raise RequestError(f"datum {i} lacks {name}. Pass it for the loss {loss}.")
        for name in DEFAULTS.keys() & datum.inputs.keys():
            array = datum.inputs[name]
            if array.shape not in (targets.shape, (n_tokens,)):
                raise RequestError(
                    f"datum {i}: {name} has the shape {array.shape}, but target_tokens has "
                    f"{targets.shape}. Pass the same shape."
                )
            if not np.isfinite(array).all():
                raise RequestError(
                    f"datum {i}: {name} holds a value that is not finite. Pass finite numbers."
                )

    def _make_batch_arrays(
        self, data: Sequence[Datum], request: Gradient, row_length: int, n_targets: int
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of a batch with one datum per row, padded to a shape."""
        n_rows = self._sizes.n_rows(row_length)
        target_shape = (n_rows, row_length, n_targets)
        ids = np.zeros((n_rows, row_length), np.int32)
        targets = np.zeros(target_shape, np.int32)
        target_mask = np.zeros(target_shape, np.float32)
        loss_inputs = {
            name: np.full(target_shape, request.config.get(name, default), np.float32)
            for name, default in DEFAULTS.items()
        }
        for row, datum in enumerate(data):
            n_tokens = len(datum.tokens)
            ids[row, :n_tokens] = datum.tokens
            datum_targets = _with_target_axis(datum.inputs["target_tokens"])
            datum_index = (row, slice(n_tokens), slice(datum_targets.shape[1]))
            targets[datum_index] = datum_targets
            target_mask[datum_index] = 1
            for name in DEFAULTS.keys() & datum.inputs.keys():
                loss_inputs[name][datum_index] = _with_target_axis(datum.inputs[name])
        positions = np.broadcast_to(np.arange(row_length, dtype=np.int32), ids.shape)
        token_inputs = {
            "ids": ids,
            "positions": positions,
            "predict_at": positions,
            "targets": targets,
            "segment_ids": (target_mask[:, :, 0] > 0).astype(np.int32),
        }
        return token_inputs | loss_inputs | {"target_mask": target_mask}

    def _make_loss_inputs(
        self, adapter: Adapter, request: Gradient, batch: TrainBatch
    ) -> LossInputs:
        """Returns all inputs of a batch's loss except the factors, on the mesh."""
        arrays = {**self._layout.batch(batch.batch, parts=False)}
        arrays["beta"] = cast(jax.Array, np.float32(request.config.get("beta", 0.05)))
        return LossInputs(
            scales=adapter.scales,
            shell=self._base.make_shell_for(adapter),
            batch=arrays,
            loss_index=cast(jax.Array, np.int32(ORDER.index(request.loss))),
        )

    def _token_values(self, function: TokenFunction, factors: Factors, inputs: LossInputs) -> Tree:
        """Returns the values of a function of logits and targets for each token of a batch."""
        tree = self._base.tree(factors, inputs.scales, inputs.shell)
        batch = {name: array for name, array in inputs.batch.items() if name != "beta"}
        return token_values(function, self._forward, tree, batch, chunk=self._chunk_tokens)

    def _compute_gradient(
        self, factors: Factors, inputs: LossInputs
    ) -> tuple[jax.Array, jax.Array, Factors]:
        """Returns the loss of a batch, its log-probabilities and its gradient."""
        self.compiled += 1

        def loss(factors: Factors) -> tuple[jax.Array, jax.Array]:
            logps = self._token_values(log_probabilities, factors, inputs)
            return sum_loss(inputs.loss_index, logps, inputs.batch), logps

        (total, logps), grads = jax.value_and_grad(loss, has_aux=True)(factors)
        return total, logps, grads

    def _compute_scores(
        self, factors: Factors, inputs: LossInputs, with_top: jax.Array
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns the loss of a batch, its log-probabilities and the most likely tokens."""
        self.compiled += 1

        def score(logits: jax.Array, targets: jax.Array) -> Tree:
            return log_probabilities(logits, targets), find_likeliest(logits, TOP, with_top)

        logps, top = self._token_values(score, factors, inputs)
        return sum_loss(inputs.loss_index, logps, inputs.batch), logps, top

    def _compute_update(
        self,
        factors: Factors,
        first: Factors,
        second: Factors,
        grads: Factors,
        adam_array: jax.Array,
    ) -> tuple[Factors, Factors, Factors, jax.Array, jax.Array]:
        """Returns new factors and moments, the gradient's norm, and whether all are finite."""
        self.compiled += 1
        adam = AdamSettings(*adam_array)
        norm = optax.tree.norm(grads)
        clip_scale = jnp.minimum(1.0, adam.max_norm / (norm + 1e-6))
        grads = jax.tree.map(lambda g: g * clip_scale, grads)
        first = jax.tree.map(lambda m, g: adam.beta1 * m + adam.weight1 * g, first, grads)
        second = jax.tree.map(lambda v, g: adam.beta2 * v + adam.weight2 * g * g, second, grads)

        def step(factor: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            denominator = jnp.sqrt(v / adam.correction2) + adam.eps
            direction = jnp.where(m == 0, 0.0, m / adam.correction1 / denominator)
            return factor * adam.decay - adam.learning_rate * direction

        factors = jax.tree.map(step, factors, first, second)
        return factors, first, second, norm, _are_finite((factors, first, second, norm))


def _prompt_top(ids: jax.Array, logps: jax.Array, n_scored: int, top: int) -> Top:
    """Returns the most likely tokens at each place of a prompt, with none for the first token."""
    prompt_ids = np.zeros((n_scored + 1, top), np.int32)
    prompt_ids[1:] = np.asarray(ids)[0, :n_scored, :top]
    prompt_logps = np.full((n_scored + 1, top), _NO_LOGPROB, np.float32)
    prompt_logps[1:] = np.asarray(logps)[0, :n_scored, :top]
    return Top(prompt_ids, prompt_logps)


def _are_finite(arrays: Tree) -> jax.Array:
    """Returns True if all elements of a tree are finite, [] bool."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(arrays)]))


def _with_target_axis(array: np.ndarray) -> np.ndarray:
    """Returns an array of a datum, [n] or [n, k], as [n, k]."""
    return array if array.ndim == 2 else array[:, None]


def _split_indices(indices: list[int], size: int) -> Iterator[list[int]]:
    """Yields groups of at most `size` indices."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
