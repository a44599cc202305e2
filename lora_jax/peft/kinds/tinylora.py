"""Reads and writes TinyLoRA in PEFT's files; a `lora_jax.peft.forms.PeftForm`.

PEFT has for each adapted module ``tinylora_A`` [r, in], ``tinylora_B`` [out, r] and ``tinylora_P``
[u, r, r], and for all of them ``tinylora_v.0``, ``tinylora_v.1``, … [u]: module number i, in the
order in which torch lists them, has the vector that
`lora_jax.select.ties.vector_index_of_module` says. There is no alpha: s is written into
``tinylora_P``. A linear layer's P is the transpose of ours.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.types import Fields, JsonObject, Leaf
from lora_jax.core.weight import LoraWeight
from lora_jax.peft.errors import PeftError
from lora_jax.peft.kinds.fields import KindFields
from lora_jax.peft.kinds.generator import draw_normal
from lora_jax.peft.modules import Module, sort_modules
from lora_jax.peft.names import KEY_PREFIX
from lora_jax.select.ties import vector_index_of_module
from lora_jax.variants.tinylora import TINYLORA

VARIANT = TINYLORA
_VECTOR_KEY_PREFIX = "base_model.tinylora_v."
# By default the file holds the matrices, which may differ from those that PEFT would draw.
_FIELDS = KindFields(
    "TinyLoRA",
    default_rank=2,
    kind_fields={"u": 64, "weight_tying": 0.0, "projection_seed": 42, "save_projection": True},
    without_effect={"init_v_bound": 0.02, "init_weights": True},
)


def as_lora_fields(fields: Fields, where: str) -> tuple[JsonObject, JsonObject]:
    """Splits fields into those of a LoraConfig and those of TinyLoRA.

    Args:
      fields: the fields of a TinyLoraConfig.
      where: their source, for messages.

    Raises:
      PeftError: a value that PEFT would not write.
    """
    lora_fields, kind_fields = _FIELDS.to_lora_fields(fields)
    u = kind_fields["u"]
    tying = kind_fields["weight_tying"]
    seed = kind_fields["projection_seed"]
    is_valid = {
        "u": type(u) is int and u >= 1,
        "weight_tying": type(tying) in (int, float) and 0 <= tying <= 1,
        "projection_seed": type(seed) is int and 0 <= seed < 2**31,
        "save_projection": type(kind_fields["save_projection"]) is bool,
    }
    invalid_fields = [
        f"{name}={kind_fields[name]!r}" for name, valid in is_valid.items() if not valid
    ]
    if invalid_fields:
        raise PeftError(
            f"{where}: PEFT would not write {', '.join(invalid_fields)}. Correct the configuration."
        )
    return lora_fields, kind_fields


def rule_settings(kind_fields: Fields) -> JsonObject:
    """Returns the extra LoraRule fields that TinyLoRA's fields set."""
    return {name: kind_fields[name] for name in ("u", "weight_tying")}


def module_tensors(module: Module, node: LoraWeight) -> dict[str, np.ndarray]:
    """Returns the tensors of one adapted module, by key."""
    index = module.index
    layer = index[0] if index and len(node.ranks) > 1 else 0
    rank = node.ranks[layer]
    a = np.asarray(node.a[index]).reshape(node.rank, -1)[:rank]
    b = np.asarray(node.b[index]).reshape(node.rank, -1)[:rank]
    projection = np.asarray(node.arrays["projection"][index])[:, :rank, :rank]
    projection = projection * np.asarray(node.scale[index]).astype(projection.dtype)
    key_a, key_b, key_p = _keys_of_module(module)
    if module.is_table:  # PEFT looks B up
        return {key_a: b, key_b: a.T, key_p: projection}
    return {key_a: a, key_b: b.T, key_p: projection.swapaxes(1, 2)}


