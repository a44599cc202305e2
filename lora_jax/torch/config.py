"""The configuration of a torch module: what the rest of the library asks of any model's.

That a module goes on from keys and values is found by a short trace (`remembered`).
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
from lora_jax.torch.attention import Attending, attending
from lora_jax.torch.cache import CachedCall, Entries, Tokens, empty_cache
from lora_jax.torch.layers import Recomputed
from lora_jax.torch.module import Built, built
from lora_jax.torch.recipe import Recipe

_ROWS, _TOKENS, _SLOTS = 3, 2, 8  # of the trace: a mask or a shape that leaves slots out fails


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
          ConfigError: transformers has no such model, or only by code of the model's own.
        """
        kind = fields.get("model_type")
        if kind not in CONFIG_MAPPING and "auto_map" in fields:
            raise ConfigError(
                f"a {kind} model runs by code of its own (auto_map), and no "
                "code of models is run here"
            )
        if kind not in CONFIG_MAPPING:
            raise ConfigError(
                f"transformers {transformers.__version__} has no model_type {kind!r}: a newer one "
                "may have it"
            )
        return cls(json.dumps(fields, sort_keys=True), **options)

    def to_hf(self) -> dict[str, object]:
        """Returns the config.json."""
        return dict(self.fields)

    def key_rows(self) -> Sequence[Row]:
        """Returns the key table; see `lora_jax.models.key_table`."""
        return built(self).rows

    def _text(self, *names: str) -> Any:
        """Returns the first of the fields, of the part that reads texts, that is there."""
        text_config = None if self.hf is None else self.hf.get_text_config()
        for name in names:
            value = getattr(text_config, name, None)
            if value is not None:
                return value
        return None

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return int(self._text("vocab_size") or 0)

    @property
    def hidden_size(self) -> int:
        """The size of hidden states."""
        return int(self._text("hidden_size", "n_embd", "d_model") or 0)

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers."""
        return int(self._text("num_hidden_layers", "n_layer", "num_layers") or 0)

    @property
    def num_attention_heads(self) -> int:
        """The number of heads; 1 for a model without."""
        return int(self._text("num_attention_heads", "n_head", "n_heads", "num_heads") or 1)

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return int(self._text("head_dim") or self.hidden_size // self.num_attention_heads)

    @property
    def max_position_embeddings(self) -> int:
        """The most tokens of a row."""
        return int(self._text("max_position_embeddings", "n_positions", "max_seq_len") or 1 << 20)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return read_eos({"eos_token_id": self._text("eos_token_id")})

    @property
    def pad_token_id(self) -> int | None:
        """The token of padding."""
        value = self._text("pad_token_id")
        return None if value is None else int(value)

    @property
    def tie_word_embeddings(self) -> bool:
        """True if the head is the table of tokens."""
        return any(row.kind in ("embedding", "head") and row.aliases for row in self.key_rows())

    @property
    def pattern(self) -> dict[str, bool]:
        """The names of the places of stacked layers of several kinds; see ``DecoderConfig``."""
        stacks = [stack for stack in built(self).stacks if stack.period > 1 and not stack.start]
        return {stack.place(k): False for stack in stacks[:1] for k in range(stack.period)}

    @property
    def packs(self) -> bool:
        """True if a row may hold several sequences, none of which sees another."""
        return built(self).packs

    def layer_lines(self) -> list[str]:
        """Returns a line on each list of layers: how it runs, and what that means for compiling."""
        module = built(self)
        lines = [
            f"layers: {stack.name} as one scan of {stack.repeats} turns"
            + (f" of {stack.period} kinds" if stack.period > 1 else "")
            + (f", after {stack.start} of their own" if stack.start else "")
            for stack in module.stacks
        ]
        for name in module.lists:
            n = len(module.layers(name))
            other = "only a causal language model's are stacked" if self.scan else "as asked"
            lines.append(
                f"layers: the {n} of {name} one by one ({module.unlike.get(name, other)}): "
                f"compiling takes about {n} times as long as for layers that are alike"
            )
        return lines

    @property
    def caches(self) -> bool:
        """True if generation keeps keys and values."""
        return not isinstance(remembered(built(self), jnp.dtype(jnp.float32)), str)

    def cache_line(self) -> str:
        """Returns a line on what generation computes for each token."""
        kept = remembered(built(self), jnp.dtype(jnp.float32))
        how = f"the whole row ({kept})" if isinstance(kept, str) else "with keys and values kept"
        return f"each token of an answer: {how}"

    def empty_cache(self, batch: int, max_len: int, dtype: DTypeLike = jnp.float32) -> Any:
        """Returns a cache for `TorchModel`: keys and values, or else the tokens so far."""
        kept = remembered(built(self), jnp.dtype(dtype))
        if isinstance(kept, str):
            return Tokens.empty(batch, max_len)
        return empty_cache(kept, batch, max_len)


@functools.lru_cache(maxsize=16)
def remembered(module: Built, dtype: DTypeLike) -> Entries | str:
    """Returns the shapes of the keys and values that a module's layers make.

    Args:
      module: the module.
      dtype: the dtype of the computation.

    Returns:
      A text where the module cannot go on from keys and values: why not.
    """
    if not module.attends:
        return "its attention is not by transformers' interface"
    if module.cache_name is None or "position_ids" not in module.arguments:
        return "it takes no cache beside the tokens' positions"
    leaves = ((row.path, jax.ShapeDtypeStruct(row.stacked_shape, dtype)) for row in module.rows)

    def trace(tree: dict[str, object], ids: jax.Array) -> Entries:
        call = CachedCall(empty_cache({}, _ROWS, _SLOTS), ids, None)
        with attending(Attending(cached=call.mask)):
            module.call(tree, (), {"input_ids": ids}, Recomputed(), call)
        return call.new_entries

    ids = jax.ShapeDtypeStruct((_ROWS, _TOKENS), np.int32)
    try:
        entries: Entries = jax.eval_shape(trace, nest_leaves(leaves), ids)
    except Exception as error:  # noqa: BLE001  # others' code: it computes whole rows
        return str(error).partition("\n")[0].removeprefix(f"{module.name}: ")
    shapes = [x.shape for x in jax.tree.leaves(entries)]
    if not shapes or any((len(s), *s[1:4:2]) != (5, _ROWS, _TOKENS) for s in shapes):
        return "its keys and values are none of each token's"
    return entries
