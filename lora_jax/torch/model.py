"""A causal language model of transformers, with the calls of `lora_jax.models.Decoder`."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.core.types import Tree
from lora_jax.models.layers.attend import Attend
from lora_jax.models.layers.cache import Cache
from lora_jax.models.layers.placement import UNPLACED, Placement
from lora_jax.models.layers.trunk import place_tokens
from lora_jax.torch.attention import Attending, attending
from lora_jax.torch.cache import CachedCall, Tokens
from lora_jax.torch.config import TorchConfig
from lora_jax.torch.layers import Recomputed
from lora_jax.torch.module import Built, built
from lora_jax.torch.packages import TorchModelError

_PLACES = ("attention_mask", "positions", "segment_ids")


@dataclasses.dataclass(frozen=True)
class TorchModel:
    """A torch module as a model: `apply` is a function of a parameter tree.

    Attributes:
      config: what the module is built from.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters.
      remat, attention, placement: see ``lora_jax.models.Decoder``.
      one_sequence: whether each row that `apply` gets holds one sequence, which begins in the first
        slot. A module that cannot keep several sequences apart then gets no ``segment_ids``.
    """

    config: TorchConfig
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: bool | str = False
    attention: str | Attend = "auto"
    placement: Placement = UNPLACED
    one_sequence: bool = False

    def clone(self, **changes: Any) -> "TorchModel":
        """Returns the model with other attributes."""
        return dataclasses.replace(self, **changes)

    @property
    def built(self) -> Built:
        """The module, without weights."""
        return built(self.config)

    def __call__(self, params: Tree, *args: Any, **kwargs: Any) -> Any:
        """Calls the module as torch does, with JAX's arrays.

        Args:
          params: the parameters.
          *args, **kwargs: arguments of the module's ``forward``.

        Returns:
          The logits of a causal language model, [batch, seq, vocab]; of other modules their output:
          a dictionary where transformers names its parts.

        Raises:
          TorchModelError: names the operator and the module that cannot run as a JAX function.
        """
        if not self.config.continues:
            return self._run(params, args, kwargs)
        kwargs = {"use_cache": False} | kwargs
        ids: Any = kwargs.get("input_ids", args[0] if len(args) == 1 else None)
        unpadded = ids is not None and not {"attention_mask", "position_ids"} & kwargs.keys()
        if unpadded:
            kwargs |= self._places(ids, {})
        return _wide_logits(self._run(params, args, kwargs, unpadded=unpadded))

    def _run(
        self,
        params: Tree,
        args: Any,
        kwargs: Mapping[str, Any],
        cache: CachedCall | None = None,
        **attention_fields: Any,
    ) -> Any:
        """Calls the module, whose attention has further fields of `Attending`."""
        recomputed = Recomputed(self.remat if cache is None else False, self.placement)
        if cache is not None:
            attention_fields["cached"] = cache.mask

        def cast(x: Any) -> Any:
            return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        implementation = Attending(self.attention, self.placement, **attention_fields)
        is_language_model = self.config.continues
        head = self.built.wide_logits() if is_language_model else contextlib.nullcontext()
        with attending(implementation), head:
            return self.built.call(jax.tree.map(cast, params), args, kwargs, recomputed, cache)

    def apply(
        self,
        variables: Mapping[str, Tree],
        input_ids: jax.Array,
        *,
        cache: Cache | Tokens | None = None,
        logits_at: jax.Array | None = None,
        return_hidden: bool = False,
        method: str | None = None,
        **places: jax.Array | None,
    ) -> Any:
        """Predicts each next token; see ``lora_jax.models.causal.CausalLM`` for the arguments.

        A cache of tokens has all of them computed anew at each call. `places` are
        ``attention_mask``, ``positions`` and ``segment_ids``; with a cache the first alone.

        Raises:
          TorchModelError: see `__call__`. The module takes no such argument, or it gets
            ``segment_ids`` and cannot keep the sequences of a row apart.
        """
        unknown_names = [name for name in places if name not in _PLACES]
        if unknown_names:
            raise TorchModelError(f"{self.built.name}: a torch module takes no {unknown_names[0]}")
        if cache is not None:
            for name in _PLACES[1:]:
                if places.get(name) is not None:
                    raise TorchModelError(f"{self.built.name}: it takes no {name} with a cache")
        places = self._without_segments(places)
        params = variables["params"]
        if method == "head":
            return self._head(params, input_ids)
        if isinstance(cache, Cache):
            call = CachedCall(cache, input_ids, places.get("attention_mask"))
            logits = self._logits(params, input_ids, {}, logits_at, return_hidden, cache=call)
            return logits, call.extended()
        if cache is not None:
            cache, slots = cache.extended(input_ids, places.get("attention_mask"))
            if logits_at is not None:
                slots = jnp.take_along_axis(slots, logits_at, axis=1)
            kwargs = self._places(cache.ids, {})
            logits = self._logits(params, cache.ids, kwargs, slots, return_hidden, unpadded=True)
            return logits, cache
        segments = places.get("segment_ids")
        mask = places.get("attention_mask")
        if segments is not None and mask is not None:
            segments = jnp.where(mask.astype(bool), segments, -1)
        return self._logits(
            params,
            input_ids,
            self._places(input_ids, places),
            logits_at,
            return_hidden,
            segments=segments,
            unpadded=mask is None,
        )

    def _without_segments(self, places: dict[str, jax.Array | None]) -> dict[str, jax.Array | None]:
        """Returns the places of tokens, without segments where the module cannot keep them apart.

        Raises:
          TorchModelError: the module cannot, and rows may hold several sequences.
        """
        if places.get("segment_ids") is None or self.config.packs:
            return places
        if not self.one_sequence:
            raise TorchModelError(
                f"{self.built.name}: the module ignores segment_ids, and the sequences of one row "
                "would see each other. Give each row one sequence, and leave segment_ids out (or "
                "use `model.clone(one_sequence=True)`, which leaves them out)"
            )
        return {**places, "segment_ids": None}

    def _places(
        self, ids: jax.Array, places: Mapping[str, jax.Array | None]
    ) -> dict[str, jax.Array]:
        """Returns the arguments that say where tokens are, those of which the module knows.

        A mask is of ones if the module's attention is ours, which leaves it out: without one,
        transformers looks for several sequences in the positions, and its mask for these would be
        an array of [seq, seq].
        """
        mask, positions, segments = (places.get(name) for name in _PLACES)
        arguments: dict[str, jax.Array] = {}
        if mask is not None or self.built.attends:
            ones = jnp.ones(ids.shape, jnp.int32)
            # Where there are segments, padding is a segment of its own.
            arguments["attention_mask"] = ones if mask is None or segments is not None else mask
        is_placed = any(place is not None for place in (mask, positions, segments))
        if is_placed and "position_ids" in self.built.arguments:
            placed = place_tokens(ids, mask, positions, None, segments)
            arguments["position_ids"] = placed.positions + self.built.first_position
        return arguments

    def _logits(
        self,
        params: Tree,
        ids: jax.Array,
        kwargs: Mapping[str, Any],
        slots: jax.Array | None,
        return_hidden: bool,
        **run_options: Any,
    ) -> jax.Array:
        """Returns logits in fp32, or hidden states, of some slots of each row; None for all."""
        head_inputs: list[jax.Array] = []

        def select(hidden: jax.Array) -> jax.Array:
            if slots is not None:
                hidden = jnp.take_along_axis(hidden, slots[..., None], axis=1)
            head_inputs.append(hidden)
            return hidden

        with self.built.trunk_output(select):
            arguments = {"input_ids": ids, "use_cache": False, **kwargs}
            out = self._run(params, (), arguments, **run_options)
        if not head_inputs:
            raise TorchModelError(f"{self.built.name}: its head is no part of its own")
        return head_inputs[0] if return_hidden else _wide_logits(out)

    def _head(self, params: Tree, hidden: jax.Array) -> jax.Array:
        """Returns the logits of final hidden states, [batch, n, d_model]."""
        ids = jnp.zeros(hidden.shape[:2], jnp.int32)
        with self.built.trunk_replaced(hidden):
            out = self._run(params, (), {"input_ids": ids, "use_cache": False})
        return _wide_logits(out)


def _wide_logits(out: Any) -> jax.Array:
    """Returns the logits among a module's outputs, in fp32 at least."""
    logits: jax.Array = out["logits"] if isinstance(out, dict) else out[0]
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
