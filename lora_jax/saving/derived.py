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

ArraysByPath = dict[str, dict[str, Leaf]]  # and by name


def take_out_derived(nodes: Mapping[str, Node], arrays: ArraysByPath) -> dict[str, JsonObject]:
    """Takes out of `arrays` what is made again on loading; returns the settings to make it with.

    Args:
      nodes: the nodes of an adapted tree, by path.
      arrays: their arrays as the file would hold them; changed.
    """
    weights_of_derived: dict[Derived, dict[str, LoraWeight]] = defaultdict(dict)
    for path, node in nodes.items():
        if isinstance(node, LoraWeight):
            derived = derived_of(node)
            if derived is not None:
                weights_of_derived[derived][path] = node
    settings: dict[str, JsonObject] = {}
    for derived, weights in weights_of_derived.items():
        all_weights = list(weights.values())
        remake = derived.again(weights)
        path_of_checksum: dict[str, str] = {}
        for path, weight in weights.items():
            recipe = derived.recipe(weight, all_weights)
            probes = _probes(weight, derived.names)
            follows_from_recipe = False
            if recipe is not None:
                remade_weight = weight.replace(**remake(path, weight, recipe))
                follows_from_recipe = not _differing(remade_weight, probes)
            if recipe is not None and follows_from_recipe:
                entry = {**recipe, "probes": probes} if recipe else probes
                settings[path] = {derived.entry: entry}
                remade_names = derived.names
            else:
                stored_paths = _stored_paths(path, weight, derived, path_of_checksum)
                settings[path] = {"same": stored_paths}
                remade_names = tuple(stored_paths)
            for name in ("seed", *remade_names):
                arrays[path].pop(name, None)
    return settings


def _stored_paths(
    path: str, weight: LoraWeight, derived: Derived, path_of_checksum: dict[str, str]
) -> dict[str, str]:
    """Returns the path under which the file holds each array that an earlier weight has as well.

    Args:
      path: the weight's path.
      weight: the weight, whose arrays follow from no recipe.
      derived: the declaration of these arrays.
      path_of_checksum: the path of each array that the file holds; those of this weight are added.
    """
    checksums = {name: checksum(weight.arrays[name]) for name in derived.names}
    stored_paths = {}
    for name, array_checksum in checksums.items():
        if array_checksum in path_of_checksum:
            stored_paths[name] = path_of_checksum[array_checksum]
    for name, array_checksum in checksums.items():
        if name not in stored_paths:
            path_of_checksum[array_checksum] = path
    return stored_paths


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
        self._folder = folder
        self._settings = settings
        self._arrays = arrays
        self._nodes = nodes
        self._remake_functions: dict[Derived, Remake] = {}
        self._device_arrays: dict[tuple[str, str], jax.Array] = {}  # by path and name

    def __call__(self, path: str, weight: LoraWeight) -> LoraWeight:
        """Returns a weight with all of its arrays."""
        derived = derived_of(weight)
        if derived is None:
            return weight
        settings = self._settings[path]
        if "same" in settings:
            arrays = {}
            for name in derived.names:
                stored_path = settings["same"].get(name, path)
                arrays[name] = self._device_array(stored_path, name, weight)
            return weight.replace(**arrays)
        recipe = settings[derived.entry]
        if derived not in self._remake_functions:
            self._remake_functions[derived] = derived.again(self._nodes)
        remake = self._remake_functions[derived]
        weight = weight.replace(**remake(path, weight, recipe))
        if is_abstract(weight.arrays[derived.names[0]]):
            return weight
        changed_names = _differing(weight, recipe.get("probes", recipe))
        if changed_names:
            problem = derived.differs.format(path=path, name=changed_names[0], **recipe)
            raise AdapterError(f"the adapter {self._folder} {problem}")
        return weight

    def _device_array(self, path: str, name: str, weight: LoraWeight) -> jax.Array:
        """Returns an array of the file on the device, one for all weights that share it."""
        if (path, name) not in self._device_arrays:
            array: Leaf = weight.arrays.get(name)
            if array is None:
                array = self._arrays[path][name]
            self._device_arrays[path, name] = jax.device_put(array)
        return self._device_arrays[path, name]


def _sums_of(node: LoraWeight, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the sums of a factor, or of a projection, and its norms; see `_sums`."""
    n_batch = node.n_batch if "batch" in node.axes_of(name) else 0
    sums, norms = jax.device_get(_sums(node.arrays[name], n_batch))
    return sums, norms


def _probes(node: LoraWeight, names: Sequence[str]) -> JsonObject:
    """Returns for each factor the sums of its elements times random numbers, as nested lists."""
    round_sums = np.vectorize(lambda value: float(f"{value:.7g}"), otypes=[float])
    probes = {}
    for name in names:
        sums, _ = _sums_of(node, name)
        probes[name] = round_sums(sums).tolist()
    return probes


def _differing(node: LoraWeight, probes: Fields) -> list[str]:
    """Returns the names of the factors that have other probes, rounding aside."""

    def differs(name: str) -> bool:
        sums, norms = _sums_of(node, name)
        errors = np.abs(sums - np.asarray(probes[name]))
        return bool((errors > _TOLERANCE * norms).any())

    return [name for name in probes if differs(name)]


@functools.partial(jax.jit, static_argnames="n_batch")
def _sums(array: jax.Array, n_batch: int) -> tuple[jax.Array, jax.Array]:
    """Returns sums of the elements of matrices times fixed numbers, and norms: [batch…] fp32.

    Args:
      array: [batch…, r, features…].
      n_batch: number of its batch axes.
    """
    matrix = array.reshape(*array.shape[: n_batch + 1], -1).astype(jnp.float32)
    row = lax.broadcasted_iota(jnp.uint32, matrix.shape[-2:], 0)
    column = lax.broadcasted_iota(jnp.uint32, matrix.shape[-2:], 1)
    bits = mixed(mixed(row + jnp.uint32(1)) + column)
    probe = bits.astype(jnp.float32) / 2.0**31 - 1  # in [-1, 1]
    sums = jnp.sum(matrix * probe, axis=(-2, -1))
    norms = jnp.linalg.norm(matrix, axis=(-2, -1))
    return sums, norms
