"""Reads a PEFT adapter's folder, local or on the hub, as an adapted tree.

A module is one Hugging Face module that the adapter adapts. Its weight is one layer of a leaf, or
the whole leaf. A row of the model's key table maps the names of modules to a leaf.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.buckets.copies import path_to_read
from lora_jax.core.base import as_array, is_abstract
from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.types import BaseLike, Fields, Leaf, Model, Tree
from lora_jax.core.weight import LoraWeight, Trained, TrainedRows, leaves_of, map_leaves
from lora_jax.hf.folder import describe_damage
from lora_jax.hf.hub import ModelNotFound, find_snapshot
from lora_jax.hf.keys import Row, reorder_axes
from lora_jax.hf.sources import FLOAT_DTYPES
from lora_jax.lorafy import lorafy, nodes_of
from lora_jax.peft import config as configuration
from lora_jax.peft.copies import drop_repeated_tensors
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import Expert, keys_of_expert, unpack_expert_a, unpack_expert_b
from lora_jax.peft.forms import FORMS, FileAdapter
from lora_jax.peft.modules import (
    Module,
    kind_of,
    locate_tensors,
    rank_and_alpha,
    tables_by_names,
    ties_tables,
)
from lora_jax.peft.names import KEY_PREFIX, WEIGHTS_FILE, bias_key, keys_of, token_key
from lora_jax.peft.patterns import limit_matches
from lora_jax.peft.rules import (
    make_rules,
    select_modules_of_model,
    takes_from_base,
    tensors_of_saved_modules,
    token_rows,
)
from lora_jax.select.sharing import fill_in_shared_arrays

_ADAPTER_FILES = ["*adapter_config.json", "*adapter_model.safetensors", "*chat_template.jinja"]


def load(
    folder: str | os.PathLike[str], model: Model, params: Tree, *, adapter: str | None = None
) -> Tree:
    """Loads an adapter that PEFT wrote, as an adapted tree with the same logits.

    PEFT also saves the base of an adapted table. If the saved base differs from `params`, the tree
    gets the saved base, as in PEFT.

    Args:
      folder: a local folder (adapter_config.json, adapter_model.safetensors), or a hub name.
      model: the model of `lora_jax.models` that `params` belong to; for another tree its key
        table, a list of `lora_jax.models.Row`.
      params: the plain tree of the base. `jax.ShapeDtypeStruct` leaves are enough to check that the
        adapter fits, before the base's weights are read.
      adapter: the subfolder of one adapter, if the folder holds several.

    Returns:
      The adapted tree: for `lora_jax.adapt`, `split`, `merge`, `save_adapter` and so on.

    Raises:
      PeftError: names the file and the key, for a tensor that is missing, left over, misshaped or
        of another dtype; for a configuration that is not supported; if nothing matches.

    See the example of `lora_jax.peft.save`.
    """
    source = find_adapter_folder(folder, adapter)
    config = configuration.read_config(source / configuration.CONFIG_FILE)
    tensors = read_tensors(source / WEIGHTS_FILE)
    tensors_path = str(source / WEIGHTS_FILE)
    table = _table_for_keys(tensors, model)
    _check_plain_tree(params, table)
    # Files of transformers 4 have a module for each expert, under its number.
    has_experts = any(re.search(r"\.experts\.\d+\.", name) for name in tensors)
    try:
        with limit_matches():
            tied_rows = [row for row in table if row.aliases] if ties_tables(config) else []
            all_modules, adapted_modules = select_modules_of_model(
                config, table, model, experts=has_experts
            )
            rules = make_rules(config, table, all_modules, adapted_modules)
        unique_tensors = drop_repeated_tensors(tensors, tied_rows, tensors_path)
        reader = _TensorReader(tensors_path, unique_tensors)
        params = _replace_bases(params, adapted_modules, table, config, reader)
        tree = lorafy(_shapes_of_tree(params), rules)
        if takes_from_base(config) and not any(map(is_abstract, jax.tree.leaves(params))):
            tree = lorafy(params, rules)
    except ValueError as error:
        raise PeftError(f"{source / configuration.CONFIG_FILE}: {error}") from None
    form = FORMS.get(config[configuration.KIND_KEY])
    file_adapter = None
    if form is not None:
        nodes = [node for node in nodes_of(tree).values() if isinstance(node, LoraWeight)]
        file_adapter = form.read_file(
            reader, config[configuration.KIND_FIELDS_KEY], nodes, adapted_modules
        )
    node_reader = _NodeReader(
        reader=reader,
        table=table,
        config=config,
        adapted_modules=adapted_modules,
        all_modules=all_modules,
        file_adapter=file_adapter,
    )
    bases = dict(leaves_of(params)[0])
    loaded = map_leaves(lambda path, leaf: node_reader.read(path, leaf, bases[path]), tree)
    loaded = fill_in_shared_arrays(loaded)
    reader.raise_problems()
    return loaded


def _table_for_keys(keys: Iterable[str], model: Model) -> Sequence[Row]:
    """Returns the key table whose names match a file's keys; see `tables_by_names`."""
    newest, *older = tables_by_names(model)
    file_modules = {_module_of_key(key) for key in keys}
    for table in older:
        old_names = locate_tensors(table).keys() - locate_tensors(newest)
        if file_modules & {name.removesuffix(".weight") for name in old_names}:
            return table
    return newest


