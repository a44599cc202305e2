"""Factors that a file need not hold: they follow from the base (LoRA-XS) or from a seed (VeRA).

They are made again on loading. In their place the file's settings of a weight have

    singular     {"a": …, "b": …}: a number for each matrix of a stack, the sum of its factor's
                 elements times fixed random numbers
    projections  the seed of a shared pair, the widths and the dtype it is drawn with, such numbers
    same         {"shared_a": path, …}: the weight under whose path the file holds the array, where
                 the pair did not follow from a seed (it came from another library's file)

and the loader compares. Singular vectors of a matrix that is the same up to rounding are the same
up to rounding, unless their values all but coincide; R would not mean what it meant before, so that
factors which differ are an error, whatever base is accepted.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.base import is_abstract
from lora_jax.core.weight import LoraWeight, Node
from lora_jax.saving.errors import AdapterError
from lora_jax.saving.fingerprint import checksum, mixed
from lora_jax.select.build import singular_factors
from lora_jax.select.projections import Projections, widest

_OWN, _SHARED = ("a", "b"), ("shared_a", "shared_b")
_TOLERANCE = 5e-3  # of a factor's norm; another sign of one singular vector changes much more

Filed = dict[str, dict[str, Any]]  # by path and name


def without_derived(nodes: Mapping[str, Node], arrays: Filed) -> dict[str, dict[str, Any]]:
    """Takes out of `arrays` what is made again on loading; returns the settings to make it with.

    Args:
      nodes: of an adapted tree, by path.
      arrays: their arrays as the file would hold them; changed.
    """
    settings: dict[str, dict[str, Any]] = {}
    compact = {p: n for p, n in nodes.items() if isinstance(n, LoraWeight) and n.is_compact}
    shared = {path: node for path, node in compact.items() if "shared_a" in node.arrays}
    again, holders = _Drawn(), dict[str, str]()  # by checksum, where the file holds an array
    for path, node in compact.items():
        filed = arrays[path]
        filed.pop("seed", None)
        if path not in shared:
            settings[path] = {"singular": _probes(node, _OWN)}
        elif drawing := _drawing(node, shared, again):
            settings[path] = {"projections": drawing}
        else:
            found = {name: checksum(node.arrays[name]) for name in _SHARED}
            same = {name: holders[found[name]] for name in _SHARED if found[name] in holders}
            settings[path] = {"same": same}
            holders |= {found[name]: path for name in _SHARED if name not in same}
            arrays[path] = {name: array for name, array in filed.items() if name not in same}
            continue
        arrays[path] = {n: array for n, array in filed.items() if n not in (*_OWN, *_SHARED)}
    return settings


def _drawing(
    node: LoraWeight, shared: Mapping[str, LoraWeight], again: "_Drawn"
) -> dict[str, Any] | None:
    """Returns what draws a pair again; None where it did not come from a seed."""
    if "seed" not in node.arrays:
        return None
    alike = [_sizes(other) for other in shared.values() if other.rank == node.rank]
    widths = widest([(math.prod(ins), math.prod(outs)) for ins, outs in alike])
    dtype = np.dtype(node.arrays["shared_a"].dtype).name
    drawing = {"seed": int(node.arrays["seed"]), "widths": list(widths), "dtype": dtype}
    drawing["probes"] = _probes(node, _SHARED)
    return drawing if not _differing(again(node, drawing), drawing["probes"]) else None


def _sizes(node: LoraWeight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return node.roles.sizes(node.shape, "in"), node.roles.sizes(node.shape, "out")


class _Drawn:
    """Pairs that are drawn from seeds, each once, so that weights of one size share an array."""

    def __init__(self) -> None:
        self._by_drawing: dict[Any, Projections] = {}

    def __call__(self, node: LoraWeight, drawing: Mapping[str, Any]) -> LoraWeight:
        """Returns a weight with shared_a, shared_b and seed."""
        key = (drawing["seed"], tuple(drawing["widths"]), node.rank)
        if key not in self._by_drawing:
            widths = {node.rank: tuple(drawing["widths"])}
            self._by_drawing[key] = Projections(np.uint32(drawing["seed"]), widths)
        dtype = np.dtype(drawing["dtype"])
        return node.replace(**self._by_drawing[key].of(node.rank, dtype, *_sizes(node)))


class Derived:
    """Makes the arrays that an adapter's file does not hold, and compares them with its probes."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        arrays: Mapping[str, Mapping[str, Any]],
        nodes: Mapping[str, Node],
    ) -> None:
        """Args:
        folder: the adapter's, for messages.
        settings: of each weight, by path.
        arrays: that the file holds, by path and name.
        nodes: of the tree that the adapter is loaded onto; its factors are taken where they fit.
        """
        self._folder, self._settings, self._arrays, self._nodes = folder, settings, arrays, nodes
        self._drawn, self._held = _Drawn(), dict[tuple[str, str], jax.Array]()

    def __call__(self, path: str, weight: LoraWeight) -> LoraWeight:
        """Returns a weight with all of its arrays."""
        settings = self._settings[path]
        if "singular" in settings:
            return self._decomposed(path, weight, settings["singular"])
        if "projections" in settings:
            return self._projected(path, weight, settings["projections"])
        if "same" in settings:
            where = {name: settings["same"].get(name, path) for name in _SHARED}
            return weight.replace(**{n: self._of_file(where[n], n) for n in _SHARED})
        return weight

    def _of_file(self, path: str, name: str) -> jax.Array:
        if (path, name) not in self._held:
            self._held[path, name] = jnp.asarray(self._arrays[path][name])
        return self._held[path, name]

    def _projected(self, path: str, weight: LoraWeight, settings: Mapping[str, Any]) -> LoraWeight:
        weight = self._drawn(weight, settings)
        if wrong := _differing(weight, settings["probes"]):
            raise AdapterError(
                f"the adapter {self._folder} holds the seed {settings['seed']} of VeRA's random "
                f"matrices, and {wrong[0]} of {path!r} is drawn otherwise here than where it was "
                "trained: load it with the version of JAX and the setting of "
                "jax_threefry_partitionable that it was trained with"
            )
        return weight

    def _decomposed(self, path: str, weight: LoraWeight, saved: Mapping[str, Any]) -> LoraWeight:
        there, dtype = self._nodes.get(path), weight.latent.dtype

        def factors(base: Any) -> dict[str, Any]:
            return singular_factors(base, weight.roles, weight.ranks, dtype)

        if is_abstract(weight.base):
            return weight.replace(**jax.eval_shape(factors, weight.base))
        if _decomposes_alike(there, weight):
            arrays = {name: there.arrays[name] for name in _OWN}
        else:
            arrays = factors(weight.base)
        weight = weight.replace(**arrays)
        if _differing(weight, saved):
            raise AdapterError(
                f"the adapter {self._folder} is a LoRA-XS, whose A and B are singular vectors of "
                f"the base, and those of {path!r} are others than where it was trained: the base "
                "differs, or its dtype or codes do. Load the base as it was trained on "
                "(allow_base_mismatch cannot help: R means nothing between other vectors)"
            )
        return weight


