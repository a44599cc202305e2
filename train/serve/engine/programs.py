"""The compiled functions of sampling: chunks of prompts, and one token for each of many rows."""

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
from lora_jax.models.layers.cache import Cache, depends_on_cache_length, init_cache
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
      put_block, insert, fit_rows: `put_block` takes the cache, `insert_row` takes the rows; and
        `fit_rows`.
      extend, run, draw: run a chunk of a prompt, and a token of each row; and draw the next ones.
      extend_all: runs pieces of several prompts.
      extend_after: runs a chunk of which an activated LoRA sees the tokens from one on alone.
    """

    def __init__(self, model: Model, layout: Layout, chunk: int) -> None:
        """Creates the functions without compiling them.

        Args:
          model: a model of `lora_jax.models`.
          layout: the mesh.
          chunk: tokens of a prompt that run at once.
        """
        self._model = model
        self._layout = layout
        self.chunk = chunk
        self._device_put = functools.partial(jax.device_put, device=layout.whole)
        # Experts sort the tokens of all rows together, which nothing tells apart afterwards.
        one_by_one = bool(getattr(model.config, "num_experts", 0))
        self._forward = mixed(model.apply, one_by_one=one_by_one)
        self._adapted = lj.adapt(model.apply)
        kinds = models.kinds(model.config)
        self._token_paths = {path for path, kind in kinds.items() if meets_every_token(kind)}
        self.compiled = 0
        self._grow = self._compile(slots.resize_cache, static_argnums=1)
        self._block = self._compile(blocks.take_block, static_argnums=2)
        self._row_block = self._compile(blocks.take_row_block, static_argnums=3)
        self.put_block = self._compile(blocks.put_block, donate_argnums=0)
        self.insert = self._compile(slots.insert_row, donate_argnums=0)
        self.fit_rows = self._compile(slots.fit_rows, static_argnums=2)
        self.extend = self._compile(self._run_chunk, donate_argnums=4)
        self.extend_after = self._compile(self._run_activated, donate_argnums=4)
        self.extend_all = self._compile(self._run_pieces, donate_argnums=4)
        self.run = self._compile(self._run_rows, donate_argnums=1)
        self.draw = self._compile(self._draw_tokens)
        self._adjust = self._compile(adjust_logits)

    def _compile(self, function: Callable[P, R], **options: Any) -> Callable[P, R]:
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
        """True if the model has linear layers, whose recurrent state covers all tokens."""
        return bool(getattr(self._model.config, "linear_layers", ()))

    @property
    def depends_on_cache_length(self) -> bool:
        """True if the keys depend on the length of the cache."""
        return depends_on_cache_length(self._model.config)

    def empty_rows(self, n_rows: int, length: int) -> DecodingRows:
        """Returns rows without completions."""
        return self._device_put(slots.empty_rows(self._model, n_rows, length))

    def prompt_cache(self, length: int) -> Cache:
        """Returns an empty cache for a prompt, with a length in complete chunks."""
        cache = init_cache(self._model.config, 1, self.round_up(length), self._model.dtype)
        return self._device_put(cache)

    def round_up(self, n_tokens: int) -> int:
        """Returns a number of tokens rounded up to complete chunks."""
        return -(-n_tokens // self.chunk) * self.chunk

    def grow(self, cache: Cache, length: int) -> Cache:
        """Returns a prompt's cache with a larger length, rounded up to complete chunks."""
        return self._grow(cache, self.round_up(length))

    def copy_chunk(self, cache: Cache, start: int) -> CacheBlock:
        """Returns a copy of a prompt's newest chunk, which begins at token `start`."""
        return self._block(cache, np.int32(start), self.chunk)

    def row_block(self, rows: DecodingRows, row: int, start: int) -> CacheBlock:
        """Returns a copy of the chunk of a row that begins at a token."""
        return self._row_block(rows, np.int32(row), np.int32(start), self.chunk)

    def copy_row(self, rows: DecodingRows, row: Number, n_tokens: int) -> CacheBlock:
        """Returns a copy of a row in the host's memory.

        Args:
          rows: the rows.
          row: [] int32.
          n_tokens: the number of tokens in its cache.
        """
        length = rows.cache.positions.shape[1]
        row_block = self._row_block(rows, row, np.int32(0), length)
        return CacheBlock(
            key=np.array(np.asarray(row_block.key)[:, :, :, :n_tokens]),
            value=np.array(np.asarray(row_block.value)[:, :, :, :n_tokens]),
            recurrent=jax.tree.map(np.array, row_block.recurrent),
        )

    def restore_cache(self, block: CacheBlock, length: int) -> Cache:
        """Returns the arrays of `copy_row` as the cache of a prompt of at most this length."""
        cache = self.prompt_cache(length)
        padding = [(0, 0)] * block.key.ndim
        padding[3] = (0, cache.positions.shape[1] - block.key.shape[3])
        padded_key = np.pad(block.key, padding)
        padded_value = np.pad(block.value, padding)
        key, value, recurrent = self._device_put((padded_key, padded_value, block.recurrent))
        return cache._replace(key=key, value=value, recurrent=recurrent)

    def _run_chunk(
        self, tree: Tree, slot: Number, ids: np.ndarray, n_tokens: Number, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Runs a chunk of a prompt with the adapter in slot [] int32. Donates the cache."""
        return slots.run_chunk(self._forward, _choose_slot(tree, slot), ids, n_tokens, cache)

    def _run_activated(
        self,
        tree: Tree,
        slot: Number,
        ids: np.ndarray,
        n_tokens: Number,
        cache: Cache,
        active_start: Number,
    ) -> tuple[jax.Array, Cache]:
        """Runs a chunk in which only tokens from `active_start` on use the adapter."""
        choice = _choose_slot(tree, slot)
        is_active = (jnp.arange(ids.shape[1]) >= active_start)[None]

        def activate(path: str, weight_slots: Slots) -> LoraWeight:
            assert isinstance(weight_slots, WeightSlots)
            weight = weight_slots.take_example(weight_slots.arrays, choice.ids[0])
            return weight.replace(active=is_active) if path in self._token_paths else weight

        adapted_tree = map_slots(activate, choice.tree)
        return slots.run_chunk(self._adapted, adapted_tree, ids, n_tokens, cache)

    def _run_pieces(
        self,
        tree: Tree,
        slot: np.ndarray,
        ids: np.ndarray,
        n_tokens: np.ndarray,
        caches: tuple[Cache, ...],
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Runs the next piece of several prompts in one call, and consumes their caches.

        Args:
          tree: the base with adapters in slots.
          slot: [prompts] int32.
          ids: [prompts, 1, piece] int32, filled up on the right.
          n_tokens: [prompts] int32, of each piece.
          caches: a cache for each prompt, all of one length.

        Returns:
          The logits after each piece, [prompts, 1, vocab], and the caches.
        """
        # Each prompt has its own slot, tokens and cache, and all share the tree.
        run_chunk: Any = jax.vmap(functools.partial(self._run_chunk, tree))
        # [prompts, ...] for each array of the caches
        stacked_caches = jax.tree.map(lambda *arrays: jnp.stack(arrays), *caches)
        logits, stacked_caches = run_chunk(
            jnp.asarray(slot), jnp.asarray(ids), jnp.asarray(n_tokens), stacked_caches
        )
        # One cache per prompt again.
        extended_caches = tuple(
            jax.tree.map(lambda array, i=i: array[i], stacked_caches) for i in range(len(caches))
        )
        return logits, extended_caches

    def _run_rows(self, tree: Tree, rows: DecodingRows) -> tuple[jax.Array, DecodingRows]:
        """Runs the newest token of each row with the row's adapter. Donates the rows."""
        return slots.run_rows(self._forward, Choice(tree, rows.adapters), rows)

    def adjust(
        self, logits: jax.Array, adjustments: Adjustments[np.ndarray], temperature: jax.Array
    ) -> jax.Array:
        """Returns the adjusted logits from which tokens are drawn; see `adjust_logits`."""
        return self._adjust(logits, *self._device_put((adjustments, temperature)))

    def _draw_tokens(
        self,
        logits: jax.Array,
        adjusted_logits: jax.Array,
        sampling: Sampling,
        n_drawn: jax.Array | np.ndarray,
        with_top: Flag,
    ) -> tuple[DrawnTokens[jax.Array], jax.Array]:
        """Draws a token per row from possibly adjusted logits; returns them and n_drawn + 1."""
        step = jnp.asarray(n_drawn)
        tokens = slots.draw_tokens(logits, sampling, step, TOP, with_top, adjusted_logits)
        return tokens, step + 1


def _choose_slot(tree: Tree, slot: Number) -> Choice:
    """Returns a choice of one slot for one row, without the cost of the other slots."""

    def select(_: str, weight_slots: Slots) -> WeightSlots:
        assert isinstance(weight_slots, WeightSlots)  # adapters here are factors
        return weight_slots.only(jnp.asarray(slot))

    index = jnp.minimum(slot, 1)  # of the two slots that are left: the base's, and this one
    return Choice(map_slots(select, tree), index[None])
