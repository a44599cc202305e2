"""Torch modules with the interface of `lora_jax.models.Decoder`."""

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
from lora_jax.torch.attention import AttentionSettings, use_attention
from lora_jax.torch.cache import CachedCall, Tokens
from lora_jax.torch.config import TorchConfig
from lora_jax.torch.layers import Recomputation
from lora_jax.torch.module import NO_HEAD, EmptyModule, build_module
from lora_jax.torch.packages import TorchModelError

_TOKEN_ARGUMENTS = ("attention_mask", "positions", "segment_ids")


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
    def built(self) -> EmptyModule:
        """The module, without weights."""
        return build_module(self.config)

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
            kwargs |= self._position_arguments(ids, {})
        return _logits_of_output(self._run(params, args, kwargs, unpadded=unpadded))

    def _run(
        self,
        params: Tree,
        args: Any,
        kwargs: Mapping[str, Any],
        cache: CachedCall | None = None,
        **attention_fields: Any,
    ) -> Any:
        """Calls the module with these fields of `AttentionSettings` for its attention."""
        recomputed = Recomputation(self.remat if cache is None else False, self.placement)
        if cache is not None:
            attention_fields["cached"] = cache.mask

        def cast_floats(x: Any) -> Any:
            return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        settings = AttentionSettings(self.attention, self.placement, **attention_fields)
        is_language_model = self.config.continues
        logits_in_fp32 = self.built.wide_logits() if is_language_model else contextlib.nullcontext()
        with use_attention(settings), logits_in_fp32:
            cast_params = jax.tree.map(cast_floats, params)
            return self.built.call(cast_params, args, kwargs, recomputed, cache)

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

        With a cache of tokens, the module computes all tokens again in each call. `places` are
        ``attention_mask``, ``positions`` and ``segment_ids``. With a cache, only ``attention_mask``
        is allowed.

        Raises:
          TorchModelError: see `__call__`. The module takes no such argument, or it gets
            ``segment_ids`` and cannot keep the sequences of a row apart.
        """
        unknown_names = [name for name in places if name not in _TOKEN_ARGUMENTS]
        if unknown_names:
            raise TorchModelError(
                f"{self.built.name}: a torch module does not take {unknown_names[0]}. Remove it "
                "from the call."
            )
        if cache is not None:
            for name in _TOKEN_ARGUMENTS[1:]:
                if places.get(name) is not None:
                    raise TorchModelError(
                        f"{self.built.name}: a torch module does not take {name} together with a "
                        "cache. Remove one of them."
                    )
        places = self._without_segments(places)
        params = variables["params"]
        if method == "head":  # input_ids are final hidden states
            return self._logits_of_hidden(params, input_ids)
        if isinstance(cache, Cache):  # of keys and values
            call = CachedCall(cache, input_ids, places.get("attention_mask"))
            logits = self._compute_logits(
                params, input_ids, {}, logits_at, return_hidden, cache=call
            )
            return logits, call.extended()
        if cache is not None:  # of tokens: the module computes whole rows
            cache, slots = cache.extended(input_ids, places.get("attention_mask"))
            if logits_at is not None:
                slots = jnp.take_along_axis(slots, logits_at, axis=1)
            kwargs = self._position_arguments(cache.ids, {})
            logits = self._compute_logits(
                params, cache.ids, kwargs, slots, return_hidden, unpadded=True
            )
            return logits, cache
        segments = places.get("segment_ids")
        mask = places.get("attention_mask")
        if segments is not None and mask is not None:
            segments = jnp.where(mask.astype(bool), segments, -1)  # padding is its own segment
        return self._compute_logits(
            params,
            input_ids,
            self._position_arguments(input_ids, places),
            logits_at,
            return_hidden,
            segments=segments,
            unpadded=mask is None,
        )

    def _without_segments(self, places: dict[str, jax.Array | None]) -> dict[str, jax.Array | None]:
        """Returns the token arguments, without segments that the module ignores.

        Raises:
          TorchModelError: the module cannot separate the sequences of a row, and a row may hold
            several sequences.
        """
        if places.get("segment_ids") is None or self.config.packs:
            return places
        if not self.one_sequence:
            raise TorchModelError(
                f"{self.built.name}: the module ignores segment_ids, so the sequences of one row "
                "would attend to each other. Put one sequence into each row, and either remove "
                "segment_ids or use `model.clone(one_sequence=True)`, which ignores them."
            )
        return {**places, "segment_ids": None}

    def _position_arguments(
        self, ids: jax.Array, places: Mapping[str, jax.Array | None]
    ) -> dict[str, jax.Array]:
        """Returns the ``attention_mask`` and ``position_ids`` that the module takes.

        If the module uses `lora_jax.torch.attention`, which ignores masks of ones, ones replace a
        missing mask. Without a mask, transformers would look for several sequences in the
        positions, and make a mask of [seq, seq] for them.
        """
        mask, positions, segments = (places.get(name) for name in _TOKEN_ARGUMENTS)
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

    def _compute_logits(
        self,
        params: Tree,
        ids: jax.Array,
        kwargs: Mapping[str, Any],
        slots: jax.Array | None,
        return_hidden: bool,
        **run_options: Any,
    ) -> jax.Array:
        """Computes fp32 logits, or hidden states, of some or all slots of each row."""
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
            raise TorchModelError(NO_HEAD.format(name=self.built.name))
        return head_inputs[0] if return_hidden else _logits_of_output(out)

    def _logits_of_hidden(self, params: Tree, hidden: jax.Array) -> jax.Array:
        """Returns the logits of final hidden states, [batch, n, d_model]."""
        ids = jnp.zeros(hidden.shape[:2], jnp.int32)
        with self.built.trunk_replaced(hidden):
            out = self._run(params, (), {"input_ids": ids, "use_cache": False})
        return _logits_of_output(out)


def _logits_of_output(out: Any) -> jax.Array:
    """Returns the logits in a module's outputs, in fp32 or wider."""
    logits: jax.Array = out["logits"] if isinstance(out, dict) else out[0]
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
