"""The codes of a model's files as its config.json alone tells them: shapes, and nothing to read."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.types import Fields
from lora_jax.hf.fields import ConfigError
from lora_jax.hf.keys import Row
from lora_jax.hf.stored.layouts import fp8, mxfp4_blocks
from lora_jax.hf.stored.methods import Method, read_method, stored_tensors
from lora_jax.hf.stored.raw import Header
from lora_jax.quantized import Coded

_NEVER = ("embedding", "positions", "router", "norm", "head", "classifier")  # kinds of parameters


class ConfigCodes:
    """The tensors that will lie in codes; see `lora_jax.hf.sources.HasCodes`.

    Args:
      path: the config.json, for messages.
      fields: the parsed config.json.
      table: the model's key table.

    Raises:
      ConfigError: the shapes of codes do not follow from it.
    """

    def __init__(self, path: Path, fields: Fields, table: Sequence[Row]):
        self.where = str(path)
        headers: dict[str, Header] = {}
        method = read_method(fields)
        if method is not None:
            if method.name not in ("fp8", "mxfp4"):
                raise ConfigError(
                    f"{path}: the shapes of {method.name}'s codes do not follow from config.json; "
                    "take quantization_config out of a copy, and say in which codes kernels are"
                )
            kept = fields["quantization_config"].get("modules_to_not_convert") or ()
            for row in table:
                if len(row.shape) > 1 and row.kind not in _NEVER:
                    for name in row.hf_names:
                        if not any(_names(pattern, name) for pattern in kept):
                            headers |= _headers(method, name, row.hf_shape)
        self._stored = stored_tensors(method, headers, _nothing, self.where)
        self.shipped = frozenset(self._stored)

    def code_shapes(self, name: str, dtype: DTypeLike) -> Coded | None:
        """Returns the shapes of a tensor's codes; None if it will lie in none."""
        stored = self._stored.get(name)
        return None if stored is None else stored.shapes(dtype)


def _names(pattern: str, name: str) -> bool:
    """Returns whether a module's name, perhaps with stars, is that of a tensor or of its parent."""
    each = re.escape(pattern).replace(r"\*", "[^.]*")
    return re.match(rf"(.*\.)?{each}(\.|$)", name) is not None


def _headers(method: Method, name: str, shape: tuple[int, ...]) -> dict[str, Header]:
    """Returns the headers of a tensor in codes, by the names in the files."""
    if method.layouts == (mxfp4_blocks,):
        if len(shape) < 3:  # the experts alone
            return {}
        *lead, n_in, n_out = shape
        blocks, scales = (*lead, n_out, n_in // 32, 16), (*lead, n_out, n_in // 32)
        return {f"{name}_blocks": Header("U8", blocks), f"{name}_scales": Header("U8", scales)}
    assert method.layouts == (fp8,)
    scales = ()
    if (block := method.facts.block) is not None:
        scales = (*shape[:-2], *(-(-n // block) for n in shape[-2:]))
    return {name: Header("F8_E4M3", shape), f"{name}_scale_inv": Header("F32", scales)}


def _nothing(name: str, rows: slice | None) -> np.ndarray:
    raise NotImplementedError(f"{name} has no file")