def _decomposes_alike(node: Any, weight: LoraWeight) -> TypeGuard[LoraWeight]:
    """Returns whether a node has the factors that decomposing a weight's base would give."""
    return (
        isinstance(node, LoraWeight)
        and node.base is weight.base
        and "latent" in node.has
        and (node.roles, node.ranks) == (weight.roles, weight.ranks)
        and node.arrays["a"].dtype == weight.latent.dtype
    )


def _matrix(node: LoraWeight, name: str) -> jax.Array:
    """Returns a factor as [batch…, r, features], or [r, features], fp32."""
    array, n = node.arrays[name], node.n_batch if name in _OWN else 0
    return array.reshape(*array.shape[: n + 1], -1).astype(jnp.float32)


def _probes(node: LoraWeight, names: Sequence[str]) -> dict[str, Any]:
    """Returns for each factor the sums of its elements times random numbers, as nested lists."""
    rounded = np.vectorize(lambda value: float(f"{value:.7g}"), otypes=[float])
    return {name: rounded(np.asarray(_sums(_matrix(node, name)))).tolist() for name in names}


def _differing(node: LoraWeight, probes: Mapping[str, Any]) -> list[str]:
    """Returns the names of the factors that have other probes, rounding aside."""

    def differs(name: str) -> bool:
        found, saved = np.asarray(_sums(_matrix(node, name))), np.asarray(probes[name])
        norms = np.asarray(jnp.linalg.norm(_matrix(node, name), axis=(-2, -1)))
        return bool((np.abs(found - saved) > _TOLERANCE * norms).any())

    return [name for name in probes if differs(name)]


@jax.jit
def _sums(matrix: jax.Array) -> jax.Array:
    """Returns the sum of the elements of matrices [batch…, r, features] times fixed numbers."""
    row, column = (lax.broadcasted_iota(jnp.uint32, matrix.shape[-2:], axis) for axis in (0, 1))
    bits = mixed(mixed(row + jnp.uint32(1)) + column)
    probe = bits.astype(jnp.float32) / jnp.float32(2**31) - jnp.float32(1)  # in [-1, 1]
    return jnp.sum(matrix * probe, axis=(-2, -1))