def _module_of_key(key: str) -> str:
    """Returns the name of the module that a key of a file belongs to."""
    return re.split(r"\.(?:lora_|base_layer)", key.removeprefix(KEY_PREFIX))[0]


def _shapes_of_tree(params: Tree) -> Tree:
    """Returns the shapes and dtypes of a tree."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def _check_plain_tree(params: Tree, table: Sequence[Row]) -> None:
    """Raises a PeftError if a tree is adapted, or its shapes differ from the table."""
    if nodes_of(params):
        raise PeftError("The tree is already adapted. Pass the plain tree, lora_jax.strip(params).")
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves_of(params)[0]}
    paths = [row.path for row in table if shapes.get(row.path) != row.stacked_shape]
    if paths:
        raise PeftError(
            f"The tree does not fit the model. It has {shapes.get(paths[0], 'nothing')} at "
            f"{paths[0]!r}, and {len(paths) - 1} more differences. Pass the model's parameters."
        )


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of an adapter_model.safetensors.

    Args:
      path: the file.

    Returns:
      Key -> array.

    Raises:
      PeftError: if the file is missing, damaged or cut short, or holds other dtypes than floats.
    """
    tensors: dict[str, np.ndarray] = {}
    with _open_weights(path) as file:
        for name in file.keys():
            dtype = file.get_slice(name).get_dtype()
            if dtype not in FLOAT_DTYPES:
                raise PeftError(
                    f"{path}: {name} has the dtype {dtype}, but an adapter's weights are floats. "
                    "Save the adapter again."
                )
            tensors[name] = file.get_tensor(name)
    return tensors


def read_tensor_names(path: Path) -> list[str]:
    """Reads the tensor names of an adapter_model.safetensors.

    Args:
      path: the file.

    Raises:
      PeftError: if the file is missing, damaged or cut short.
    """
    with _open_weights(path) as file:
        return [*file.keys()]


@contextmanager
def _open_weights(path: Path) -> Iterator[Any]:
    """Opens an adapter_model.safetensors; converts read errors to PeftErrors."""
    if path.is_dir():
        raise PeftError(describe_damage(path, "it is a folder"))
    if not path.is_file():
        similar_files = sorted(file.name for file in path.parent.glob("adapter_model*"))
        hint = " Copy it into the folder."
        if similar_files:
            hint = f" The folder holds {similar_files[0]}, but only safetensors are read."
        raise PeftError(f"{path} is missing.{hint}")
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except PeftError:
        raise
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise PeftError(describe_damage(path, error)) from None


