"""TinyLoRA's form in PEFT's files, both ways; a `lora_jax.peft.forms.PeftForm`.

PEFT has for each adapted module ``tinylora_A`` [r, in], ``tinylora_B`` [out, r] and ``tinylora_P``
[u, r, r], and for all of them ``tinylora_v.0``, ``tinylora_v.1``, … [u]: module number i, in the
order in which torch lists them, has the vector that `lora_jax.select.ties.group_of` says. There is
no alpha: s is written into ``tinylora_P``. A linear layer's P is the transposed of ours.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.magnitude import wide
from lora_jax.core.types import Fields, JsonObject, Leaf
from lora_jax.core.weight import LoraWeight
from lora_jax.peft.errors import PeftError
from lora_jax.peft.kinds.fields import KindFields
from lora_jax.peft.kinds.generator import normal
from lora_jax.peft.modules import Module, sort_modules
from lora_jax.peft.names import PREFIX
from lora_jax.select.ties import group_of
from lora_jax.variants.tinylora import TINYLORA

VARIANT = TINYLORA
_SHARED = "base_model.tinylora_v."
# Where matrices are not those that PEFT would draw, they are in the file, which is the default.
_FIELDS = KindFields(
    "TinyLoRA",
    rank=2,
    own={"u": 64, "weight_tying": 0.0, "projection_seed": 42, "save_projection": True},
    without_effect={"init_v_bound": 0.02, "init_weights": True},
)


def as_lora_fields(fields: Fields, where: str) -> tuple[JsonObject, JsonObject]:
    """Returns the fields of a LoraConfig that adapts the same modules, and those of TinyLoRA alone.

    Args:
      fields: the fields of a TinyLoraConfig.
      where: their source, for messages.

    Raises:
      PeftError: a value that PEFT would not write.
    """
    lora_fields, own = _FIELDS.as_lora(fields)
    u, tying, seed = (own[name] for name in ("u", "weight_tying", "projection_seed"))
    fits = {
        "u": type(u) is int and u >= 1,
        "weight_tying": type(tying) in (int, float) and 0 <= tying <= 1,
        "projection_seed": type(seed) is int and 0 <= seed < 2**31,
        "save_projection": type(own["save_projection"]) is bool,
    }
    if wrong := [f"{name}={own[name]!r}" for name, is_right in fits.items() if not is_right]:
        raise PeftError(f"{where}: {', '.join(wrong)}: not a value that PEFT would write")
    return lora_fields, own


def settings(own: Fields) -> JsonObject:
    """Returns the fields of a LoraRule beside the variant's and a LoraConfig's."""
    return {name: own[name] for name in ("u", "weight_tying")}


def tensors_of(module: Module, node: LoraWeight) -> dict[str, np.ndarray]:
    """Returns the tensors of one adapted module, by key."""
    at = module.index
    layer = at[0] if at and len(node.ranks) > 1 else 0
    rank = node.ranks[layer]
    a, b = (np.asarray(x[at]).reshape(node.rank, -1)[:rank] for x in (node.a, node.b))
    projection = np.asarray(node.arrays["projection"][at])[:, :rank, :rank]
    projection = projection * np.asarray(node.scale[at]).astype(projection.dtype)
    keys = _keys(module)
    if module.is_table:  # PEFT looks B up
        return dict(zip(keys, (b, a.T, projection), strict=True))
    return dict(zip(keys, (a, b.T, projection.swapaxes(1, 2)), strict=True))


def contents(
    config: Fields, nodes: Mapping[str, LoraWeight], modules: Sequence[Module]
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Returns a TinyLoraConfig for adapted modules, and the tensors that they share.

    Vectors that are tied otherwise than PEFT ties them are written one for each module.

    Args:
      config: the fields of a LoraConfig for the same modules.
      nodes: the adapted weights, by path.
      modules: the adapted modules.

    Raises:
      PeftError: a TinyLoraConfig cannot say it.
    """
    written = _FIELDS.from_lora(config)
    if len(sizes := sorted({node.v.shape[-1] for node in nodes.values()})) > 1:
        raise PeftError(f"PEFT's TinyLoRA has one u for all modules; here they have {sizes}")
    ordered = sort_modules(modules)
    tying = _tying([_tie(module, nodes[module.path]) for module in ordered])
    vectors = dict[str, np.ndarray]()
    for index, module in enumerate(ordered):
        v = np.asarray(nodes[module.path].v[module.index])
        vectors.setdefault(f"{_SHARED}{group_of(index, len(ordered), tying)}", v)
    return written | {"u": sizes[0], "weight_tying": tying}, vectors


