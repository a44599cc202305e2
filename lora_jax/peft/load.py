"""Reads a PEFT adapter's folder, local or on the hub, as an adapted tree."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.buckets.copies import readable
from lora_jax.core.base import as_array, is_abstract
from lora_jax.core.magnitude import wide
from lora_jax.core.types import BaseLike, Fields, Leaf, Model, Tree
from lora_jax.core.weight import LoraWeight, Trained, TrainedRows, leaves_of, map_leaves
from lora_jax.hf.folder import damage_message
from lora_jax.hf.hub import ModelNotFound, snapshot
from lora_jax.hf.keys import Row
from lora_jax.hf.sources import FLOATS
from lora_jax.lorafy import lorafy, nodes_of
from lora_jax.peft import config as configuration
from lora_jax.peft.copies import drop_copies
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import Expert, keys_of_expert, unpack_a, unpack_b
from lora_jax.peft.forms import FORMS, FileAdapter
from lora_jax.peft.modules import Module, is_tied, kind_of, places, rank_and_alpha, tables_of
from lora_jax.peft.names import FILE, PREFIX, bias_key, keys_of, token_key
from lora_jax.peft.rules import rules_for, saved_modules, selected, takes_from_base, token_rows
from lora_jax.select.sharing import with_shared

_ADAPTER_FILES = ["*adapter_config.json", "*adapter_model.safetensors", "*chat_template.jinja"]


def load(
    folder: str | os.PathLike[str], model: Model, params: Tree, *, adapter: str | None = None
) -> Tree:
    """Loads an adapter that PEFT wrote: the adapted tree gives PEFT's logits.

    PEFT saves the base of an adapted table too. Where it differs from `params`, the tree gets the
    file's, as in PEFT.

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
    source = adapter_folder(folder, adapter)
    config = configuration.read_config(source / configuration.FILE)
    tensors = read_tensors(source / FILE)
    where = str(source / FILE)
    table = _table_for(tensors, model)
    _check_tree(params, table)
    experts = any(re.search(r"\.experts\.\d+\.", name) for name in tensors)
    tied = [row for row in table if row.aliases] if is_tied(config) else []
    reader = _Reader(where, drop_copies(tensors, tied, where))
    try:
        available, chosen = selected(config, table, model, experts=experts)
        rules = rules_for(config, table, available, chosen)
        params = _read_bases(params, chosen, table, config, reader)
        tree = lorafy(_abstract(params), rules)
        if takes_from_base(config) and not any(map(is_abstract, jax.tree.leaves(params))):
            tree = lorafy(params, rules)
    except ValueError as error:
        raise PeftError(f"{source / configuration.FILE}: {error}") from None
    own = None
    if (form := FORMS.get(config[configuration.KIND])) is not None:
        nodes = [node for node in nodes_of(tree).values() if isinstance(node, LoraWeight)]
        own = form.read_file(reader, config[configuration.OWN], nodes, chosen)
    files = _Files(reader, table, config, chosen, available, own)
    bases = dict(leaves_of(params)[0])
    loaded = with_shared(map_leaves(lambda path, leaf: files.node(path, leaf, bases[path]), tree))
    reader.finish()
    return loaded


def _table_for(tensors: Iterable[str], model: Model) -> Sequence[Row]:
    """Returns the model's key table by the names that a file has; see `tables_of`."""
    newer, *older = tables_of(model)
    files = {re.split(r"\.(?:lora_|base_layer)", key.removeprefix(PREFIX))[0] for key in tensors}
    for table in older:
        names = {name.removesuffix(".weight") for name in places(table).keys() - places(newer)}
        if files & names:
            return table
    return newer


def _abstract(params: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)


