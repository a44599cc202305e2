"""Factors that a file need not hold: they follow from the base or from a seed.

They are made again on loading, as the variant declares (`lora_jax.variants.variant.Derived`). In
their place the file's settings of a weight have one of

    <entry>      what the factors are made from, with "probes", {"a": …, "b": …}: a number for each
                 matrix of a stack, the sum of its factor's elements times fixed random numbers; the
                 probes alone where nothing but W is needed
    same         {"shared_a": path, …}: the weight under whose path the file holds the array, where
                 the pair did not follow from a seed (it came from another library's file)

and the loader compares. Factors that differ are an error, whatever base is accepted.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.base import is_abstract
from lora_jax.core.types import Fields, JsonObject, Leaf
from lora_jax.core.weight import LoraWeight, Node
from lora_jax.saving.errors import AdapterError
from lora_jax.saving.fingerprint import checksum, mixed
from lora_jax.variants import derived_of
from lora_jax.variants.variant import Derived, Remake

_TOLERANCE = 5e-3  # of a factor's norm; another sign of one singular vector changes much more

Filed = dict[str, dict[str, Leaf]]  # by path and name


def take_out_derived(nodes: Mapping[str, Node], arrays: Filed) -> dict[str, JsonObject]:
    """Takes out of `arrays` what is made again on loading; returns the settings to make it with.

    Args:
      nodes: the nodes of an adapted tree, by path.
      arrays: their arrays as the file would hold them; changed.
    """
    weights: dict[Derived, dict[str, LoraWeight]] = defaultdict(dict)
    for path, node in nodes.items():
        if isinstance(node, LoraWeight) and (derived := derived_of(node)):
            weights[derived][path] = node
    settings: dict[str, JsonObject] = {}
    for derived, of_kind in weights.items():
        others, again, holders = list(of_kind.values()), derived.again(of_kind), dict[str, str]()
        for path, node in of_kind.items():
            filed = arrays[path]
            filed.pop("seed", None)
            recipe, probes = derived.recipe(node, others), _probes(node, derived.names)
            if recipe is None or _differing(node.replace(**again(path, node, recipe)), probes):
                checksums = {name: checksum(node.arrays[name]) for name in derived.names}
                same = {name: holders[sum_] for name, sum_ in checksums.items() if sum_ in holders}
                settings[path] = {"same": same}
                holders |= {checksums[name]: path for name in derived.names if name not in same}
                gone = tuple(same)
            else:
                settings[path] = {derived.entry: recipe | {"probes": probes} if recipe else probes}
                gone = derived.names
            arrays[path] = {name: array for name, array in filed.items() if name not in gone}
    return settings


class Remaker:
    """Makes the arrays that an adapter's file does not hold, and compares them with its probes."""

    def __init__(
        self,
        folder: Path,
        settings: Fields,
        arrays: Mapping[str, Mapping[str, np.ndarray]],
        nodes: Mapping[str, Node],
    ) -> None:
        """Args:
        folder: the adapter's folder, for messages.
        settings: the file's settings of each weight, by path.
        arrays: the arrays that the file holds, by path and name.
        nodes: the nodes of the tree that the adapter is loaded onto, whose factors are taken where
          they fit.
        """
        self._folder, self._settings, self._arrays, self._nodes = folder, settings, arrays, nodes
        self._again = dict[Derived, Remake]()
        self._held = dict[tuple[str, str], jax.Array]()

    def __call__(self, path: str, weight: LoraWeight) -> LoraWeight:
        """Returns a weight with all of its arrays."""
        derived, settings = derived_of(weight), self._settings[path]
        if derived is None:
            return weight
        if "same" in settings:
            where = {name: settings["same"].get(name, path) for name in derived.names}
            return weight.replace(**{n: self._read(where[n], n, weight) for n in derived.names})
        recipe = settings[derived.entry]
        if derived not in self._again:
            self._again[derived] = derived.again(self._nodes)
        weight = weight.replace(**self._again[derived](path, weight, recipe))
        if is_abstract(weight.arrays[derived.names[0]]):
            return weight
        if wrong := _differing(weight, recipe.get("probes", recipe)):
            why = derived.differs.format(path=path, name=wrong[0], **recipe)
            raise AdapterError(f"the adapter {self._folder} {why}")
        return weight

    def _read(self, path: str, name: str, weight: LoraWeight) -> jax.Array:
        if (path, name) not in self._held:
            own = weight.arrays.get(name)
            array = self._arrays[path][name] if own is None else own
            self._held[path, name] = jax.device_put(array)
        return self._held[path, name]


def _sums_of(node: LoraWeight, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums of a factor, or of a projection, and its norms; see `_sums`."""
    n_batch = node.n_batch if "batch" in node.axes_of(name) else 0
    sums, norms = jax.device_get(_sums(node.arrays[name], n_batch))
    return sums, norms


def _probes(node: LoraWeight, names: Sequence[str]) -> JsonObject:
    """Returns for each factor the sums of its elements times random numbers, as nested lists."""
    rounded = np.vectorize(lambda value: float(f"{value:.7g}"), otypes=[float])
    return {name: rounded(_sums_of(node, name)[0]).tolist() for name in names}


def _differing(node: LoraWeight, probes: Fields) -> list[str]:
    """Returns the names of the factors that have other probes, rounding aside."""

    def differs(name: str) -> bool:
        sums, norms = _sums_of(node, name)
        return bool((np.abs(sums - np.asarray(probes[name])) > _TOLERANCE * norms).any())

    return [name for name in probes if differs(name)]


@functools.partial(jax.jit, static_argnames="n_batch")
def _sums(array: jax.Array, n_batch: int) -> tuple[jax.Array, jax.Array]:
    """Returns sums of the elements of matrices times fixed numbers, and norms: [batch…] fp32.

    Args:
      array: [batch…, r, features…].
      n_batch: number of its batch axes.
    """
    matrix = array.reshape(*array.shape[: n_batch + 1], -1).astype(jnp.float32)
    row, column = (lax.broadcasted_iota(jnp.uint32, matrix.shape[-2:], axis) for axis in (0, 1))
    bits = mixed(mixed(row + jnp.uint32(1)) + column)
    probe = bits.astype(jnp.float32) / 2.0**31 - 1  # in [-1, 1]
    return jnp.sum(matrix * probe, axis=(-2, -1)), jnp.linalg.norm(matrix, axis=(-2, -1))