def _tie(module: Module, node: LoraWeight) -> object:
    """Returns a key, the same for modules that train one vector."""
    if not node.ties:
        return module.name
    return node.ties[_member(module, node)]


def _member(module: Module, node: LoraWeight) -> int:
    batch = node.roles.sizes(node.shape, "batch")
    return int(np.ravel_multi_index(module.index, batch)) if module.index else 0


def _tying(ties: Sequence[object]) -> float:
    """Returns PEFT's weight_tying for modules in order, 0.0 where PEFT cannot tie them so."""
    n, numbers = len(ties), dict[object, int]()
    groups = [numbers.setdefault(tie, len(numbers)) for tie in ties]
    tying = 1 - len(numbers) / n
    return tying if groups == [group_of(index, n, tying) for index in range(n)] else 0.0


class FileVectors:
    """The vectors of a file, and the order of the modules that have them."""

    def __init__(
        self, reader: Any, own: Fields, nodes: Sequence[LoraWeight], modules: Sequence[Module]
    ) -> None:
        """Args:
        reader: reader of the file's tensors.
        own: the fields of TinyLoRA alone; see `as_lora_fields`.
        nodes: the adapted weights.
        modules: the adapted modules.
        """
        del nodes
        self._reader, self._own = reader, own
        self._places = {module.name: place for place, module in enumerate(sort_modules(modules))}

    def arrays(self, node: LoraWeight, members: Sequence[Module]) -> dict[str, Leaf]:
        """Returns the arrays of a weight: zeros where a layer isn't adapted; and its ties.

        Args:
          node: the weight.
          members: the modules that the weight holds.
        """
        dtype, u, rank = np.dtype(wide(node.dtype)), self._own["u"], node.rank
        batch, *sides = (node.roles.sizes(node.shape, role) for role in ("batch", "in", "out"))
        arrays = {
            "a": np.zeros((*batch, rank, math.prod(sides[0])), dtype),
            "b": np.zeros((*batch, rank, math.prod(sides[1])), dtype),
            "projection": np.zeros((*batch, u, rank, rank), dtype),
            "v": np.zeros((*batch, u), dtype),
        }
        ties = [-1] * math.prod(batch)
        for module in members:
            group = self._group(module)
            ties[_member(module, node)] = group
            v = self._reader.take(f"{_SHARED}{group}", (u,))
            read = (*self._factors(module, rank, sides), v)
            for array, value in zip(arrays.values(), read, strict=True):
                array[module.index] = value
        shapes = {name: (*batch, rank, *axes) for name, axes in zip("ab", sides, strict=True)}
        shaped = {n: x.reshape(shapes.get(n, x.shape)) for n, x in arrays.items()}
        numbers = tuple(ties) if self._own["weight_tying"] else ()
        return {"seed": None, "ties": numbers, **jax.device_put(shaped)}

    def _group(self, module: Module) -> int:
        place, n = self._places[module.name], len(self._places)
        return group_of(place, n, self._own["weight_tying"])

    def _factors(
        self, module: Module, rank: int, sides: Sequence[tuple[int, ...]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns a, b and the projection of a module, in our layout."""
        ins, outs = map(math.prod, sides)
        key_a, key_b, key_p = _keys(module)
        shape = (self._own["u"], rank, rank)
        saved, is_there = self._own["save_projection"], self._reader.has(key_p)
        projection = self._reader.take(key_p, shape) if is_there else None
        if projection is None or not saved:
            seed = self._own["projection_seed"] + self._places[module.name]
            projection = normal(seed, shape) * np.float32(1 / rank**0.5)
        if module.is_table:
            a, b = self._reader.take(key_b, (ins, rank)).T, self._reader.take(key_a, (rank, outs))
            return a, b, projection
        a, b = self._reader.take(key_a, (rank, ins)), self._reader.take(key_b, (outs, rank)).T
        return a, b, projection.swapaxes(1, 2)


read_file = FileVectors


def _keys(module: Module) -> tuple[str, str, str]:
    a, b, p = (f"{PREFIX}{module.name}.tinylora_{name}" for name in "ABP")
    return a, b, p
