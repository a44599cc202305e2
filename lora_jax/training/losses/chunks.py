"""Chunks of predictions: the head's logits exist for some of them at a time."""

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
_UNIT = 256  # chunks of accelerators are a multiple of it
_LOGITS = 2**29  # bytes of a chunk's logits, fp32, on an accelerator

_Outputs = list[jax.Array]
_Values = Callable[[Tree, jax.Array, jax.Array, jax.Array], Tree]


class ValueWithFacts(NamedTuple):
    """A value of each token, and facts about the token that are constants to the gradient.

    Attributes:
      value: the value, [...].
      facts: a tree of arrays, [...] each, without a gradient.
    """

    value: jax.Array
    facts: Tree


def predictions_at_once(placement: Placement, words: int) -> int:
    """Returns the predictions whose logits a device has in memory at once, by default.

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
    fitting = _LOGITS // (4 * -(-words // placement.word_parts))
    return max(_UNIT, fitting // _UNIT * _UNIT)


def number_of_chunks(shape: tuple[int, ...], chunk: int, parts: int = 1) -> int:
    """Returns the number of chunks of predictions of `shape`, [batch, m]; see `token_values`."""
    batch, m = shape
    if not chunk:
        return 1
    return -(-m // (parts * max(1, chunk // (batch * parts))))


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
    """Maps a function of hidden states and targets over chunks of them.

    What the head reads is gathered once, before the loop. Of a head that does not train, the
    gradient of each token's hidden state is computed along with its value, while the logits are
    there; else the head runs once more for each chunk in the backward pass.

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
    chunks = tuple(_split_chunks(array, n, parts) for array in (hidden, targets))
    leaves = jax.tree.leaves(inputs)

    def function(leaves: Sequence[Leaf], *chunk: jax.Array) -> Tree:
        return values(jax.tree.unflatten(jax.tree.structure(inputs), leaves), *chunk)

    first = (jnp.int32(0), *(array[0] for array in chunks))
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(leaves, *first)
    traced, places = _without_dead_code(traced)
    read = [place for place in places if place < len(leaves)]
    run = jaxpr_as_fun(traced)

    def called(given: Sequence[Leaf], *chunk: jax.Array) -> _Outputs:
        known = dict(zip(read, given, strict=True))
        outputs: _Outputs = run(*(known.get(place, 0) for place in range(len(leaves))), *chunk)
        return outputs

    by_place = [*where, *[None] * (len(leaves) - len(where))]
    n_facts = len(jax.tree.leaves(shapes.facts)) if isinstance(shapes, ValueWithFacts) else 0
    loop = _Loop(called, [by_place[place] for place in read], n_facts)
    given = [leaves[place] for place in read]
    if any(isinstance(const, jax.core.Tracer) for const in getattr(traced, "consts", ())):
        outputs = loop.recomputed(given, *chunks)  # nothing tells whether these are differentiated
    else:
        outputs = loop.differentiable(given, *chunks)
    joined = [_join_chunks(x, parts)[:, : targets.shape[1]] for x in outputs]
    return jax.tree.unflatten(jax.tree.structure(shapes), joined)


