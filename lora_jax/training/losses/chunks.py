"""Computes predictions in chunks, so that the logits exist for only one chunk at a time.

A slope is the gradient of one token's value with regard to its hidden state. A leaf is an array of
the parameters, or of what else the head reads.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from lora_jax.adapt.needed import needed_equations
from lora_jax.core.extend import Jaxpr, jaxpr_as_fun
from lora_jax.core.types import Leaf, Tree
from lora_jax.models.layers.placement import Placement

ON_CPU = 256  # predictions at once
_CHUNK_MULTIPLE = 256  # chunks of accelerators are a multiple of it
_LOGITS_BYTES = 2**29  # of a chunk, fp32, on an accelerator

_Outputs = list[jax.Array]
_Values = Callable[[Tree, jax.Array, jax.Array, jax.Array], Tree]


class ValueWithFacts(NamedTuple):
    """A value of each token, and facts about it that receive no gradient.

    Attributes:
      value: the value, [...].
      facts: a tree of arrays, [...] each, without a gradient.
    """

    value: jax.Array
    facts: Tree


def predictions_at_once(placement: Placement, words: int) -> int:
    """Returns the default number of predictions whose logits a device holds at once.

    256 on a CPU. On an accelerator, products with so few rows take as long as reading the head
    does: there it is as many as have 512 MiB of logits in fp32, a multiple of 256. (A TPU v5e's
    compiler estimates 1,024 rows of Llama 3's head to be as fast as 2,048.)

    Args:
      placement: says what the devices are, and how many share the words.
      words: the size of the vocabulary.

    >>> from lora_jax.models.layers.placement import UNPLACED
    >>> from lora_jax.training import losses
    >>> losses.predictions_at_once(UNPLACED, 128_256)  # on a CPU
    256
    """
    if placement.platform == "cpu":
        return ON_CPU
    words_of_device = -(-words // placement.word_parts)
    n_predictions = _LOGITS_BYTES // (4 * words_of_device)
    return max(_CHUNK_MULTIPLE, n_predictions // _CHUNK_MULTIPLE * _CHUNK_MULTIPLE)


def number_of_chunks(shape: tuple[int, ...], chunk: int, parts: int = 1) -> int:
    """Returns the number of chunks of predictions of `shape`, [batch, m]; see `token_values`."""
    batch, m = shape
    if not chunk:  # all predictions at once
        return 1
    size = max(1, chunk // (batch * parts))  # places of one part of one row
    return -(-m // (parts * size))


def map_chunks(
    values: _Values,
    inputs: Tree,
    hidden: jax.Array,
    targets: jax.Array,
    n: int,
    *,
    parts: int = 1,
    where: Sequence[Any] = (),
) -> Any:
    """Maps a function of hidden states and targets over chunks.

    What the head reads is gathered once, before the loop. If the head does not train, the slope of
    each token is computed along with its value, while the logits exist. Otherwise the head runs
    once more for each chunk in the backward pass.

    Args:
      values: ``(inputs, index of the chunk, hidden [batch, c, d_model], targets [batch, c, …])`` ->
        a tree of values, [batch, c, …], each of its own token; perhaps a `ValueWithFacts`.
      inputs: the parameters, and what else `values` reads.
      hidden: [batch, m, d_model].
      targets: [batch, m, …] int32.
      n: number of chunks.
      parts: the parts that a row is split into; a chunk takes the same places of each.
      where: shardings that the first leaves of `inputs` have in the loop, if the head reads them.

    Returns:
      The values, [batch, m, …].
    """
    chunks = (_split_chunks(hidden, n, parts), _split_chunks(targets, n, parts))
    leaves, structure = jax.tree.flatten(inputs)

    def values_of_leaves(leaves: Sequence[Leaf], *chunk: jax.Array) -> Tree:
        return values(jax.tree.unflatten(structure, leaves), *chunk)

    first_chunk = (jnp.int32(0), *(array[0] for array in chunks))
    jaxpr, shapes = jax.make_jaxpr(values_of_leaves, return_shape=True)(leaves, *first_chunk)
    jaxpr, input_indices = _without_dead_code(jaxpr)
    leaf_indices = [index for index in input_indices if index < len(leaves)]
    run_jaxpr = jaxpr_as_fun(jaxpr)

    def values_of_read_leaves(read_leaves: Sequence[Leaf], *chunk: jax.Array) -> _Outputs:
        """Returns the values of a chunk, given the leaves that they read."""
        # The jaxpr reads no other leaf, so that 0 stands for each of them.
        all_leaves: list[Leaf] = [0] * len(leaves)
        for index, leaf in zip(leaf_indices, read_leaves, strict=True):
            all_leaves[index] = leaf
        outputs: _Outputs = run_jaxpr(*all_leaves, *chunk)
        return outputs

    shardings = [*where, *[None] * (len(leaves) - len(where))]
    n_facts = len(jax.tree.leaves(shapes.facts)) if isinstance(shapes, ValueWithFacts) else 0
    loop = _Loop(values_of_read_leaves, [shardings[index] for index in leaf_indices], n_facts)
    read_leaves = [leaves[index] for index in leaf_indices]
    # Nothing tells whether constants of the jaxpr are differentiated.
    has_traced_consts = any(
        isinstance(const, jax.core.Tracer) for const in getattr(jaxpr, "consts", ())
    )
    map_leaves = loop.recomputed if has_traced_consts else loop.differentiable
    outputs = map_leaves(read_leaves, *chunks)
    joined = [_join_chunks(output, parts)[:, : targets.shape[1]] for output in outputs]
    return jax.tree.unflatten(jax.tree.structure(shapes), joined)


class _Loop:
    """A scan over chunks that can be differentiated in three ways.

    Its `chunk_values` are called as ``chunk_values(leaves, index, hidden, targets)``, for the
    leaves that it reads.
    """

    def __init__(
        self, chunk_values: Callable[..., _Outputs], shardings: Sequence[Any], n_facts: int
    ) -> None:
        self._chunk_values = chunk_values
        self._shardings = shardings  # of each leaf in the loop, or None
        self._n_facts = n_facts  # of the last outputs, which are constants to the gradient

    def _gather(self, leaves: Sequence[Leaf], trains: Sequence[bool]) -> list[Leaf]:
        """Gathers the frozen leaves, and leaves trained ones sharded like their gradients."""
        gathered = []
        for leaf, sharding, is_trained in zip(leaves, self._shardings, trains, strict=True):
            if sharding is None or is_trained:
                gathered.append(leaf)
            else:
                gathered.append(lax.with_sharding_constraint(leaf, sharding))
        return gathered

    def _scan(self, function: Callable[..., Tree], hidden: jax.Array, targets: jax.Array) -> Tree:
        """Calls ``function(index, hidden, targets)`` for each chunk, and stacks the results."""

        def body(_: None, chunk: tuple[jax.Array, ...]) -> tuple[None, Tree]:
            return None, function(*chunk)

        return lax.scan(body, None, (jnp.arange(len(hidden)), hidden, targets))[1]

    def recomputed(self, leaves: Sequence[Leaf], hidden: jax.Array, targets: jax.Array) -> _Outputs:
        """Returns the values; the backward pass recomputes the logits."""
        # Inside a scan, nothing can be merged with the forward pass: the barrier would only cost.
        chunk_values = jax.checkpoint(self._chunk_values, prevent_cse=False)
        outputs: _Outputs = self._scan(functools.partial(chunk_values, leaves), hidden, targets)
        return outputs

    def differentiable(
        self, leaves: Sequence[Leaf], hidden: jax.Array, targets: jax.Array
    ) -> _Outputs:
        """Returns the values, with a derivative only for differentiated arrays."""

        @jax.custom_jvp
        def mapped(leaves: list[Leaf], hidden: jax.Array, targets: jax.Array) -> _Outputs:
            gathered = self._gather(leaves, [False] * len(leaves))
            chunk_values = functools.partial(self._chunk_values, gathered)
            outputs: _Outputs = self._scan(chunk_values, hidden, targets)
            return outputs

        mapped.defjvp(self._jvp, symbolic_zeros=True)
        outputs: _Outputs = mapped(list(leaves), hidden, targets)
        return outputs

    def _jvp(self, primals: Any, tangents: Any) -> tuple[_Outputs, _Outputs]:
        """Differentiates by the leaves and hidden states that have a tangent."""
        leaves, hidden, targets = primals
        leaf_tangents, hidden_tangent, _ = tangents
        trains = [not isinstance(tangent, SymbolicZero) for tangent in leaf_tangents]
        gathered = self._gather(leaves, trains)
        if not any(trains) and self._is_loss(gathered, hidden, targets):
            return self._with_slopes(gathered, hidden, targets, hidden_tangent)
        all_primals = [*gathered, hidden]
        all_tangents = [*leaf_tangents, hidden_tangent]
        moving_indices = [
            index
            for index, tangent in enumerate(all_tangents)
            if not isinstance(tangent, SymbolicZero)
        ]

        def moving_outputs(*moving_primals: jax.Array) -> _Outputs:
            """Returns the outputs as a function of the arrays with tangents."""
            primals = list(all_primals)
            for index, primal in zip(moving_indices, moving_primals, strict=True):
                primals[index] = primal
            *leaves, hidden = primals
            return self.recomputed(leaves, hidden, targets)

        return jax.jvp(
            moving_outputs,
            [all_primals[index] for index in moving_indices],
            [all_tangents[index] for index in moving_indices],
        )

    def _is_loss(self, leaves: Sequence[Leaf], hidden: jax.Array, targets: jax.Array) -> bool:
        """Returns True if a chunk has exactly one value per token, apart from its facts."""
        shapes = jax.eval_shape(self._chunk_values, leaves, jnp.int32(0), hidden[0], targets[0])
        values = shapes[: len(shapes) - self._n_facts]
        if len(values) != 1:
            return False
        (value,) = values
        return value.shape == hidden.shape[1:3] and jnp.issubdtype(value.dtype, jnp.floating)

    def _with_slopes(
        self,
        leaves: Sequence[Leaf],
        hidden: jax.Array,
        targets: jax.Array,
        hidden_tangent: jax.Array,
    ) -> tuple[_Outputs, _Outputs]:
        """Computes each token's value with its gradient, by two products with the head."""

        def value_slope_and_facts(index: jax.Array, hidden: jax.Array, targets: jax.Array) -> Any:
            """Returns the value of each token, its gradient, and its facts."""

            def value_and_facts(hidden: jax.Array) -> tuple[jax.Array, _Outputs]:
                value, *facts = self._chunk_values(leaves, index, hidden, targets)
                return value, facts

            value, pull_back, facts = jax.vjp(value_and_facts, hidden, has_aux=True)
            (slope,) = pull_back(jnp.ones_like(value))
            return value, slope, facts

        values, slopes, facts = self._scan(value_slope_and_facts, hidden, targets)
        products = hidden_tangent.astype(values.dtype) * slopes.astype(values.dtype)
        value_tangent = jnp.sum(products, axis=-1)
        return [values, *facts], [value_tangent, *map(jnp.zeros_like, facts)]


def _without_dead_code(traced: Any) -> tuple[Any, list[int]]:
    """Removes unneeded equations; also returns the indices of the inputs that remain."""
    jaxpr: Jaxpr = getattr(traced, "jaxpr", traced)
    needed = needed_equations(jaxpr, (True,) * len(jaxpr.outvars))
    equations = [equation for equation, *_ in needed.equations]
    pruned = jaxpr.replace(eqns=equations)
    read_atoms = {id(atom) for atom in pruned.outvars}
    for equation in equations:
        read_atoms |= {id(atom) for atom in equation.invars}
    input_indices = [index for index, var in enumerate(jaxpr.invars) if id(var) in read_atoms]
    return pruned if traced is jaxpr else traced.replace(jaxpr=pruned), input_indices


def _split_chunks(array: jax.Array, n: int, parts: int) -> jax.Array:
    """Reshapes [batch, m, …] to [n, batch, parts * ceil(m / (n * parts)), …], zero-padded."""
    batch, m, *features = array.shape
    size = -(-m // (n * parts))
    padding = [(0, 0)] * array.ndim
    padding[1] = (0, n * parts * size - m)
    chunks = jnp.pad(array, padding).reshape(batch, parts, n, size, *features)
    chunks = jnp.moveaxis(chunks, 2, 0)
    return chunks.reshape(n, batch, parts * size, *features)


def _join_chunks(chunks: jax.Array, parts: int) -> jax.Array:
    """Inverts `_split_chunks`: [n, batch, parts * size, …] to [batch, parts * n * size, …]."""
    n, batch, chunk_length, *features = chunks.shape
    by_part = chunks.reshape(n, batch, parts, chunk_length // parts, *features)
    return jnp.moveaxis(by_part, 0, 2).reshape(batch, n * chunk_length, *features)
