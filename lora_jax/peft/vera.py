"""VeRA's tensors in PEFT's files, both ways; `lora_jax.peft.vera_fields` has its configuration.

PEFT has one A [r, in] and one B [out, r], ``vera_A`` and ``vera_B``, as wide as the widest adapted
layer, and for each layer ``vera_lambda_d`` [r] and ``vera_lambda_b`` [out]. There is no alpha: s is
written into ``vera_lambda_b``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.magnitude import wide
from lora_jax.core.weight import LoraWeight
from lora_jax.peft.errors import PeftError
from lora_jax.peft.modules import Module
from lora_jax.peft.names import PREFIX

KEY_A, KEY_B = "base_model.vera_A", "base_model.vera_B"


def is_vera(node: Any) -> bool:
    """Returns whether a node of an adapted tree is a VeRA."""
    return isinstance(node, LoraWeight) and "lambda_d" in node.has


def as_in_peft(node: Any) -> Any:
    """Returns a node as PEFT has it: LoRA-XS, which PEFT lacks, as a LoRA whose B is RB."""
    is_xs = isinstance(node, LoraWeight) and node.is_compact and not is_vera(node)
    return node.as_lora() if is_xs else node


def tensors_of(module: Module, node: LoraWeight) -> dict[str, np.ndarray]:
    """Returns the tensors of one adapted module, by key.

    Raises:
      PeftError: the module is no linear layer.
    """
    if module.is_embedding or module.uses == "product":
        raise PeftError(
            f"{module.name} is a table, and PEFT's VeRA adapts linear layers alone: leave it out"
        )
    d, b = (np.asarray(array[module.index]) for array in (node.lambda_d, node.lambda_b))
    scale = np.asarray(node.scale[module.index])
    key_d, key_b = _keys(module)
    return {key_d: d, key_b: b.reshape(-1) * scale.astype(b.dtype)}


def pair_of(nodes: Mapping[str, LoraWeight]) -> dict[str, np.ndarray]:
    """Returns the tensors that all modules share, by key.

    Args:
      nodes: the adapted weights, by path.

    Raises:
      PeftError: they do not share one pair, or some are no VeRA.
    """
    plain = [path for path, node in nodes.items() if not is_vera(node)]
    if plain:
        raise PeftError(
            f"{plain[0]!r} is adapted otherwise than by VeRA, and PEFT has one kind of adapter in "
            "a file: give all rules vera=True, or none"
        )
    found = {}
    for key, name in ((KEY_A, "shared_a"), (KEY_B, "shared_b")):
        each = {path: _matrix(node, name) for path, node in nodes.items()}
        widest = max(each.values(), key=lambda matrix: matrix.shape[1])
        for path, matrix in each.items():
            seen = widest[:, : matrix.shape[1]]
            if matrix.shape != seen.shape or not np.array_equal(matrix, seen):
                raise PeftError(
                    f"{path!r} has another random {name[-1].upper()} than the others, and PEFT has "
                    "one for all: adapt them by one call of lorafy, with one rank"
                )
        found[key] = np.ascontiguousarray(widest if name == "shared_a" else widest.T)
    return found


def _matrix(node: LoraWeight, name: str) -> np.ndarray:
    array = np.asarray(node.arrays[name])
    return array.reshape(array.shape[0], -1)


def _keys(module: Module) -> tuple[str, str]:
    stem = f"{PREFIX}{module.name}"
    return f"{stem}.vera_lambda_d", f"{stem}.vera_lambda_b"


class Pair:
    """The pair that the weights of a file share, each of its arrays made once."""

    def __init__(self, reader: Any, own: Mapping[str, Any], nodes: Sequence[LoraWeight]) -> None:
        """Args:
        reader: of the file's tensors.
        own: the fields of VeRA alone; see `lora_jax.peft.vera_fields`.
        nodes: the adapted weights.
        """
        (rank,) = {node.rank for node in nodes}
        ins, outs = (
            max(math.prod(node.roles.sizes(node.shape, role)) for node in nodes)
            for role in ("in", "out")
        )
        if own["save_projection"]:
            a, b = reader.take(KEY_A, (rank, ins)), reader.take(KEY_B, (outs, rank))
        else:
            a, b = _drawn(own["projection_prng_key"], rank, ins, outs)
            if reader.has(KEY_A):  # as PEFT does, with a warning
                reader.take(KEY_A, a.shape), reader.take(KEY_B, b.shape)
        self._matrices = {"shared_a": a, "shared_b": b.T}
        self._made: dict[Any, Any] = {}

    def of(self, node: LoraWeight) -> dict[str, Any]:
        """Returns shared_a and shared_b of a weight."""
        return {"shared_a": self._part(node, "shared_a"), "shared_b": self._part(node, "shared_b")}

    def _part(self, node: LoraWeight, name: str) -> Any:
        shape, dtype = node.shape_of(name), np.dtype(wide(node.dtype))
        key = (name, shape, dtype)
        if key not in self._made:
            part = self._matrices[name][:, : math.prod(shape[1:])].reshape(shape)
            self._made[key] = jnp.asarray(part.astype(dtype))
        return self._made[key]


def vectors_of(reader: Any, members: Sequence[Module], node: LoraWeight) -> dict[str, np.ndarray]:
    """Returns lambda_d and lambda_b of a weight, 0 in the layers that are not adapted.

    Args:
      reader: of the file's tensors.
      members: the modules that the weight holds.
      node: the weight.
    """
    dtype = np.dtype(wide(node.dtype))
    columns = math.prod(node.roles.sizes(node.shape, "out"))
    batch = node.roles.sizes(node.shape, "batch")
    d, b = np.zeros((*batch, node.rank), dtype), np.zeros((*batch, columns), dtype)
    for module in members:
        key_d, key_b = _keys(module)
        d[module.index] = reader.take(key_d, (node.rank,))
        b[module.index] = reader.take(key_b, (columns,))
    return {"lambda_d": d, "lambda_b": b.reshape(node.shape_of("lambda_b"))}


def _drawn(seed: int, rank: int, ins: int, outs: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [r, in] and B [out, r] as PEFT draws them, where a file does not hold them.

    Source: PEFT's ``_kaiming_init``, by torch's generator for CPUs: the Mersenne twister, of whose
    numbers it takes the lowest 24 bits.
    """
    generator = np.random.RandomState(seed)

    def uniform(shape: tuple[int, int]) -> np.ndarray:
        bits = generator.randint(0, 2**32, size=shape, dtype=np.uint32) & np.uint32(2**24 - 1)
        bound = np.float32(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1])))
        return bits.astype(np.float32) * np.float32(2**-24) * (bound + bound) - bound

    return uniform((rank, ins)), uniform((outs, rank))