class _Loop:
    """A scan over chunks, with three ways to differentiate it."""

    def __init__(self, called: Callable[..., _Outputs], where: Sequence[Any], n_facts: int) -> None:
        self._called, self._where = called, where
        self._n_facts = n_facts  # of the last outputs, which are constants to the gradient

    def _gathered(self, given: Sequence[Leaf], trains: Sequence[bool] | None = None) -> list[Leaf]:
        """Returns the leaves gathered, but for those that train: their gradient is sharded."""
        trains = trains or [False] * len(given)
        return [
            x if where is None or moves else lax.with_sharding_constraint(x, where)
            for x, where, moves in zip(given, self._where, trains, strict=True)
        ]

    def _scanned(
        self, function: Callable[..., Tree], hidden: jax.Array, targets: jax.Array
    ) -> Tree:
        def body(_: None, chunk: tuple[jax.Array, ...]) -> tuple[None, Tree]:
            return None, function(*chunk)

        return lax.scan(body, None, (jnp.arange(len(hidden)), hidden, targets))[1]

    def recomputed(self, given: Sequence[Leaf], hidden: jax.Array, targets: jax.Array) -> _Outputs:
        """Returns the values; the backward pass computes the logits again."""
        # Inside a scan, nothing can be merged with the forward pass: the barrier would only cost.
        function = jax.checkpoint(self._called, prevent_cse=False)
        outputs: _Outputs = self._scanned(lambda *chunk: function(given, *chunk), hidden, targets)
        return outputs

    def differentiable(
        self, given: Sequence[Leaf], hidden: jax.Array, targets: jax.Array
    ) -> _Outputs:
        """Returns the values; their derivative is computed for differentiated arrays alone."""

        @jax.custom_jvp
        def mapped(given: list[Leaf], hidden: jax.Array, targets: jax.Array) -> _Outputs:
            whole = self._gathered(given)
            outputs: _Outputs = self._scanned(
                lambda *chunk: self._called(whole, *chunk), hidden, targets
            )
            return outputs

        mapped.defjvp(self._jvp, symbolic_zeros=True)
        outputs: _Outputs = mapped(list(given), hidden, targets)
        return outputs

    def _jvp(self, primals: Any, tangents: Any) -> tuple[_Outputs, _Outputs]:
        given, hidden, targets = primals
        trains = [not isinstance(tangent, SymbolicZero) for tangent in tangents[0]]
        whole = self._gathered(given, trains)
        shapes = jax.eval_shape(self._called, whole, jnp.int32(0), hidden[0], targets[0])
        moves = [*trains, not isinstance(tangents[1], SymbolicZero)]
        values = shapes[: len(shapes) - self._n_facts]
        is_loss = [(x.shape, jnp.issubdtype(x.dtype, jnp.floating)) for x in values] == [
            (hidden.shape[1:3], True)
        ]
        if is_loss and not any(trains):
            return self._with_slopes(whole, hidden, targets, tangents[1])
        all_tangents = [*tangents[0], tangents[1]]

        def moving_outputs(*moving: jax.Array) -> _Outputs:
            left = iter(moving)
            *new, states = (
                next(left) if moved else x for x, moved in zip([*whole, hidden], moves, strict=True)
            )
            return self.recomputed(new, states, targets)

        return jax.jvp(
            moving_outputs,
            [x for x, moved in zip([*whole, hidden], moves, strict=True) if moved],
            [x for x, moved in zip(all_tangents, moves, strict=True) if moved],
        )

    def _with_slopes(
        self, given: Sequence[Leaf], hidden: jax.Array, targets: jax.Array, change: jax.Array
    ) -> tuple[_Outputs, _Outputs]:
        """Computes each token's value and its gradient together: two products with the head."""

        def function(index: jax.Array, hidden: jax.Array, targets: jax.Array) -> Any:
            def value_and_facts(x: jax.Array) -> tuple[jax.Array, _Outputs]:
                value, *facts = self._called(given, index, x, targets)
                return value, facts

            value, pull, facts = jax.vjp(value_and_facts, hidden, has_aux=True)
            return value, pull(jnp.ones_like(value))[0], facts

        value, slope, facts = self._scanned(function, hidden, targets)
        moved = jnp.sum(change.astype(value.dtype) * slope.astype(value.dtype), axis=-1)
        return [value, *facts], [moved, *map(jnp.zeros_like, facts)]


def _without_dead_code(traced: Any) -> tuple[Any, set[int]]:
    """Returns a jaxpr without equations for nothing, and the places of the inputs that it reads."""
    jaxpr: Jaxpr = getattr(traced, "jaxpr", traced)
    live = [eqn for eqn, *_ in needed_equations(jaxpr, (True,) * len(jaxpr.outvars)).equations]
    left = jaxpr.replace(eqns=live)
    read = {id(atom) for atom in (*left.outvars, *(atom for eqn in live for atom in eqn.invars))}
    places = {place for place, var in enumerate(jaxpr.invars) if id(var) in read}
    return left if traced is jaxpr else traced.replace(jaxpr=left), places


def _split_chunks(array: jax.Array, n: int, parts: int) -> jax.Array:
    """Reshapes [batch, m, …] to [n, batch, parts * ceil(m / (n * parts)), …], filled with zeros."""
    batch, m = array.shape[:2]
    size = -(-m // (n * parts))
    missing = n * parts * size - m
    filled = jnp.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)])
    chunks = jnp.moveaxis(filled.reshape(batch, parts, n, size, *array.shape[2:]), 2, 0)
    return chunks.reshape(n, batch, parts * size, *array.shape[2:])


def _join_chunks(chunks: jax.Array, parts: int) -> jax.Array:
    """Inverts `_split_chunks`: [n, batch, parts * size, …] to [batch, parts * n * size, …]."""
    n, batch, places, *rest = chunks.shape
    split = chunks.reshape(n, batch, parts, places // parts, *rest)
    return jnp.moveaxis(split, 0, 2).reshape(batch, n * places, *rest)
