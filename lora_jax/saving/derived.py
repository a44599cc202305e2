"""Omits factors that derive from the base or a seed from an adapter's file, and recomputes them.

Loading computes them again, as the variant declares (`lora_jax.variants.variant.Derived`). In
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
from lora_jax.saving.fingerprint import checksum, mix_bits
from lora_jax.variants import derived_of
from lora_jax.variants.variant import Derived, Remake

_TOLERANCE = 5e-3  # of a factor's norm; another sign of one singular vector changes much more

ArraysByPath = dict[str, dict[str, Leaf]]  # and by name


def remove_derived_arrays(nodes: Mapping[str, Node], arrays: ArraysByPath) -> dict[str, JsonObject]:
    """Removes arrays that loading can recompute from `arrays`; returns their settings.

    Args:
      nodes: the nodes of an adapted tree, by path.
      arrays: the arrays of the nodes in the form of the file; changed.
    """
    # Group the weights by the declaration of their derived arrays.
    weights_of_derived: dict[Derived, dict[str, LoraWeight]] = defaultdict(dict)
    for path, node in nodes.items():
        if isinstance(node, LoraWeight):
            derived = derived_of(node)
            if derived is not None:
                weights_of_derived[derived][path] = node
    settings: dict[str, JsonObject] = {}
    for derived, weights in weights_of_derived.items():
        all_weights = list(weights.values())
        compute_arrays = derived.remake_function(weights)
        path_of_checksum: dict[str, str] = {}
        for path, weight in weights.items():
            # Compute the arrays from their recipe, and compare the result with the weight.
            recipe = derived.recipe(weight, all_weights)
            probes = _make_probes(weight, derived.names)
            follows_from_recipe = False
            if recipe is not None:
                computed_weight = weight.replace(**compute_arrays(path, weight, recipe))
                follows_from_recipe = not _names_of_changed_factors(computed_weight, probes)
            if recipe is not None and follows_from_recipe:
                # The file holds the recipe and the probes, and none of the arrays.
                entry = {**recipe, "probes": probes} if recipe else probes
                settings[path] = {derived.recipe_entry: entry}
                removed_names = derived.names
            else:
                # The file holds each array once, under the first weight that has it.
                stored_paths = _paths_of_equal_arrays(path, weight, derived, path_of_checksum)
                settings[path] = {"same": stored_paths}
                removed_names = tuple(stored_paths)
            for name in ("seed", *removed_names):
                arrays[path].pop(name, None)
    return settings


def _paths_of_equal_arrays(
    path: str, weight: LoraWeight, derived: Derived, path_of_checksum: dict[str, str]
) -> dict[str, str]:
    """Returns the path of the earlier weight with the same array, for each array.

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
    """Recomputes the arrays that an adapter's file omits, and checks them by stored probes."""

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
        if derived is None:  # the file holds all arrays of the weight
            return weight
        settings = self._settings[path]
        if "same" in settings:
            # The file holds the arrays, perhaps under the path of another weight.
            arrays = {}
            for name in derived.names:
                stored_path = settings["same"].get(name, path)
                arrays[name] = self._device_array(stored_path, name, weight)
            return weight.replace(**arrays)
        # The arrays follow from a recipe.
        recipe = settings[derived.recipe_entry]
        if derived not in self._remake_functions:
            self._remake_functions[derived] = derived.remake_function(self._nodes)
        remake = self._remake_functions[derived]
        weight = weight.replace(**remake(path, weight, recipe))
        if is_abstract(weight.arrays[derived.names[0]]):  # shapes alone, without values to compare
            return weight
        changed_names = _names_of_changed_factors(weight, recipe.get("probes", recipe))
        if changed_names:
            problem = derived.difference_message.format(path=path, name=changed_names[0], **recipe)
            raise AdapterError(f"the adapter {self._folder} {problem}")
        return weight

    def _device_array(self, path: str, name: str, weight: LoraWeight) -> jax.Array:
        """Returns a stored array on the device, shared by all weights that use it."""
        if (path, name) not in self._device_arrays:
            array: Leaf = weight.arrays.get(name)
            if array is None:
                array = self._arrays[path][name]
            self._device_arrays[path, name] = jax.device_put(array)
        return self._device_arrays[path, name]


def _probe_sums_and_norms(node: LoraWeight, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the probe sums and norms of a weight's array; see `_sums_and_norms`."""
    n_batch = node.n_batch if "batch" in node.axes_of(name) else 0
    sums, norms = jax.device_get(_sums_and_norms(node.arrays[name], n_batch))
    return sums, norms


def _make_probes(node: LoraWeight, names: Sequence[str]) -> JsonObject:
    """Returns random weighted sums of each factor's elements, as nested lists."""
    round_sums = np.vectorize(lambda value: float(f"{value:.7g}"), otypes=[float])
    probes = {}
    for name in names:
        sums, _ = _probe_sums_and_norms(node, name)
        probes[name] = round_sums(sums).tolist()
    return probes


def _names_of_changed_factors(node: LoraWeight, probes: Fields) -> list[str]:
    """Returns the factors whose probes differ by more than rounding errors."""

    def differs(name: str) -> bool:
        sums, norms = _probe_sums_and_norms(node, name)
        errors = np.abs(sums - np.asarray(probes[name]))
        return bool((errors > _TOLERANCE * norms).any())

    return [name for name in probes if differs(name)]


@functools.partial(jax.jit, static_argnames="n_batch")
def _sums_and_norms(array: jax.Array, n_batch: int) -> tuple[jax.Array, jax.Array]:
    """Returns a fixed weighted sum of each matrix's elements, and its norm: [batch…] fp32.

    Args:
      array: [batch…, r, features…].
      n_batch: number of its batch axes.
    """
    matrix = array.reshape(*array.shape[: n_batch + 1], -1).astype(jnp.float32)  # [batch…, r, n]
    row = lax.broadcasted_iota(jnp.uint32, matrix.shape[-2:], 0)
    column = lax.broadcasted_iota(jnp.uint32, matrix.shape[-2:], 1)
    bits = mix_bits(mix_bits(row + jnp.uint32(1)) + column)
    probe = bits.astype(jnp.float32) / 2.0**31 - 1  # [r, n], numbers in [-1, 1]
    sums = jnp.sum(matrix * probe, axis=(-2, -1))
    norms = jnp.linalg.norm(matrix, axis=(-2, -1))
    return sums, norms