def _check_tree(params: Tree, table: Sequence[Row]) -> None:
    if nodes_of(params):
        raise PeftError("the tree is adapted already: give the plain one, lora_jax.strip(params)")
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves_of(params)[0]}
    wrong = [row.path for row in table if shapes.get(row.path) != row.stacked_shape]
    if wrong:
        raise PeftError(
            f"the tree does not fit the model: it has {shapes.get(wrong[0], 'nothing')} at "
            f"{wrong[0]!r} (and {len(wrong) - 1} more)"
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
    with _opened(path) as file:
        for name in file.keys():
            if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                raise PeftError(f"{path}: {name} has the dtype {kind}; weights are floats")
            tensors[name] = file.get_tensor(name)
    return tensors


def read_names(path: Path) -> list[str]:
    """Reads the names of an adapter_model.safetensors' tensors, and no tensor.

    Args:
      path: the file.

    Raises:
      PeftError: if the file is missing, damaged or cut short.
    """
    with _opened(path) as file:
        return [*file.keys()]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens an adapter_model.safetensors; errors within become PeftErrors."""
    if not path.is_file():
        others = sorted(file.name for file in path.parent.glob("adapter_model*"))
        hint = f"; there is {others[0]}, and only safetensors are read" if others else ""
        raise PeftError(f"{path} is missing{hint}")
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except PeftError:
        raise
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise PeftError(damage_message(path, error)) from None


class _Reader:
    """The file's tensors; notes which are taken, and reports those that do not fit."""

    def __init__(self, where: str, tensors: Mapping[str, np.ndarray]) -> None:
        self._where = where
        self._tensors = tensors
        self._taken: set[str] = set()
        self._problems: list[str] = []

    def has(self, key: str) -> bool:
        """Returns True if the file has the key."""
        return key in self._tensors

    def take(self, key: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a tensor, or a stand-in where it is missing or misshaped, as `finish` reports."""
        self._taken.add(key)
        tensor = self._tensors.get(key)
        if tensor is not None and tensor.shape == shape:
            return tensor
        self._problems.append(
            f"missing {key} {list(shape)}"
            if tensor is None
            else f"{key} is {list(tensor.shape)}, expected {list(shape)}"
        )
        return np.broadcast_to(np.float32(0), shape)  # no memory, however absurd the shape

    @property
    def is_whole(self) -> bool:
        """True if every tensor that was taken was there."""
        return not self._problems

    def finish(self) -> None:
        """Raises one PeftError on all tensors that are missing, misshaped or left over."""
        left = [f"unexpected {key}" for key in self._tensors if key not in self._taken]
        if problems := self._problems + left:
            raise PeftError(
                f"{self._where} does not fit its configuration and the model: "
                f"{len(problems)} tensors\n  " + "\n  ".join(problems[:20])
            )


def _read_bases(
    params: Tree, chosen: Sequence[Module], table: Sequence[Row], config: Fields, reader: _Reader
) -> Tree:
    """Returns the tree with the base weights that the file holds.

    PEFT writes them for adapted tables, and for embeddings and heads if it was told to, or found
    the vocabulary resized.
    """
    changed = dict(leaves_of(params)[0])
    bases = [
        (keys_of(module).base_weight, module.path, module.index, not module.is_table)
        for module in chosen
        if not isinstance(module, Expert)
    ]
    bases += [
        (f"{PREFIX}{name}", row.path, (), row.transpose)
        for row in table
        if kind_of(row) in ("embedding", "head") and not row.stack
        for name in (row.hf, *row.aliases)
        if name.endswith(".weight") and not saved_modules(config, [name])
    ]
    for key, path, index, transpose in bases:
        if not reader.has(key):
            continue
        leaf = as_array(changed[path])
        shape = leaf.shape[len(index) :]
        tensor = reader.take(key, tuple(shape[::-1] if transpose else shape))
        if is_abstract(leaf):
            continue
        here = leaf[index] if index else leaf
        value = (tensor.T if transpose else tensor).astype(leaf.dtype)
        if not np.array_equal(value, here, equal_nan=True):
            changed[path] = leaf.at[index].set(value) if index else jax.device_put(value)
    return map_leaves(lambda path, _: changed[path], params)


@dataclasses.dataclass(frozen=True)
class _Files:
    """The nodes of a tree, filled from the file's tensors."""

    reader: _Reader
    table: Sequence[Row]
    config: Fields
    chosen: Sequence[Module]
    available: Sequence[Module]
    own: FileAdapter | None  # of a kind other than LORA

    def node(self, path: str, leaf: Leaf, base: BaseLike) -> Leaf:
        """Returns the leaf at a path: a node filled from the file, or the base."""
        if isinstance(leaf, LoraWeight):
            return self._adapted(path, leaf.replace(base=base))
        if isinstance(leaf, TrainedRows):
            return self._rows(path, leaf.replace(base=base))
        return self._whole(path, base) if isinstance(leaf, Trained) else base

    def _adapted(self, path: str, node: LoraWeight) -> LoraWeight:
        batch, rows, columns = (
            node.roles.sizes(node.shape, role) for role in ("batch", "in", "out")
        )
        sizes = {"a": math.prod(rows), "b": math.prod(columns)}
        members = [module for module in self.chosen if module.path == path]
        if self.own is not None:
            scale = self._scale(path, batch)
            return node.replace(scale=scale, **self.own.arrays(node, members))
        factors = [(m.index, self._arrays(m, node, sizes["a"], sizes["b"])) for m in members]
        if not self.reader.is_whole:
            return node
        dtype = np.dtype(wide(node.dtype))
        out = {name: np.zeros((*batch, node.rank, n), dtype) for name, n in sizes.items()}
        # A magnitude of a layer that is not adapted is never looked at.
        vectors = {name: np.ones((*batch, sizes["b"]), dtype) for name in node.has}
        for (at, arrays), module in zip(factors, members, strict=True):
            start = node.rank // 2 if node.uses == "each" and module.uses == "product" else 0
            for name, array in arrays.items():
                if name in vectors:
                    vectors[name][at] = array
                else:
                    out[name][at][..., start : start + array.shape[-2], :] = array
        changes = {name: v.reshape(*batch, *columns) for name, v in vectors.items()}
        changes["a"] = out["a"].reshape(*batch, node.rank, *rows)
        changes["b"] = out["b"].reshape(*batch, node.rank, *columns)
        scale = node.scale
        if isinstance(scale, jax.ShapeDtypeStruct):
            scale = self._scale(path, batch)
        if self.config["init_lora_weights"] == "mica" and node.uses == "all":
            node = node.replace(frozen=("b",))  # as in PEFT, if it trains on
        return node.replace(scale=scale, **jax.device_put(changes))  # asarray would compile

    def _arrays(
        self, module: Module, node: LoraWeight, fan_in: int, fan_out: int
    ) -> dict[str, np.ndarray]:
        """Reads A [r, in], B [r, out] and the vectors of one member of the stack."""
        layer = module.index[0] if module.index and len(node.ranks) > 1 else 0
        rank, keys = node.ranks[layer] // (2 if node.uses == "each" else 1), keys_of(module)
        if isinstance(module, Expert):
            key_a, key_b = keys_of_expert(module, self.chosen)
            wide_out = fan_out * (1 if module.half is None else 2)
            a = self.reader.take(key_a, (rank * module.n, fan_in))
            b = self.reader.take(key_b, (wide_out, rank * module.n))
            return {"a": unpack_a(a, module.n), "b": unpack_b(b, module.n, module.half)}
        if module.uses == "product":  # a head: its input is the table's output
            a = self.reader.take(keys.b, (fan_in, rank)).T
            b = self.reader.take(keys.a, (rank, fan_out))
        else:
            a = self.reader.take(keys.a, (rank, fan_in))
            b = self.reader.take(keys.b, (fan_out, rank)).T
        vectors = {name: self.reader.take(keys.parts[name], (fan_out,)) for name in node.has}
        return {"a": a, "b": b, **vectors}

    def _scale(self, path: str, batch: tuple[int, ...]) -> jax.Array:
        """Computes s of each layer, as PEFT does."""
        scale = np.zeros(batch, np.float32)
        for module in self.chosen:
            if module.path == path:
                rank, alpha = rank_and_alpha(self.config, module.name)
                scale[module.index] = alpha / (rank**0.5 if self.config["use_rslora"] else rank)
        placed: jax.Array = jax.device_put(scale)
        return placed

    def _rows(self, path: str, node: TrainedRows) -> TrainedRows:
        shape = (len(node.rows), *node.shape[1:])
        if node.is_table:
            name = next(m.name for m in self.available if m.path == path and m.is_embedding)
            order = token_rows(self.config, self.available)[name]
            value = self.reader.take(token_key(name), shape)
            value = value[[order.index(row) for row in node.rows]]
        else:
            of_layers = self._row(path).hf_names
            names = (of_layers[layer] for layer in node.rows)
            value = np.stack([self._tensor(name) for name in names])
        return node.replace(value=jax.device_put(value.astype(wide(node.dtype))))

    def _whole(self, path: str, base: BaseLike) -> Trained:
        row = self._row(path)
        arrays = [self._tensor(name) for name in row.hf_names]
        value = np.stack(arrays).reshape(row.stacked_shape) if row.stack else arrays[0]
        return Trained(jax.device_put(value.astype(base.dtype)))

    def _row(self, path: str) -> Row:
        return next(row for row in self.table if row.path == path)

    def _tensor(self, name: str) -> np.ndarray:
        """Reads a tensor that trained in full, in our layout: a saved module's, or a bias."""
        row, _ = places(self.table)[name]
        saved = saved_modules(self.config, [name])
        adapted = [module.name for module in self.chosen]
        key = f"{PREFIX}{name}" if saved else bias_key(name, adapted)
        tensor = self.reader.take(key, row.hf_shape)
        return tensor.T if row.transpose else tensor


def adapter_folder(folder: str | os.PathLike[str], adapter: str | None) -> Path:
    """Finds the folder that holds adapter_config.json.

    PEFT puts an adapter that is not called "default" into a subfolder of its name.

    Args:
      folder: a local folder, one in a bucket (gs://), or a hub name.
      adapter: the adapter's name, if the folder holds several.

    Raises:
      PeftError: if there is no adapter, or one of several has to be chosen.
    """
    path = readable(folder, _is_of_adapter).expanduser()
    if not path.exists():
        name = str(folder)
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise PeftError(f"{name} is neither a folder here nor a hub name (owner/name)")
        try:
            path = snapshot(name, _ADAPTER_FILES)
        except ModelNotFound as error:
            raise PeftError(str(error)) from None
    if not path.is_dir():
        raise PeftError(
            f"{path} is no folder; a PEFT adapter is one, with {configuration.FILE} in it"
        )
    if adapter is not None and adapter != "default":
        path = path / adapter
    if (path / configuration.FILE).is_file():
        return path
    inside = sorted(file.parent.name for file in path.glob(f"*/{configuration.FILE}"))
    if inside:
        raise PeftError(
            f"{path} holds several adapters, {', '.join(inside)}: choose one with adapter=…"
        )
    raise PeftError(f"{path} is no adapter of PEFT: {configuration.FILE} is missing")


def _is_of_adapter(file: str) -> bool:
    return any(fnmatch(file, pattern) for pattern in _ADAPTER_FILES)