def adapter_contents(
    config: Fields, nodes: Mapping[str, LoraWeight], modules: Sequence[Module]
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Returns a TinyLoraConfig for adapted modules, and the tensors that they share.

    If the vectors are tied differently from PEFT's rule, the file has one vector for each module.

    Args:
      config: the fields of a LoraConfig for the same modules.
      nodes: the adapted weights, by path.
      modules: the adapted modules.

    Raises:
      PeftError: a TinyLoraConfig has no fields for these modules.
    """
    fields = _FIELDS.from_lora_fields(config)
    sizes = sorted({node.v.shape[-1] for node in nodes.values()})
    if len(sizes) > 1:
        raise PeftError(
            f"PEFT's TinyLoRA has one u for all modules, but the tree has {sizes}. Use one u in "
            "all rules."
        )
    sorted_modules = sort_modules(modules)
    tying = _weight_tying_of(
        [_tie_of_module(module, nodes[module.path]) for module in sorted_modules]
    )
    vectors = dict[str, np.ndarray]()
    for number, module in enumerate(sorted_modules):
        v = np.asarray(nodes[module.path].v[module.index])
        vectors.setdefault(
            f"{_VECTOR_KEY_PREFIX}{vector_index_of_module(number, len(sorted_modules), tying)}", v
        )
    return fields | {"u": sizes[0], "weight_tying": tying}, vectors


def _tie_of_module(module: Module, node: LoraWeight) -> object:
    """Returns a key that is equal for modules that share a vector."""
    if not node.ties:
        return module.name
    return node.ties[_flat_member_index(module, node)]


def _flat_member_index(module: Module, node: LoraWeight) -> int:
    """Returns the index of a module in the flattened batch axes of its weight."""
    batch = node.roles.sizes(node.shape, "batch")
    return int(np.ravel_multi_index(module.index, batch)) if module.index else 0


def _weight_tying_of(ties: Sequence[object]) -> float:
    """Returns PEFT's weight_tying for the ties of modules; 0.0 if no value gives these ties.

    Args:
      ties: a value for each module, in torch's order; modules with equal values share a vector.
    """
    n_modules = len(ties)
    group_of_tie = dict[object, int]()  # numbered in the order of the modules
    groups = [group_of_tie.setdefault(tie, len(group_of_tie)) for tie in ties]
    tying = 1 - len(group_of_tie) / n_modules
    peft_groups = [vector_index_of_module(number, n_modules, tying) for number in range(n_modules)]
    return tying if groups == peft_groups else 0.0


class TinyLoraFile:
    """Reads the vectors of a file and the arrays of each weight."""

    def __init__(
        self,
        reader: Any,
        kind_fields: Fields,
        nodes: Sequence[LoraWeight],
        modules: Sequence[Module],
    ) -> None:
        """Args:
        reader: reader of the file's tensors.
        own: the fields of TinyLoRA alone; see `as_lora_fields`.
        nodes: the adapted weights.
        modules: the adapted modules.
        """
        del nodes
        self._reader = reader
        self._own = kind_fields
        self._number_of_module = {
            module.name: number for number, module in enumerate(sort_modules(modules))
        }

    def arrays(self, node: LoraWeight, members: Sequence[Module]) -> dict[str, Leaf]:
        """Returns the arrays and the ties of a weight; layers without an adapter get zeros.

        Args:
          node: the weight.
          members: the modules that the weight holds.
        """
        dtype = np.dtype(accumulation_dtype(node.dtype))
        u, rank = self._own["u"], node.rank
        batch, in_sizes, out_sizes = (
            node.roles.sizes(node.shape, role) for role in ("batch", "in", "out")
        )
        fan_in, fan_out = math.prod(in_sizes), math.prod(out_sizes)
        a = np.zeros((*batch, rank, fan_in), dtype)
        b = np.zeros((*batch, rank, fan_out), dtype)
        projection = np.zeros((*batch, u, rank, rank), dtype)
        v = np.zeros((*batch, u), dtype)
        groups = [-1] * math.prod(batch)
        for module in members:
            group = self._vector_number(module)
            groups[_flat_member_index(module, node)] = group
            index = module.index
            v[index] = self._reader.take(f"{_VECTOR_KEY_PREFIX}{group}", (u,))
            projection[index] = self._read_projection(module, rank)
            a[index], b[index] = self._read_factors(module, rank, fan_in, fan_out)
        arrays = {
            "a": a.reshape(*batch, rank, *in_sizes),
            "b": b.reshape(*batch, rank, *out_sizes),
            "projection": projection,
            "v": v,
        }
        ties = tuple(groups) if self._own["weight_tying"] else ()
        return {"seed": None, "ties": ties, **jax.device_put(arrays)}

    def _vector_number(self, module: Module) -> int:
        """Returns the number of a module's vector."""
        number = self._number_of_module[module.name]
        return vector_index_of_module(
            number, len(self._number_of_module), self._own["weight_tying"]
        )

    def _read_projection(self, module: Module, rank: int) -> np.ndarray:
        """Returns a module's projection [u, r, r], drawn like PEFT's if missing."""
        _, _, key = _keys_of_module(module)
        shape = (self._own["u"], rank, rank)
        projection = self._reader.take(key, shape) if self._reader.has(key) else None
        if projection is None or not self._own["save_projection"]:
            seed = self._own["projection_seed"] + self._number_of_module[module.name]
            projection = draw_normal(seed, shape) * np.float32(1 / rank**0.5)
        return projection if module.is_table else projection.swapaxes(1, 2)

    def _read_factors(
        self, module: Module, rank: int, fan_in: int, fan_out: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns A [r, in] and B [r, out] of a module."""
        key_a, key_b, _ = _keys_of_module(module)
        if module.is_table:
            a = self._reader.take(key_b, (fan_in, rank)).T
            b = self._reader.take(key_a, (rank, fan_out))
        else:
            a = self._reader.take(key_a, (rank, fan_in))
            b = self._reader.take(key_b, (fan_out, rank)).T
        return a, b


read_file = TinyLoraFile


def _keys_of_module(module: Module) -> tuple[str, str, str]:
    """Returns the keys of A, B and P of a module."""
    a, b, p = (f"{KEY_PREFIX}{module.name}.tinylora_{name}" for name in "ABP")
    return a, b, p
