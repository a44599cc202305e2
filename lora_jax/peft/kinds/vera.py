"""Reads and writes VeRA in PEFT's files; a `lora_jax.peft.forms.PeftForm`.

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
# By default the file holds the two matrices, which may differ from those that PEFT would draw.
_FIELDS = KindFields(
    "VeRA",
    default_rank=256,
    kind_fields={"projection_prng_key": 0, "save_projection": True},
    without_effect={"d_initial": 0.1, "init_weights": True},
)


def as_lora_fields(fields: Fields, where: str) -> tuple[JsonObject, JsonObject]:
    """Splits fields into those of a LoraConfig and those of VeRA.

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
            f"{where}: projection_prng_key={seed!r} must be a whole number from 0 to 2³² − 1, and "
            f"save_projection={saves!r} must be true or false. Correct the configuration."
        )
    return lora_fields, kind_fields


def rule_settings(kind_fields: Fields) -> JsonObject:
    """Returns {}: VeRA's fields set no extra fields of a LoraRule."""
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
      PeftError: the modules have different matrices, or a VeraConfig has no fields for them.
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
            f"{module.name} is an embedding table, but PEFT's VeRA adapts linear layers only. "
            "Exclude the table from the rules."
        )
    d, b = (np.asarray(array[module.index]) for array in (node.lambda_d, node.lambda_b))
    scale = np.asarray(node.scale[module.index])
    key_d, key_b = _keys_of_module(module)
    return {key_d: d, key_b: b.reshape(-1) * scale.astype(b.dtype)}


def _find_shared_matrices(nodes: Mapping[str, LoraWeight]) -> dict[str, np.ndarray]:
    """Returns the A [r, in] and the B [out, r] that all modules share, by key.

    PEFT stores the widest matrix of all weights. A narrower weight uses its first columns.

    Raises:
      PeftError: the matrix of a weight is not the beginning of the widest one.
    """
    shared_tensors = {}
    for key, array_name in ((KEY_A, "shared_a"), (KEY_B, "shared_b")):
        matrix_of_path = {}
        for path, node in nodes.items():
            matrix_of_path[path] = _matrix_of_node(node, array_name)  # [r, in] or [r, out]
        widest_matrix = max(matrix_of_path.values(), key=lambda matrix: matrix.shape[1])
        # Each weight must use the first columns of the widest matrix.
        for path, matrix in matrix_of_path.items():
            first_columns = widest_matrix[:, : matrix.shape[1]]
            if not np.array_equal(matrix, first_columns):
                raise PeftError(
                    f"The random {array_name[-1].upper()} of {path!r} differs from that of other "
                    "weights, but PEFT stores one for all. Adapt all weights in one call of "
                    "lorafy, with one rank."
                )
        # PEFT's B has the outputs first.
        tensor = widest_matrix if array_name == "shared_a" else widest_matrix.T
        shared_tensors[key] = np.ascontiguousarray(tensor)
    return shared_tensors


def _matrix_of_node(node: LoraWeight, name: str) -> np.ndarray:
    """Returns a weight's array as a matrix [r, product of the other sizes]."""
    array = np.asarray(node.arrays[name])
    return array.reshape(array.shape[0], -1)


def _keys_of_module(module: Module) -> tuple[str, str]:
    stem = f"{KEY_PREFIX}{module.name}"
    return f"{stem}.vera_lambda_d", f"{stem}.vera_lambda_b"


class VeraFile:
    """Reads the A and B that all weights share, and the vectors of each weight."""

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
            # PEFT ignores matrices in the file, with a warning. They count as read here.
            if reader.has(KEY_A):
                reader.take(KEY_A, a.shape)
                reader.take(KEY_B, b.shape)
        self._reader = reader
        self._matrices = {"shared_a": a, "shared_b": b.T}
        self._cached_arrays: dict[
            Hashable, jax.Array
        ] = {}  # on the device, shared by equal weights

    def arrays(self, node: LoraWeight, members: Sequence[Module]) -> dict[str, Leaf]:
        """Returns a weight's A, B and vectors; layers without an adapter have vectors of zeros.

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
        """Returns the first columns of a shared matrix for a weight, on the device."""
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
    """Draws A [r, in] and B [out, r] as PEFT does if the file lacks them.

    Source: PEFT's ``_kaiming_init``, with one generator for both.
    """
    samples = draw_uniform(seed, (rank * (fan_in + fan_out),))

    def kaiming_uniform(samples: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        bound = np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1])))
        return np.asarray(samples.reshape(shape) * (bound + bound) - bound)

    a = kaiming_uniform(samples[: rank * fan_in], (rank, fan_in))
    b = kaiming_uniform(samples[rank * fan_in :], (fan_out, rank))
    return a, b
