"""The compiled functions of completions of several turns, on a mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.types import Forward, Model, Tree
from lora_jax.models.layers.cache import Cache, depends_on_room, init_cache
from lora_jax.models.sampling import slots, turns
from lora_jax.models.sampling.choice import Sampling
from lora_jax.models.sampling.slots import DecodingRows, DrawnTokens
from lora_jax.models.sampling.turns import DrawingRows, TokenBlock
from lora_jax.training.layout import Layout

_CHUNK, _CHUNK_ON_CPU = 256, 64  # tokens of a prompt, or of answers, that run at once
BLOCK = 64  # tokens of each row, at most, between two looks at what has been answered


class TurnPrograms:
    """The functions of `lora_jax.models.sampling.turns` for one model.

    Rows are sharded over the mesh as those of a batch; all else is replicated.

    Attributes:
      chunk: tokens of a prompt, or of answers, that run at once.
      mesh: the mesh, under which all of it is called.
      with_routing: whether rows keep the experts of their tokens.
      routing: `row_routing`.
    """

    def __init__(
        self, model: Model, apply: Forward, layout: Layout, *, with_routing: bool = False
    ) -> None:
        """Makes the functions; nothing is compiled yet.

        Args:
          model: a model of `lora_jax.models`, on the mesh.
          apply: its ``apply``, or what takes its place.
          layout: the mesh.
          with_routing: keep the experts of each token, of a mixture.
        """
        self._model, self._apply, self._layout = model, apply, layout
        self.mesh, self.with_routing = layout.mesh, with_routing
        self.chunk = _CHUNK_ON_CPU if layout.platform == "cpu" else _CHUNK
        run_chunk = functools.partial(slots.run_chunk, apply)
        self._run_chunk = layout.jitted(run_chunk, donate_argnums=3)
        self.routing = layout.jitted(turns.row_routing)
        self._of_rows: dict[tuple[int, int], tuple[Any, ...]] = {}

    def empty(self, rows: int, length: int) -> "TurnRows":
        """Returns rows without completions.

        Args:
          rows: the number of rows.
          length: the most tokens of a row.
        """
        model: Any = self._model
        whole_chunks = length + self.chunk  # the last chunk of a row may begin at any slot
        # It runs in a cache of its own, so that all tokens behind it see no slots that stay empty.
        n_slots = whole_chunks if depends_on_room(model.config) else length
        if (rows, n_slots) not in self._of_rows:
            asked: dict[str, Any] = {"with_routing": self.with_routing}
            make = functools.partial(slots.empty_rows, model, rows, n_slots, **asked)
            where, whole = self._shardings(jax.eval_shape(make)), self._layout.whole
            jitted = self._layout.jitted
            decode = functools.partial(turns.decode_turns, self._apply, n=BLOCK)
            shape = 1, whole_chunks, model.dtype
            cache = functools.partial(init_cache, model.config, *shape, **asked)
            copy = functools.partial(turns.copy_row, length=whole_chunks)
            self._of_rows[rows, n_slots] = (
                jitted(make, where),
                jitted(cache),
                jitted(copy),
                jitted(turns.begin_turn, (where, whole), donate_argnums=0),
                jitted(decode, (where, whole), donate_argnums=1),
            )
        make, *functions = self._of_rows[rows, n_slots]
        return TurnRows(self, make(), *functions)

    def _shardings(self, rows: DecodingRows) -> DecodingRows:
        """Returns the shardings of rows: those of a batch, the caches' behind the layers."""
        return jax.tree.map(lambda x: self._layout.of_batch(x.shape, parts=x.ndim > 2), rows)

    def run(self, params: Tree, ids: Sequence[int], cache: Cache) -> tuple[jax.Array, Cache]:
        """Runs tokens of one row; takes the cache.

        Returns:
          The logits after the last token, [1, vocab], and the cache with these tokens.
        """
        logits = None
        for first in range(0, len(ids), self.chunk):
            some = np.zeros((1, self.chunk), np.int32)
            part = ids[first : first + self.chunk]
            some[0, : len(part)] = part
            logits, cache = self._run_chunk(params, some, np.int32(len(part)), cache)
        assert logits is not None, "there is a token"
        return logits, cache


class TurnRows:
    """Rows on the devices; see `TurnPrograms.empty`.

    Attributes:
      n: the number of rows.
    """

    def __init__(
        self,
        programs: TurnPrograms,
        arrays: DecodingRows,
        cache: Callable[[], Cache],
        copy: Callable[..., Cache],
        begin: Callable[..., Any],
        decode: Callable[..., Any],
    ) -> None:
        self._programs, self._arrays, self._cache = programs, arrays, cache
        self._copy, self._begin, self._decode = copy, begin, decode
        self.n = len(arrays.last)

    def prefill(self, params: Tree, prompt: Sequence[int]) -> tuple[jax.Array, Cache]:
        """Runs a prompt; see `TurnPrograms.run`."""
        return self._programs.run(params, prompt, self._cache())

    def extend(
        self, params: Tree, place: int, n: int, ids: Sequence[int]
    ) -> tuple[jax.Array, Cache]:
        """Runs tokens behind the first n of a row; see `TurnPrograms.run`."""
        cache = self._copy(self._arrays, np.int32(place), np.int32(n))
        return self._programs.run(params, ids, cache)

    def routing(self, place: int) -> np.ndarray:
        """Returns the experts of a row's tokens; see `row_routing`."""
        return np.asarray(self._programs.routing(self._arrays, np.int32(place)))

    def begin(
        self, place: int, logits: jax.Array, cache: Cache, sampling: Sampling
    ) -> DrawnTokens[jax.Array]:
        """Draws the first token of a turn; see `begin_turn`."""
        drawn: DrawnTokens[jax.Array]
        self._arrays, drawn = self._begin(self._arrays, np.int32(place), cache, logits, sampling)
        return drawn

    def decode(self, params: Tree, active: DrawingRows) -> TokenBlock:
        """Draws tokens until a row has to stop; see `decode_turns`."""
        block: TokenBlock
        self._arrays, block = self._decode(params, self._arrays, active)
        return block


def make_sampling(
    vocab: int, temperature: float, top_p: float, top_k: int | None, key: jax.Array
) -> Sampling:
    """Returns the sampler's options of one row, [] each."""
    return Sampling(
        jnp.float32(temperature),
        jnp.float32(top_p),
        jnp.int32(vocab if top_k is None else top_k),
        key,
    )