class _TensorReader:
    """Returns the tensors of a file, and collects problems with them.

    Args:
      path: the file, for messages.
      tensors: the tensors by key.
    """

    def __init__(self, path: str, tensors: Mapping[str, np.ndarray]) -> None:
        self._path = path
        self._tensors = tensors
        self._taken: set[str] = set()
        self._problems: list[str] = []

    def has(self, key: str) -> bool:
        """Returns True if the file has the key."""
        return key in self._tensors

    def take(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a tensor; zeros if it is missing or has a wrong shape (see `raise_problems`)."""
        self._taken.add(key)
        tensor = self._tensors.get(key)
        if tensor is not None and tensor.shape == shape:
            return tensor
        if tensor is None:
            self._problems.append(f"missing {key} {list(shape)}")
        else:
            self._problems.append(f"{key} is {list(tensor.shape)}, expected {list(shape)}")
        return np.broadcast_to(np.float32(0), shape)  # no memory, however absurd the shape

    @property
    def is_complete(self) -> bool:
        """True if no requested tensor was missing."""
        return not self._problems

    def raise_problems(self) -> None:
        """Raises one PeftError for all missing, misshaped or unused tensors."""
        unexpected_keys = [key for key in self._tensors if key not in self._taken]
        convolution_keys = [key for key in unexpected_keys if self._tensors[key].ndim > 2]
        if convolution_keys:
            name = _module_of_key(convolution_keys[0])
            raise PeftError(
                f"{self._path} has an adapter of the convolution {name}, and adapters of "
                "convolutions are not read. Train it in PEFT with target_modules that leave "
                "convolutions out, or merge it there (merge_and_unload) and load the merged model."
            )
        problems = [*self._problems, *(f"unexpected {key}" for key in unexpected_keys)]
        if problems:
            raise PeftError(
                f"{self._path} does not fit its configuration and the model: "
                f"{len(problems)} tensors\n  " + "\n  ".join(problems[:20])
            )


def _replace_bases(
    params: Tree,
    adapted_modules: Sequence[Module],
    table: Sequence[Row],
    config: Fields,
    reader: _TensorReader,
) -> Tree:
    """Returns the tree with the base weights that the file contains.

    PEFT writes the base of adapted tables. It also writes embeddings and heads on request, or if
    the vocabulary was resized.
    """
    leaf_by_path = dict(leaves_of(params)[0])
    sources = [
        _BaseSource(
            key=keys_of(module).base_weight,
            path=module.path,
            stack_index=module.index,
            is_transposed=not module.is_table,
        )
        for module in adapted_modules
        if not isinstance(module, Expert)
    ]
    # Embeddings and heads that are not adapted have keys of their own.
    for row in table:
        if kind_of(row) not in ("embedding", "head") or row.stack:
            continue
        for name in (row.hf, *row.aliases):
            if name.endswith(".weight") and not tensors_of_saved_modules(config, [name]):
                key = f"{KEY_PREFIX}{name}"
                sources.append(
                    _BaseSource(key=key, path=row.path, stack_index=(), is_transposed=row.transpose)
                )
    # Only a leaf that differs from the file's weight is replaced.
    for source in sources:
        if not reader.has(source.key):
            continue
        leaf = as_array(leaf_by_path[source.path])
        index = source.stack_index
        shape = leaf.shape[len(index) :]
        tensor = reader.take(source.key, tuple(shape[::-1] if source.is_transposed else shape))
        if is_abstract(leaf):
            continue
        value = (tensor.T if source.is_transposed else tensor).astype(leaf.dtype)
        if not np.array_equal(value, leaf[index] if index else leaf, equal_nan=True):
            changed_leaf = leaf.at[index].set(value) if index else jax.device_put(value)
            leaf_by_path[source.path] = changed_leaf
    return map_leaves(lambda path, _: leaf_by_path[path], params)


class _BaseSource(NamedTuple):
    """A key under which a file may store a base weight, and the path of its leaf.

    Attributes:
      key: the key of the tensor.
      path: path of the leaf.
      stack_index: index of the weight in the leaf's stack; empty for the whole leaf.
      is_transposed: whether the file has the transpose.
    """

    key: str
    path: str
    stack_index: tuple[int, ...]
    is_transposed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _NodeReader:
    """Reads the nodes of a tree from the file's tensors.

    Attributes:
      reader: the tensors.
      table: key table of the model.
      config: fields of the configuration.
      chosen: the modules that the adapter adapts.
      available: the modules that it could adapt.
      file_adapter: the content of the file, for kinds other than LORA.
    """

    reader: _TensorReader
    table: Sequence[Row]
    config: Fields
    adapted_modules: Sequence[Module]
    all_modules: Sequence[Module]
    file_adapter: FileAdapter | None

    def read(self, path: str, leaf: Leaf, base: BaseLike) -> Leaf:
        """Returns the leaf at a path: a node filled from the file, or the base."""
        if isinstance(leaf, LoraWeight):
            return self._read_weight(path, leaf.replace(base=base))
        if isinstance(leaf, TrainedRows):
            return self._read_rows(path, leaf.replace(base=base))
        if isinstance(leaf, Trained):
            return self._read_trained_leaf(path, base)
        return base

    def _read_weight(self, path: str, node: LoraWeight) -> LoraWeight:
        """Returns an adapted weight with the factors of all its modules, stacked.

        If a tensor is missing, the node stays as it is, and `_Reader.finish` raises the error.
        """
        batch, in_sizes, out_sizes = (
            node.roles.sizes(node.shape, role) for role in ("batch", "in", "out")
        )
        modules = [module for module in self.adapted_modules if module.path == path]
        # A kind of adapter beside LoRA reads its own tensors.
        if self.file_adapter is not None:
            scale = self._scale_of_layers(path, batch)
            return node.replace(scale=scale, **self.file_adapter.arrays(node, modules))
        fans = {"a": math.prod(in_sizes), "b": math.prod(out_sizes)}
        arrays_of_modules = [
            self._read_arrays(module, node, fans["a"], fans["b"]) for module in modules
        ]
        if not self.reader.is_complete:
            return node
        # Factors are [batch, r, in] and [batch, r, out], with zeros for layers without an adapter.
        dtype = np.dtype(accumulation_dtype(node.dtype))
        factors = {name: np.zeros((*batch, node.rank, fan), dtype) for name, fan in fans.items()}
        # No product reads the magnitude of a layer that is not adapted.
        vectors = {name: np.ones((*batch, fans["b"]), dtype) for name in node.has}
        for module, arrays in zip(modules, arrays_of_modules, strict=True):
            # The head of a table with an adapter for each use has the second half of the ranks.
            is_head = node.uses == "each" and module.uses == "product"
            start = node.rank // 2 if is_head else 0
            for name, array in arrays.items():
                if name in vectors:
                    vectors[name][module.index] = array
                else:
                    stop = start + array.shape[-2]
                    factors[name][module.index][..., start:stop, :] = array
        changes = {name: vector.reshape(*batch, *out_sizes) for name, vector in vectors.items()}
        changes["a"] = factors["a"].reshape(*batch, node.rank, *in_sizes)
        changes["b"] = factors["b"].reshape(*batch, node.rank, *out_sizes)
        scale = node.scale
        if isinstance(scale, jax.ShapeDtypeStruct):
            scale = self._scale_of_layers(path, batch)
        if self.config["init_lora_weights"] == "mica" and node.uses == "all":
            node = node.replace(frozen=("b",))  # as in PEFT, if it trains on
        # jnp.asarray would compile a program for each shape.
        return node.replace(scale=scale, **jax.device_put(changes))

    def _read_arrays(
        self, module: Module, node: LoraWeight, fan_in: int, fan_out: int
    ) -> dict[str, np.ndarray]:
        """Reads A [r, in], B [r, out] and the vectors of one member of the stack."""
        layer = module.index[0] if module.index and len(node.ranks) > 1 else 0
        rank = node.ranks[layer] // (2 if node.uses == "each" else 1)
        keys = keys_of(module)
        if isinstance(module, Expert):
            key_a, key_b = keys_of_expert(module, self.adapted_modules)
            packed_out = fan_out * (1 if module.half is None else 2)
            a = self.reader.take(key_a, (rank * module.n_experts, fan_in))
            b = self.reader.take(key_b, (packed_out, rank * module.n_experts))
            return {
                "a": unpack_expert_a(a, module.n_experts),
                "b": unpack_expert_b(b, module.n_experts, module.half),
            }
        if module.uses == "product":  # a head: its input is the table's output
            a = self.reader.take(keys.b, (fan_in, rank)).T
            b = self.reader.take(keys.a, (rank, fan_out))
        else:
            a = self.reader.take(keys.a, (rank, fan_in))
            b = self.reader.take(keys.b, (fan_out, rank)).T
        vectors = {name: self.reader.take(keys.vectors[name], (fan_out,)) for name in node.has}
        return {"a": a, "b": b, **vectors}

    def _scale_of_layers(self, path: str, batch: tuple[int, ...]) -> jax.Array:
        """Computes s of each layer, as PEFT does."""
        scale = np.zeros(batch, np.float32)
        for module in self.adapted_modules:
            if module.path == path:
                rank, alpha = rank_and_alpha(self.config, module.name_for_patterns)
                scale[module.index] = alpha / (rank**0.5 if self.config["use_rslora"] else rank)
        placed: jax.Array = jax.device_put(scale)
        return placed

    def _read_rows(self, path: str, node: TrainedRows) -> TrainedRows:
        """Returns a node with trained rows: tokens of a table, or layers of a stack."""
        if node.is_table:
            shape = (len(node.rows), *node.shape[1:])
            modules = [module for module in self.all_modules if module.path == path]
            name = next(module.name for module in modules if module.is_embedding)
            tokens = token_rows(self.config, self.all_modules)[name]
            value = self.reader.take(token_key(name), shape)
            value = value[[tokens.index(row) for row in node.rows]]
        else:
            layer_names = self._row_of_path(path).hf_names
            value = np.stack([self._read_tensor(layer_names[layer]) for layer in node.rows])
        return node.replace(value=jax.device_put(value.astype(accumulation_dtype(node.dtype))))

    def _read_trained_leaf(self, path: str, base: BaseLike) -> Trained:
        """Returns a fully trained leaf with the file's value."""
        row = self._row_of_path(path)
        arrays = [self._read_tensor(name) for name in row.hf_names]
        value = np.stack(arrays).reshape(row.stacked_shape) if row.stack else arrays[0]
        return Trained(jax.device_put(value.astype(base.dtype)))

    def _row_of_path(self, path: str) -> Row:
        return next(row for row in self.table if row.path == path)

    def _read_tensor(self, name: str) -> np.ndarray:
        """Reads a saved module's tensor or a trained bias, in our layout."""
        row, _ = locate_tensors(self.table)[name]
        is_saved = tensors_of_saved_modules(self.config, [name])
        module_names = [module.name for module in self.adapted_modules]
        key = f"{KEY_PREFIX}{name}" if is_saved else bias_key(name, module_names)
        tensor = self.reader.take(key, row.hf_shape)
        return reorder_axes(row, tensor)


def find_adapter_folder(folder: str | os.PathLike[str], adapter: str | None) -> Path:
    """Finds the folder that contains adapter_config.json.

    PEFT writes an adapter with another name than "default" into a subfolder of that name.

    Args:
      folder: a local folder, one in a bucket (gs://), or a hub name.
      adapter: the adapter's name, if the folder holds several.

    Raises:
      PeftError: there is no adapter, or there are several and `adapter` is None.
    """
    path = path_to_read(folder, _is_adapter_file).expanduser()
    if not path.exists():
        name = str(folder)
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise PeftError(
                f"{name} is neither a folder on this machine nor a hub name (owner/name). Check "
                "the path."
            )
        try:
            path = find_snapshot(name, _ADAPTER_FILES)
        except ModelNotFound as error:
            raise PeftError(str(error)) from None
    if not path.is_dir():
        raise PeftError(
            f"{path} is not a folder. Name the folder of the PEFT adapter, which holds "
            f"{configuration.CONFIG_FILE}."
        )
    if adapter is not None and adapter != "default":
        path = path / adapter
    if (path / configuration.CONFIG_FILE).is_file():
        return path
    adapters = sorted(file.parent.name for file in path.glob(f"*/{configuration.CONFIG_FILE}"))
    if adapters:
        raise PeftError(
            f"{path} holds several adapters: {', '.join(adapters)}. Choose one with adapter=…"
        )
    raise PeftError(
        f"{path} is not the folder of a PEFT adapter: {configuration.CONFIG_FILE} is missing. "
        "Check the path."
    )


def _is_adapter_file(file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in _ADAPTER_FILES)
