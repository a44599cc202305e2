"""The compiled functions of completions of several turns, on a mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lora_jax.core.types import Forward, Model, Tree
from lora_jax.models.layers.cache import Cache, depends_on_cache_length, init_cache
from lora_jax.models.sampling import slots, turns
from lora_jax.models.sampling.choice import Sampling
from lora_jax.models.sampling.slots import DecodingRows, DrawnTokens
from lora_jax.models.sampling.turns import DrawingRows, TokenBlock
from lora_jax.training.layout import Layout

_CHUNK_TOKENS = 256  # tokens of a prompt, or of answers, that run at once
_CHUNK_TOKENS_ON_CPU = 64
BLOCK = 64  # the maximum number of tokens per row between two checks for answers


class RowFunctions(NamedTuple):
    """The compiled functions of rows of one number and length; see `TurnRows`.

    Attributes:
      empty_rows: returns rows without completions.
      empty_cache: returns the cache in which the tokens of one row run.
      copy_cache: returns a copy of a row's cache from the rows, the row and its number of tokens.
      begin: see `begin_turn`.
      decode: see `decode_turns`.
    """

    empty_rows: Callable[[], DecodingRows]
    empty_cache: Callable[[], Cache]
    copy_cache: Callable[..., Cache]
    begin: Callable[..., Any]
    decode: Callable[..., Any]


class TurnPrograms:
    """The functions of `lora_jax.models.sampling.turns` for one model.

    Rows are sharded over the mesh like those of a batch, and all other arrays are replicated.

    Attributes:
      chunk: the number of tokens of a prompt, or of answers, that run at once.
      mesh: the mesh, which must be set for all calls.
      with_routing: whether rows keep the experts of their tokens.
      routing: the compiled `row_routing`.
    """

    def __init__(
        self, model: Model, apply: Forward, layout: Layout, *, with_routing: bool = False
    ) -> None:
        """Creates the functions without compiling them.

        Args:
          model: a model of `lora_jax.models`, on the mesh.
          apply: the model's ``apply``, or an adapted one.
          layout: the mesh.
          with_routing: whether to keep the experts of each token of a mixture of experts.
        """
        self._model = model
        self._apply = apply
        self._layout = layout
        self.mesh = layout.mesh
        self.with_routing = with_routing
        self.chunk = _CHUNK_TOKENS_ON_CPU if layout.platform == "cpu" else _CHUNK_TOKENS
        run_chunk = functools.partial(slots.run_chunk, apply)
        self._run_chunk = layout.jitted(run_chunk, donate_argnums=3)
        self.routing = layout.jitted(turns.row_routing)
        self._functions: dict[tuple[int, int], RowFunctions] = {}  # by number and slots of rows

    def empty(self, n_rows: int, length: int) -> "TurnRows":
        """Returns rows without completions.

        Args:
          n_rows: the number of rows.
          length: the maximum number of tokens of a row.
        """
        model: Any = self._model
        # Chunks run in a separate cache of one row, because a last chunk may begin at any slot.
        copy_slots = length + self.chunk
        # Some models give other results with another number of empty slots.
        n_slots = copy_slots if depends_on_cache_length(model.config) else length
        if (n_rows, n_slots) not in self._functions:
            self._functions[n_rows, n_slots] = self._make_functions(n_rows, n_slots, copy_slots)
        return TurnRows(self, self._functions[n_rows, n_slots])

    def _make_functions(self, n_rows: int, n_slots: int, copy_slots: int) -> RowFunctions:
        """Returns the functions of rows with one number and length.

        Args:
          n_rows: the number of rows.
          n_slots: the slots of a row's cache.
          copy_slots: the slots of the cache in which chunks of one row run.
        """
        model: Any = self._model
        jitted = self._layout.jitted
        options: dict[str, Any] = {"with_routing": self.with_routing}
        empty_rows = functools.partial(slots.empty_rows, model, n_rows, n_slots, **options)
        empty_cache = functools.partial(
            init_cache, model.config, 1, copy_slots, model.dtype, **options
        )
        copy_cache = functools.partial(turns.copy_row, length=copy_slots)
        decode = functools.partial(turns.decode_turns, self._apply, n=BLOCK)
        rows_sharding = self._rows_shardings(jax.eval_shape(empty_rows))
        replicated = self._layout.whole
        return RowFunctions(
            empty_rows=jitted(empty_rows, rows_sharding),
            empty_cache=jitted(empty_cache),
            copy_cache=jitted(copy_cache),
            begin=jitted(turns.begin_turn, (rows_sharding, replicated), donate_argnums=0),
            decode=jitted(decode, (rows_sharding, replicated), donate_argnums=1),
        )

    def _rows_shardings(self, rows: DecodingRows) -> DecodingRows:
        """Returns the shardings of rows, whose caches have an axis of layers before the rows."""

        def sharding(array: jax.ShapeDtypeStruct) -> NamedSharding:
            has_layer_axis = array.ndim > 2
            return self._layout.of_batch(array.shape, parts=has_layer_axis)

        return jax.tree.map(sharding, rows)

    def run(self, params: Tree, ids: Sequence[int], cache: Cache) -> tuple[jax.Array, Cache]:
        """Runs tokens of one row. The cache is donated.

        Returns:
          The logits after the last token, [1, vocab], and the cache with these tokens.
        """
        logits = None
        for start in range(0, len(ids), self.chunk):
            chunk = ids[start : start + self.chunk]
            padded_chunk = np.zeros((1, self.chunk), np.int32)
            padded_chunk[0, : len(chunk)] = chunk
            logits, cache = self._run_chunk(params, padded_chunk, np.int32(len(chunk)), cache)
        assert logits is not None, "there is a token"
        return logits, cache


class TurnRows:
    """Rows on the devices; see `TurnPrograms.empty`.

    Attributes:
      n: the number of rows.
    """

    def __init__(self, programs: TurnPrograms, functions: RowFunctions) -> None:
        self._programs = programs
        self._functions = functions
        self._arrays = functions.empty_rows()
        self.n = len(self._arrays.last)

    def prefill(self, params: Tree, prompt: Sequence[int]) -> tuple[jax.Array, Cache]:
        """Runs a prompt; see `TurnPrograms.run`."""
        return self._programs.run(params, prompt, self._functions.empty_cache())

    def extend(
        self, params: Tree, row: int, n_tokens: int, ids: Sequence[int]
    ) -> tuple[jax.Array, Cache]:
        """Runs tokens after the first n_tokens of a row; see `TurnPrograms.run`."""
        cache = self._functions.copy_cache(self._arrays, np.int32(row), np.int32(n_tokens))
        return self._programs.run(params, ids, cache)

    def routing(self, row: int) -> np.ndarray:
        """Returns the experts of a row's tokens; see `row_routing`."""
        return np.asarray(self._programs.routing(self._arrays, np.int32(row)))

    def begin(
        self, row: int, logits: jax.Array, cache: Cache, sampling: Sampling
    ) -> DrawnTokens[jax.Array]:
        """Draws the first token of a turn; see `begin_turn`."""
        drawn: DrawnTokens[jax.Array]
        self._arrays, drawn = self._functions.begin(
            self._arrays, np.int32(row), cache, logits, sampling
        )
        return drawn

    def decode(self, params: Tree, active: DrawingRows) -> TokenBlock:
        """Draws tokens until a row must stop; see `decode_turns`."""
        block: TokenBlock
        self._arrays, block = self._functions.decode(params, self._arrays, active)
        return block


def make_sampling(
    vocab_size: int, temperature: float, top_p: float, top_k: int | None, key: jax.Array
) -> Sampling:
    """Returns the sampler's options of one row, [] each."""
    return Sampling(
        temperature=jnp.float32(temperature),
        top_p=jnp.float32(top_p),
        top_k=jnp.int32(vocab_size if top_k is None else top_k),
        key=key,
    )
