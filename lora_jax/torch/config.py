"""The configuration of a torch module, with the same attributes as other models' configurations.

A short trace finds whether a module can use cached keys and values (`probe_cache_entries`).
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.typing import DTypeLike
from transformers import CONFIG_MAPPING

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError, read_eos
from lora_jax.hf.generation import Generation
from lora_jax.hf.keys import Row, nest_leaves
from lora_jax.torch.attention import AttentionSettings, use_attention
from lora_jax.torch.cache import CachedCall, KeyValues, Tokens, empty_cache
from lora_jax.torch.diffusion import CLASS_FIELD, STEM
from lora_jax.torch.diffusion import module_class as diffusers_class
from lora_jax.torch.layers import Recomputation
from lora_jax.torch.module import EmptyModule, build_module
from lora_jax.torch.recipe import Recipe

# Sizes of the trace. They differ, so that a mask or a shape without the cache's slots fails.
_PROBE_ROWS, _PROBE_TOKENS, _PROBE_SLOTS = 3, 2, 8
_OTHER_ENTRIES = "its layers do not compute keys and values for each token"


@dataclasses.dataclass(frozen=True)
class TorchConfig(Recipe):
    """The configuration of a torch module; see `Recipe` for what it is built from.

    Attributes:
      generation: see `lora_jax.hf.generation`.
    """

    generation: Generation | None = None

    @classmethod
    def from_hf(cls, fields: Fields, **options: Any) -> "TorchConfig":
        """Reads a parsed config.json.

        Raises:
          ConfigError: transformers or diffusers has no such model, or the model needs its own code.
        """
        if CLASS_FIELD in fields:
            diffusers_class(fields)  # raises an error if there is none
            return cls(json.dumps(fields, sort_keys=True), **options)
        model_type = fields.get("model_type")
        if model_type not in CONFIG_MAPPING and "auto_map" in fields:
            raise ConfigError(
                f"a {model_type} model needs its own Python code (auto_map), and lora_jax does not "
                "run code from model folders. Use a model that transformers contains."
            )
        if model_type not in CONFIG_MAPPING:
            raise ConfigError(
                f"transformers {transformers.__version__} has no model_type {model_type!r}. "
                "Install a newer version of transformers, or use another model."
            )
        return cls(json.dumps(fields, sort_keys=True), **options)

    @property
    def stem(self) -> str:
        """The beginning of the names of the files of weights."""
        return STEM if CLASS_FIELD in self.fields else "model"

    def to_hf(self) -> dict[str, object]:
        """Returns the config.json."""
        return dict(self.fields)

    def key_rows(self) -> Sequence[Row]:
        """Returns the key table; see `lora_jax.models.key_table`."""
        return build_module(self).rows

    def _text_field(self, *names: str) -> Any:
        """Returns the first of these fields that the configuration of the text model has."""
        text_config = None if self.hf is None else self.hf.get_text_config()
        for name in names:
            value = getattr(text_config, name, None)
            if value is not None:
                return value
        return None

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return int(self._text_field("vocab_size") or 0)

    @property
    def hidden_size(self) -> int:
        """The size of hidden states."""
        return int(self._text_field("hidden_size", "n_embd", "d_model") or 0)

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers."""
        return int(self._text_field("num_hidden_layers", "n_layer", "num_layers") or 0)

    @property
    def num_attention_heads(self) -> int:
        """The number of attention heads; 1 for a model without attention."""
        return int(self._text_field("num_attention_heads", "n_head", "n_heads", "num_heads") or 1)

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return int(self._text_field("head_dim") or self.hidden_size // self.num_attention_heads)

    @property
    def max_position_embeddings(self) -> int:
        """The maximum number of tokens of a row."""
        return int(
            self._text_field("max_position_embeddings", "n_positions", "max_seq_len") or 1 << 20
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return read_eos({"eos_token_id": self._text_field("eos_token_id")})

    @property
    def pad_token_id(self) -> int | None:
        """The token of padding."""
        value = self._text_field("pad_token_id")
        return None if value is None else int(value)

    @property
    def tie_word_embeddings(self) -> bool:
        """True if the head is the table of tokens."""
        return any(row.kind in ("embedding", "head") and row.aliases for row in self.key_rows())

    @property
    def pattern(self) -> dict[str, bool]:
        """The names of the kinds of stacked layers, if there are several; see ``DecoderConfig``."""
        for stack in build_module(self).stacks:
            if stack.period > 1 and not stack.start:
                return {stack.kind_name(kind): False for kind in range(stack.period)}
        return {}

    @property
    def packs(self) -> bool:
        """True if a row may hold several sequences that do not attend to each other."""
        return build_module(self).packs

    def layer_lines(self) -> list[str]:
        """Returns a line for each list of layers: how it runs, and what that costs in compiling."""
        module = build_module(self)
        lines = [
            f"layers: {stack.name} as one scan of {stack.repeats} turns"
            + (f" of {stack.period} kinds" if stack.period > 1 else "")
            + (f", from layer {stack.start} on" if stack.start else "")
            for stack in module.stacks
        ]
        stacked_lists = {stack.name for stack in module.stacks}
        for name in module.lists:
            if name in stacked_lists:
                continue
            n = len(module.layers(name))
            other = "there is no example to compare them with" if self.scan else "as asked"
            lines.append(
                f"layers: the {n} of {name} one by one "
                f"({module.reasons_against_stacks.get(name, other)}): compiling takes about {n} "
                "times as long as for layers that are alike"
            )
        return lines

    @property
    def caches(self) -> bool:
        """True if generation keeps keys and values."""
        return not isinstance(probe_cache_entries(build_module(self), jnp.dtype(jnp.float32)), str)

    def cache_line(self) -> str:
        """Returns a line on what generation computes for each token."""
        entries = probe_cache_entries(build_module(self), jnp.dtype(jnp.float32))
        if isinstance(entries, str):
            return f"each token of an answer: the whole row is computed again, because {entries}"
        return "each token of an answer: with cached keys and values"

    def empty_cache(self, batch: int, max_len: int, dtype: DTypeLike = jnp.float32) -> Any:
        """Returns a cache for `TorchModel`: of keys and values if possible, or else of tokens."""
        entries = probe_cache_entries(build_module(self), jnp.dtype(dtype))
        if isinstance(entries, str):
            return Tokens.empty(batch, max_len)
        return empty_cache(entries, batch, max_len)


@functools.lru_cache(maxsize=16)
def probe_cache_entries(module: EmptyModule, dtype: DTypeLike) -> KeyValues | str:
    """Returns the shapes of the keys and values that a module's layers compute, by a short trace.

    Args:
      module: the module.
      dtype: the dtype of the computation.

    Returns:
      The shapes; or, if the module cannot use cached keys and values, the reason as a text.
    """
    if not module.attends:
        return "its attention does not use transformers' AttentionInterface"
    if module.cache_name is None or "position_ids" not in module.arguments:
        return "it takes no cache together with position_ids"
    leaves = ((row.path, jax.ShapeDtypeStruct(row.stacked_shape, dtype)) for row in module.rows)

    def trace(tree: dict[str, object], ids: jax.Array) -> KeyValues:
        call = CachedCall(empty_cache({}, _PROBE_ROWS, _PROBE_SLOTS), ids, None)
        with use_attention(AttentionSettings(cached=call.mask)):
            module.call(tree, (), {"input_ids": ids}, Recomputation(), call)
        return call.new_entries

    ids = jax.ShapeDtypeStruct((_PROBE_ROWS, _PROBE_TOKENS), np.int32)
    try:
        entries: KeyValues = jax.eval_shape(trace, nest_leaves(leaves), ids)
    except Exception as error:  # noqa: BLE001  # a model's code may raise anything
        return str(error).partition("\n")[0].removeprefix(f"{module.name}: ")
    shapes = [x.shape for x in jax.tree.leaves(entries)]
    # Each entry must be [layers, batch, heads, tokens, head_dim].
    for shape in shapes:
        if len(shape) != 5 or shape[1] != _PROBE_ROWS or shape[3] != _PROBE_TOKENS:
            return _OTHER_ENTRIES
    return entries if shapes else _OTHER_ENTRIES
