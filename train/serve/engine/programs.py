"""The compiled functions of sampling: prompts in chunks, a token of many completions at once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.bank.mixing import Choice, mixed
from lora_jax.bank.slots import Slots, WeightSlots, map_slots
from lora_jax.models.layers.cache import Cache, init_cache
from lora_jax.models.sampling.choice import Sampling, choose, log_probability, scale, token_keys
from lora_jax.models.sampling.loop import next_logits
from lora_jax.training.layout import Layout
from train.serve.engine.trainer import likeliest


class CompletionRows(NamedTuple):
    """Completions under way, a row each.

    Attributes:
      cache: keys and values; slot i has the token at position i.
      last: [rows] int32, the newest token, which is not in the cache yet.
      drawn: [rows] int32, the number of tokens drawn.
      slots: [rows] int32, the adapters.
      sampling: [rows] each.
    """

    cache: Cache
    last: jax.Array
    drawn: jax.Array
    slots: jax.Array
    sampling: Sampling


class DrawnTokens(NamedTuple):
    """Holds what was drawn: a token of each row.

    Attributes:
      ids: [rows] int32.
      logps: [rows] fp32, of the distribution at the row's temperature.
      top: ids and log-probabilities of the likeliest, [rows, TOP] each.
    """

    ids: Any
    logps: Any
    top: tuple[Any, Any]


class SamplingPrograms:
    """The functions, for one model; see their names. `compiled` counts what was compiled."""

    def __init__(self, model: Any, layout: Layout, chunk: int) -> None:
        """Makes the functions; nothing is compiled yet.

        Args:
          model: a model of `lora_jax.models`.
          layout: the mesh.
          chunk: tokens of a prompt that run at once.
        """
        self._model, self._mesh, self.chunk = model, layout.mesh, chunk
        self._place = functools.partial(jax.device_put, device=layout.whole)
        self._forward = mixed(model.apply)
        self.compiled = 0
        # Results are replicated on a mesh, so that they lie as the arguments of the next call do.
        how = {"out_shardings": layout.whole, "compiler_options": layout.compiler_options}
        jit = functools.partial(jax.jit, **how)
        self._decode = jit(self._decoded, donate_argnums=1)
        self._extend = jit(self._extended, donate_argnums=4)
        self._insert = jit(self._inserted, donate_argnums=0)
        self._fit = jit(self._fitted, static_argnums=2)
        self._first = jit(self._first_token)
        self._cut = jit(self._beginning)
        self._take = jit(self._taken)

    def empty(self, rows: int, length: int) -> CompletionRows:
        """Returns rows without completions."""
        cache = init_cache(self._model.config, rows, length, self._model.dtype)
        ones, vocab = functools.partial(jnp.ones, rows), self._model.config.vocab_size
        keys = jax.random.split(jax.random.key(0), rows)
        sampling = Sampling(ones(), ones(), jnp.full(rows, vocab, jnp.int32), keys)
        last, drawn, slots = (jnp.zeros(rows, jnp.int32) for _ in range(3))
        return self._place(
            CompletionRows(cache._replace(filled=None), last, drawn, slots, sampling)
        )

    def prompt(self, length: int) -> Cache:
        """Returns the cache for a prompt of at most this length, which has whole chunks."""
        whole = self.whole(length)
        return self._place(init_cache(self._model.config, 1, whole, self._model.dtype))

    def whole(self, length: int) -> int:
        """Returns a number of tokens, rounded up to whole chunks."""
        return -(-length // self.chunk) * self.chunk

    def extend(
        self, tree: Any, slot: Any, ids: Any, n: Any, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Runs a chunk of a prompt; returns the logits after its last token, [1, vocab].

        Args:
          tree: the base with adapters in slots.
          slot: [] int32, the prompt's adapter.
          ids: [1, chunk] int32, filled up on the right.
          n: [] int32, the tokens of the chunk.
          cache: that of the prompt; it is taken.
        """
        with jax.set_mesh(self._mesh):
            return self._extend(tree, slot, ids, n, cache)

    def first(self, logits: jax.Array, sampling: Sampling, with_top: Any) -> DrawnTokens:
        """Draws the first token of a completion.

        Args:
          logits: [1, vocab], after the prompt.
          sampling: [1] each.
          with_top: [] bool, whether the likeliest tokens are wanted.
        """
        with jax.set_mesh(self._mesh):
            return self._first(logits, sampling, with_top)

    def cut(self, cache: Cache, n: Any) -> Cache:
        """Returns a copy of a prompt's cache with the first n tokens, [] int32, alone."""
        with jax.set_mesh(self._mesh):
            return self._cut(cache, n)

    def take(self, rows: CompletionRows, row: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a copy of a row's keys and values, in the host's memory.

        Args:
          rows: the rows.
          row: [] int32.
          n: the number of tokens in its cache.
        """
        with jax.set_mesh(self._mesh):
            both = self._take(rows, row)
        key, value = (np.array(np.asarray(x)[:, :, :, :n]) for x in both)
        return key, value

    def give(self, key: np.ndarray, value: np.ndarray, length: int) -> Cache:
        """Returns what `take` returned as the cache of a prompt of at most this length."""
        cache = self.prompt(length)
        room = [(0, 0)] * key.ndim
        room[3] = (0, cache.positions.shape[1] - key.shape[3])
        key, value = (np.pad(x, room) for x in (key, value))
        return cache._replace(key=self._place(key), value=self._place(value))

    def insert(
        self,
        rows: CompletionRows,
        row: Any,
        cache: Cache,
        n: Any,
        token: Any,
        drawn: Any,
        mine: Any,
    ) -> CompletionRows:
        """Puts a completion into a row.

        Args:
          rows: they are taken.
          row: [] int32.
          cache: keys and values of the prompt, and of all tokens drawn but the newest.
          n: [] int32, its tokens.
          token: [] int32, the newest token.
          drawn: [] int32, the number of tokens drawn.
          mine: (slot, sampling) of the completion, [] each.
        """
        with jax.set_mesh(self._mesh):
            return self._insert(rows, row, cache, n, token, drawn, mine)

    def decode(
        self, tree: Any, rows: CompletionRows, with_top: Any
    ) -> tuple[CompletionRows, DrawnTokens]:
        """Draws the next token of each row; the rows are taken."""
        with jax.set_mesh(self._mesh):
            return self._decode(tree, rows, with_top)

    def fit(self, rows: CompletionRows, order: Any, length: int) -> CompletionRows:
        """Returns chosen rows, with caches of another length.

        Args:
          rows: the rows.
          order: [n] int32, which of them.
          length: length of the caches.
        """
        with jax.set_mesh(self._mesh):
            return self._fit(rows, order, length)

    def _extended(
        self, tree: Any, slot: jax.Array, ids: jax.Array, n: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        self.compiled += 1
        mask, last = (jnp.arange(ids.shape[1]) < n)[None], jnp.broadcast_to(n - 1, 1)
        return next_logits(self._forward, _alone(tree, slot), ids, cache, mask, at=last)

    def _first_token(
        self, logits: jax.Array, sampling: Sampling, with_top: jax.Array
    ) -> DrawnTokens:
        self.compiled += 1
        return _draw(logits, sampling, jnp.zeros(1, jnp.int32), with_top)

    def _beginning(self, cache: Cache, n: jax.Array) -> Cache:
        self.compiled += 1
        there = jnp.arange(cache.positions.shape[1]) < n
        return cache._replace(
            key=jnp.array(cache.key, copy=True),
            value=jnp.array(cache.value, copy=True),
            positions=jnp.where(there, cache.positions, -1),
            filled=n,
            length=jnp.full_like(cache.length, n),
        )

    def _taken(self, rows: CompletionRows, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        self.compiled += 1
        both = rows.cache.key, rows.cache.value
        key, value = (lax.dynamic_slice_in_dim(x, row, 1, axis=1) for x in both)
        return key, value

    def _inserted(
        self,
        rows: CompletionRows,
        row: jax.Array,
        cache: Cache,
        n: jax.Array,
        token: jax.Array,
        drawn: jax.Array,
        mine: Any,
    ) -> CompletionRows:
        self.compiled += 1
        slot, sampling = mine
        length = rows.cache.positions.shape[1]
        real = jnp.arange(length) < n
        positions = jnp.where(real, jnp.arange(length, dtype=jnp.int32), -1)

        def put(old: jax.Array, new: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice(old, new[:, :, :, :length], (0, row, 0, 0, 0))

        old = rows.cache
        return CompletionRows(
            cache=old._replace(
                key=put(old.key, cache.key),
                value=put(old.value, cache.value),
                positions=old.positions.at[row].set(positions),
                length=old.length.at[row].set(n),
            ),
            last=rows.last.at[row].set(token),
            drawn=rows.drawn.at[row].set(drawn),
            slots=rows.slots.at[row].set(slot),
            sampling=jax.tree.map(lambda x, new: x.at[row].set(new), rows.sampling, sampling),
        )

    def _decoded(
        self, tree: Any, rows: CompletionRows, with_top: jax.Array
    ) -> tuple[CompletionRows, DrawnTokens]:
        self.compiled += 1
        params = Choice(tree, rows.slots)
        logits, cache = next_logits(self._forward, params, rows.last[:, None], rows.cache)
        tokens = _draw(logits, rows.sampling, rows.drawn, with_top)
        return rows._replace(cache=cache, last=tokens.ids, drawn=rows.drawn + 1), tokens

    def _fitted(self, rows: CompletionRows, order: jax.Array, length: int) -> CompletionRows:
        self.compiled += 1

        def resized(x: jax.Array, axis: int, fill: int) -> jax.Array:
            more = [(0, 0)] * x.ndim
            more[axis] = (0, max(0, length - x.shape[axis]))
            padded = jnp.pad(x, more, constant_values=fill)
            return lax.slice_in_dim(padded, 0, length, axis=axis)

        cache = rows.cache
        last, drawn, slots, sampling = jax.tree.map(lambda x: x[order], rows[1:])
        fitted = cache._replace(
            key=resized(cache.key[:, order], 3, 0),
            value=resized(cache.value[:, order], 3, 0),
            positions=resized(cache.positions[order], 1, -1),
            length=cache.length[order],
        )
        return CompletionRows(fitted, last, drawn, slots, sampling)


def _alone(tree: Any, slot: jax.Array) -> Choice:
    """Returns the choice of a slot for one row, at the cost of that slot alone."""

    def only(_: str, slots: Slots) -> WeightSlots:
        assert isinstance(slots, WeightSlots)  # adapters here are factors
        return slots.only(slot)

    return Choice(map_slots(only, tree), jnp.minimum(slot, 1)[None])


def _draw(
    logits: jax.Array, sampling: Sampling, step: jax.Array, with_top: jax.Array
) -> DrawnTokens:
    """Draws a token of each row.

    Args:
      logits: [rows, vocab].
      sampling: [rows] each.
      step: [rows] int32, the number of tokens drawn before.
      with_top: [] bool.
    """
    ids = choose(logits, sampling, token_keys(sampling.key, step))
    logps = log_probability(logits, ids, sampling.temperature)
    return DrawnTokens(ids, logps, likeliest(scale(logits, sampling.temperature), with_top))
