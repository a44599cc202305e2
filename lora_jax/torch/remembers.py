"""Finds by a short trace whether a torch module remembers more of a row than keys and values."""

import functools

import jax
import numpy as np
from jax.typing import DTypeLike

from lora_jax.hf.keys import nest_leaves
from lora_jax.torch.attention import Attending, attending
from lora_jax.torch.cache import CachedCall, Entries, empty_cache
from lora_jax.torch.layers import Recomputed
from lora_jax.torch.module import Built

_ROWS, _TOKENS, _SLOTS = 3, 2, 8  # of the trace: a mask or a shape that leaves slots out fails


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
