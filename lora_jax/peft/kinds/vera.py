"""VeRA's form in PEFT's files, both ways; a `lora_jax.peft.forms.PeftForm`.

PEFT has one A [r, in] and one B [out, r], ``vera_A`` and ``vera_B``, as wide as the widest adapted
layer, and for each layer ``vera_lambda_d`` [r] and ``vera_lambda_b`` [out]. There is no alpha: s is
written into ``vera_lambda_b``.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.types import Fields, JsonObject, Leaf
from lora_jax.core.weight import LoraWeight
from lora_jax.peft.errors import PeftError
from lora_jax.peft.kinds.fields import KindFields
from lora_jax.peft.kinds.generator import draw_uniform
from lora_jax.peft.modules import Module
from lora_jax.peft.names import KEY_PREFIX
from lora_jax.variants.vera import VERA

VARIANT = VERA
KEY_A, KEY_B = "base_model.vera_A", "base_model.vera_B"
# A pair that is not what PEFT would draw is in the file, which is the default.
_FIELDS = KindFields(
    "VeRA",
    default_rank=256,
    kind_fields={"projection_prng_key": 0, "save_projection": True},
    without_effect={"d_initial": 0.1, "init_weights": True},
)


def as_lora_fields(fields: Fields, where: str) -> tuple[JsonObject, JsonObject]:
    """Returns the fields of a LoraConfig that adapts the same modules, and those of VeRA alone.

    Args:
      fields: the fields of a VeraConfig.
      where: their source, for messages.

    Raises:
      PeftError: a value that PEFT would not write.
    """
    lora_fields, kind_fields = _FIELDS.to_lora_fields(fields)
    seed, saves = kind_fields["projection_prng_key"], kind_fields["save_projection"]
    if type(seed) is not int or not 0 <= seed < 2**32 or type(saves) is not bool:
        raise PeftError(
            f"{where}: projection_prng_key={seed!r}, save_projection={saves!r}: a number from 0 to "
            "2³² − 1 and a boolean are needed"
        )
    return lora_fields, kind_fields


def rule_settings(kind_fields: Fields) -> JsonObject:
    """Returns the fields of a LoraRule beside the variant's and a LoraConfig's: none."""
    del kind_fields
    return {}


def adapter_contents(
    config: Fields, nodes: Mapping[str, LoraWeight], modules: Sequence[Module]
) -> tuple[JsonObject, dict[str, np.ndarray]]:
    """Returns a VeraConfig for adapted modules, and the tensors that they share.

    Args:
      config: the fields of a LoraConfig for the same modules.
      nodes: the adapted weights, by path.
      modules: the adapted modules.

    Raises:
      PeftError: they do not share one pair, or a VeraConfig cannot say it.
    """
    del modules
    return _FIELDS.from_lora_fields(config), _find_shared_matrices(nodes)


def module_tensors(module: Module, node: LoraWeight) -> dict[str, np.ndarray]:
    """Returns the tensors of one adapted module, by key.

    Raises:
      PeftError: the module is no linear layer.
    """
    if module.is_table:
        raise PeftError(
            f"{module.name} is a table, and PEFT's VeRA adapts linear layers alone: leave it out"
        )
    d, b = (np.asarray(array[module.index]) for array in (node.lambda_d, node.lambda_b))
    scale = np.asarray(node.scale[module.index])
    key_d, key_b = _keys_of_module(module)
    return {key_d: d, key_b: b.reshape(-1) * scale.astype(b.dtype)}


def _find_shared_matrices(nodes: Mapping[str, LoraWeight]) -> dict[str, np.ndarray]:
    """Returns the tensors that all modules share, by key."""
    projections = {}
    for key, name in ((KEY_A, "shared_a"), (KEY_B, "shared_b")):
        each = {path: _matrix_of_node(node, name) for path, node in nodes.items()}
        widest = max(each.values(), key=lambda matrix: matrix.shape[1])
        for path, matrix in each.items():
            seen = widest[:, : matrix.shape[1]]
            if matrix.shape != seen.shape or not np.array_equal(matrix, seen):
                raise PeftError(
                    f"{path!r} has another random {name[-1].upper()} than the others, and PEFT has "
                    "one for all: adapt them by one call of lorafy, with one rank"
                )
        projections[key] = np.ascontiguousarray(widest if name == "shared_a" else widest.T)
    return projections


def _matrix_of_node(node: LoraWeight, name: str) -> np.ndarray:
    array = np.asarray(node.arrays[name])
    return array.reshape(array.shape[0], -1)


def _keys_of_module(module: Module) -> tuple[str, str]:
    stem = f"{KEY_PREFIX}{module.name}"
    return f"{stem}.vera_lambda_d", f"{stem}.vera_lambda_b"


class VeraFile:
    """The pair that the weights of a file share, each of its arrays made once."""

    def __init__(
        self,
        reader: Any,
        kind_fields: Fields,
        nodes: Sequence[LoraWeight],
        modules: Sequence[Module],
    ) -> None:
        """Args:
        reader: reader of the file's tensors.
        own: the fields of VeRA alone; see `as_lora_fields`.
        nodes: the adapted weights.
        modules: the adapted modules.
        """
        del modules
        (rank,) = {node.rank for node in nodes}
        fan_in = max(math.prod(node.roles.sizes(node.shape, "in")) for node in nodes)
        fan_out = max(math.prod(node.roles.sizes(node.shape, "out")) for node in nodes)
        if kind_fields["save_projection"]:
            a = reader.take(KEY_A, (rank, fan_in))
            b = reader.take(KEY_B, (fan_out, rank))
        else:
            a, b = _draw_matrices(kind_fields["projection_prng_key"], rank, fan_in, fan_out)
            if reader.has(KEY_A):  # ignored, as in PEFT, which warns
                reader.take(KEY_A, a.shape)
                reader.take(KEY_B, b.shape)
        self._reader = reader
        self._matrices = {"shared_a": a, "shared_b": b.T}
        self._cached_arrays: dict[
            Hashable, jax.Array
        ] = {}  # on the device, shared by equal weights

    def arrays(self, node: LoraWeight, members: Sequence[Module]) -> dict[str, Leaf]:
        """Returns the pair of a weight, and lambda_d and lambda_b: 0 where a layer isn't adapted.

        Args:
          node: the weight.
          members: the modules that the weight holds.
        """
        dtype = np.dtype(accumulation_dtype(node.dtype))
        batch = node.roles.sizes(node.shape, "batch")
        out_sizes = node.roles.sizes(node.shape, "out")
        fan_out = math.prod(out_sizes)
        lambda_d = np.zeros((*batch, node.rank), dtype)
        lambda_b = np.zeros((*batch, fan_out), dtype)
        for module in members:
            key_d, key_b = _keys_of_module(module)
            lambda_d[module.index] = self._reader.take(key_d, (node.rank,))
            lambda_b[module.index] = self._reader.take(key_b, (fan_out,))
        lambda_b = lambda_b.reshape(*batch, *out_sizes)
        vectors = jax.device_put({"lambda_d": lambda_d, "lambda_b": lambda_b})
        matrices = {name: self._slice_matrix(node, name) for name in self._matrices}
        return {"seed": None, **matrices, **vectors}

    def _slice_matrix(self, node: LoraWeight, name: str) -> jax.Array:
        """Returns the first columns of a shared matrix, as many as a weight needs."""
        shape = node.shape_of(name)
        dtype = np.dtype(accumulation_dtype(node.dtype))
        key = (name, shape, dtype)
        if key not in self._cached_arrays:
            columns = self._matrices[name][:, : math.prod(shape[1:])].reshape(shape)
            self._cached_arrays[key] = jax.device_put(columns.astype(dtype))
        return self._cached_arrays[key]


read_file = VeraFile


def _draw_matrices(
    seed: int, rank: int, fan_in: int, fan_out: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [r, in] and B [out, r] as PEFT draws them, where a file does not hold them.

    Source: PEFT's ``_kaiming_init``, of one generator for both.
    """
    samples = draw_uniform(seed, (rank * (fan_in + fan_out),))

    def kaiming_uniform(samples: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        bound = np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1])))
        return np.asarray(samples.reshape(shape) * (bound + bound) - bound)

    a = kaiming_uniform(samples[: rank * fan_in], (rank, fan_in))
    b = kaiming_uniform(samples[rank * fan_in :], (fan_out, rank))
    return a, b
