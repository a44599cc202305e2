"""The compiled functions of sampling: prompts in chunks, a token of many completions at once."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax import models
from lora_jax.bank.mixing import Choice, mixed
from lora_jax.bank.slots import Slots, WeightSlots, map_slots
from lora_jax.core.types import Model, Tree
from lora_jax.core.weight import LoraWeight
from lora_jax.models.layers.cache import Cache, depends_on_room, init_cache
from lora_jax.models.sampling import blocks, slots
from lora_jax.models.sampling.adjust import Adjustments, adjust_logits
from lora_jax.models.sampling.blocks import CacheBlock
from lora_jax.models.sampling.choice import Sampling
from lora_jax.models.sampling.slots import DecodingRows, DrawnTokens, Flag, Number
from lora_jax.training.layout import Layout
from train.run.invocation import meets_every_token
from train.serve.protocol.requests import TOP

P = ParamSpec("P")
R = TypeVar("R")


class SamplingPrograms:
    """The functions of `lora_jax.models.sampling.slots` for one model, on a mesh.

    Attributes:
      chunk: tokens of a prompt that run at once.
      compiled: the number of functions that were compiled.
      put, insert, fit: `put_block`, which takes the cache; `insert_row`, which takes the rows; and
        `fit_rows`.
      extend, run, draw: run a chunk of a prompt, and a token of each row; and draw the next ones.
      extend_all: runs pieces of several prompts.
      extend_after: runs a chunk of which an activated LoRA sees the tokens from one on alone.
    """

    def __init__(self, model: Model, layout: Layout, chunk: int) -> None:
        """Makes the functions; nothing is compiled yet.

        Args:
          model: a model of `lora_jax.models`.
          layout: the mesh.
          chunk: tokens of a prompt that run at once.
        """
        self._model, self._layout, self.chunk = model, layout, chunk
        self._place = functools.partial(jax.device_put, device=layout.whole)
        # Experts sort the tokens of all rows together, which nothing tells apart afterwards.
        one_by_one = bool(getattr(model.config, "num_experts", 0))
        self._forward = mixed(model.apply, one_by_one=one_by_one)
        self._adapted = lj.adapt(model.apply)
        kinds = models.kinds(model.config)
        self._by_token = {path for path, kind in kinds.items() if meets_every_token(kind)}
        self.compiled = 0
        self._grow = self._program(slots.resize_cache, static_argnums=1)
        self._block = self._program(blocks.take_block, static_argnums=2)
        self._row_block = self._program(blocks.take_row_block, static_argnums=3)
        self.put = self._program(blocks.put_block, donate_argnums=0)
        self.insert = self._program(slots.insert_row, donate_argnums=0)
        self.fit = self._program(slots.fit_rows, static_argnums=2)
        self.extend = self._program(self._run_chunk, donate_argnums=4)
        self.extend_after = self._program(self._run_activated, donate_argnums=4)
        self.extend_all = self._program(self._run_pieces, donate_argnums=4)
        self.run = self._program(self._run_rows, donate_argnums=1)
        self.draw = self._program(self._draw_tokens)
        self._adjust = self._program(adjust_logits)

    def _program(self, function: Callable[P, R], **options: Any) -> Callable[P, R]:
        """Returns a compiled function, which counts how often it is compiled.

        Its results lie on the mesh as the arguments of the next call do.
        """

        @functools.wraps(function)
        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            self.compiled += 1
            return function(*args, **kwargs)

        program: Any = self._layout.jitted(counted, **options)
        return program

    @property
    def has_memory(self) -> bool:
        """True where linear layers remember a row's tokens: all of them, in one state."""
        return bool(getattr(self._model.config, "linear_layers", ()))

    @property
    def depends_on_room(self) -> bool:
        """True where keys depend on the length of the cache."""
        return depends_on_room(self._model.config)

    def empty(self, rows: int, length: int) -> DecodingRows:
        """Returns rows without completions."""
        return self._place(slots.empty_rows(self._model, rows, length))

    def prompt(self, length: int) -> Cache:
        """Returns the cache for a prompt of at most this length, which has whole chunks."""
        whole = self.whole(length)
        return self._place(init_cache(self._model.config, 1, whole, self._model.dtype))

    def whole(self, length: int) -> int:
        """Returns a number of tokens, rounded up to whole chunks."""
        return -(-length // self.chunk) * self.chunk

    def grow(self, cache: Cache, length: int) -> Cache:
        """Returns a prompt's cache with room for so many tokens, rounded up to whole chunks."""
        return self._grow(cache, self.whole(length))

    def block(self, cache: Cache, first: int) -> CacheBlock:
        """Returns a copy of a prompt's newest chunk, which begins at a token."""
        return self._block(cache, np.int32(first), self.chunk)

    def row_block(self, rows: DecodingRows, row: int, first: int) -> CacheBlock:
        """Returns a copy of a chunk of a row."""
        return self._row_block(rows, np.int32(row), np.int32(first), self.chunk)

    def take(self, rows: DecodingRows, row: Number, n: int) -> CacheBlock:
        """Returns a copy of a row, in the host's memory.

        Args:
          rows: the rows.
          row: [] int32.
          n: the number of tokens in its cache.
        """
        length = rows.cache.positions.shape[1]
        whole = self._row_block(rows, row, np.int32(0), length)
        key, value = (np.array(np.asarray(x)[:, :, :, :n]) for x in (whole.key, whole.value))
        return CacheBlock(key, value, jax.tree.map(np.array, whole.recurrent))

    def give(self, block: CacheBlock, length: int) -> Cache:
        """Returns the arrays of `take` as the cache of a prompt of at most this length."""
        cache = self.prompt(length)
        room = [(0, 0)] * block.key.ndim
        room[3] = (0, cache.positions.shape[1] - block.key.shape[3])
        key, value = (np.pad(x, room) for x in (block.key, block.value))
        key, value, recurrent = self._place((key, value, block.recurrent))
        return cache._replace(key=key, value=value, recurrent=recurrent)

    def _run_chunk(
        self, tree: Tree, slot: Number, ids: np.ndarray, n: Number, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Runs a chunk of a prompt by the adapter in a slot, [] int32; takes the cache."""
        return slots.run_chunk(self._forward, _choose_slot(tree, slot), ids, n, cache)

    def _run_activated(
        self,
        tree: Tree,
        slot: Number,
        ids: np.ndarray,
        n: Number,
        cache: Cache,
        first: Number,
    ) -> tuple[jax.Array, Cache]:
        """Runs a chunk, of which the tokens from `first` on alone see the adapter."""
        choice, active = _choose_slot(tree, slot), (jnp.arange(ids.shape[1]) >= first)[None]

        def own(path: str, each: Slots) -> LoraWeight:
            assert isinstance(each, WeightSlots)
            weight = each.take_example(each.arrays, choice.ids[0])
            return weight.replace(active=active) if path in self._by_token else weight

        return slots.run_chunk(self._adapted, map_slots(own, choice.tree), ids, n, cache)

    def _run_pieces(
        self,
        tree: Tree,
        slot: np.ndarray,
        ids: np.ndarray,
        n: np.ndarray,
        caches: tuple[Cache, ...],
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Runs a piece of each of some prompts; takes the caches, which have one length.

        Args:
          tree: the base with adapters in slots.
          slot: [prompts] int32.
          ids: [prompts, 1, piece] int32, filled up on the right.
          n: [prompts] int32, the tokens of each piece.
          caches: the caches.

        Returns:
          The logits after each piece, [prompts, 1, vocab], and the caches.
        """
        run_chunk: Any = jax.vmap(functools.partial(self._run_chunk, tree))
        stacked_caches = jax.tree.map(lambda *x: jnp.stack(x), *caches)
        logits, stacked_caches = run_chunk(
            jnp.asarray(slot), jnp.asarray(ids), jnp.asarray(n), stacked_caches
        )
        caches = tuple(
            jax.tree.map(lambda x, i=i: x[i], stacked_caches) for i in range(len(caches))
        )
        return logits, caches

    def _run_rows(self, tree: Tree, rows: DecodingRows) -> tuple[jax.Array, DecodingRows]:
        """Runs the newest token of each row by its adapter; takes the rows."""
        return slots.run_rows(self._forward, Choice(tree, rows.adapters), rows)

    def adjust(
        self, logits: jax.Array, adjustments: Adjustments[np.ndarray], temperature: jax.Array
    ) -> jax.Array:
        """Returns the logits to choose from; see `adjust_logits`."""
        return self._adjust(logits, *self._place((adjustments, temperature)))

    def _draw_tokens(
        self,
        logits: jax.Array,
        adjusted: jax.Array,
        sampling: Sampling,
        drawn: jax.Array | np.ndarray,
        with_top: Flag,
    ) -> tuple[DrawnTokens[jax.Array], jax.Array]:
        """Draws a token of each row, of logits that may be adjusted; also returns `drawn` + 1."""
        step = jnp.asarray(drawn)
        return slots.draw_tokens(logits, sampling, step, TOP, with_top, adjusted), step + 1


def _choose_slot(tree: Tree, slot: Number) -> Choice:
    """Returns the choice of a slot for one row, at the cost of that slot alone."""

    def only(_: str, slots: Slots) -> WeightSlots:
        assert isinstance(slots, WeightSlots)  # adapters here are factors
        return slots.only(jnp.asarray(slot))

    return Choice(map_slots(only, tree), jnp.minimum(slot, 1)[None])
