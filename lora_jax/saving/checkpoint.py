"""Saves and loads adapters: the trained arrays, and the settings that restore the adapted tree.

Orbax writes a folder with two items. ``adapter`` holds the arrays in the order of the algebra
(A [batch…, in…, r], B [batch…, r, out…], without padding). ``lora`` is JSON: the format's version,
the roles, ranks, scales and dropout of each weight, which rows of a leaf train, a checksum of each
array, and the fingerprint of the base. Factors that follow from the base or from a seed are
computed again on loading, and compared: see `lora_jax.saving.derived`.

The *settings* of a weight are the fields of a `LoraWeight` other than arrays. Its *filed* arrays
are its arrays in the order of the file.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.buckets.copies import is_copy, path_to_read, writes_to_buckets
from lora_jax.core.axes import AxisRoles
from lora_jax.core.parts import AXES, join_layers_unpadded, pad_split_layers, rank_axis
from lora_jax.core.paths import most_similar
from lora_jax.core.types import BaseLike, Fields, JsonObject, Leaf, Parts, Tree
from lora_jax.core.weight import (
    LoraWeight,
    Node,
    Part,
    Trained,
    TrainedRows,
    leaves_of,
    refuse_bytes,
)
from lora_jax.folders import TEMPLATE_FILE, local_path, partial_folder_of, replace_folder
from lora_jax.lorafy import nodes_of, strip, swap
from lora_jax.saving.derived import Remaker, remove_derived_arrays
from lora_jax.saving.errors import AdapterError, DamagedAdapterError
from lora_jax.saving.fingerprint import base_fingerprint, checksum, keys_that_differ
from lora_jax.select.sharing import check_owners_exist, fill_in_shared_arrays
from lora_jax.variants import PARTS

FORMAT_VERSION = 2
_LONG_AXIS_FIRST = ("a", "start_a")  # filed as [batch…, in…, r]
TEMPLATE_FIELD = "chat_template"  # the field of `about` whose text has a file of its own
_METADATA_FIELDS = {"format", "weights", "trained", "rows", "arrays", "base", "about"}


@writes_to_buckets(by_all=True)
def save_adapter(
    folder: str | os.PathLike[str],
    params: Tree,
    *,
    about: Fields | None = None,
    overwrite: bool = False,
    base: Tree = None,
) -> None:
    """Writes the adapter of an adapted tree to `folder`, completely or not at all.

    With several processes, all of them have to call it.

    Args:
      folder: created; its parents too. It may lie in a bucket (gs://).
      params: an adapted tree; of its base only a fingerprint is written.
      about: facts to keep beside the adapter, of JSON's types, such as {"model": name, "revision":
        commit}; `adapter_info` reads them. A text "chat_template" goes into chat_template.jinja,
        where transformers looks for one.
      overwrite: replace the folder, whatever is in it. Without it, an existing folder is an error.
      base: the tree before `lorafy`, or an adapted one, that the adapter is meant for: the frozen
        leaves of `params` are compared with its own, which an optimiser over the whole tree moves.

    Raises:
      AdapterError: the folder exists, the tree is not adapted, or it is over another base.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lj.save_adapter(f"{folder}/adapter", tree, about={"model": "owner/name"})
    ...     loaded = lj.load_adapter(f"{folder}/adapter", params)
    ...     lj.adapter_info(f"{folder}/adapter")
    {'model': 'owner/name'}
    """
    folder = local_path(folder).absolute()
    if folder.exists() and not overwrite:
        raise AdapterError(
            f"{folder} already exists. Name another folder, or pass overwrite=True to replace it."
        )
    nodes = nodes_of(params)
    if not nodes:
        raise AdapterError(
            "save_adapter needs an adapted tree, but this tree has no adapter. Call "
            "lora_jax.lorafy first."
        )
    check_owners_exist(nodes)
    fingerprint = base_fingerprint(params)
    if base is not None:
        _check_intended_base(nodes, fingerprint, base)
    arrays = {path: _arrays_for_file(path, node) for path, node in nodes.items()}
    recipes = remove_derived_arrays(nodes, arrays)
    about_fields = dict(about or {})
    template = about_fields.pop(TEMPLATE_FIELD, None)
    metadata = {
        "format": FORMAT_VERSION,
        **_node_settings(nodes, recipes),
        "arrays": jax.tree.map(checksum, arrays),
        "base": fingerprint,
        "about": about_fields,
    }
    # Each process has its own copy of a bucket's folder, and writes the whole adapter to it.
    has_own_folder = is_copy(folder) and jax.process_count() > 1
    if has_own_folder:
        arrays = jax.tree.map(_gather_array, arrays)
    ocp = _import_orbax()
    items = ocp.args.Composite(
        adapter=ocp.args.StandardSave(arrays), lora=ocp.args.JsonSave(metadata)
    )
    partial_folder = partial_folder_of(folder)
    with _make_checkpointer(ocp, has_own_folder) as checkpointer:
        checkpointer.save(partial_folder, items, force=True)
    if has_own_folder or jax.process_index() == 0:
        if template is not None:
            (partial_folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        replace_folder(partial_folder, folder)


def _node_settings(
    nodes: Mapping[str, Node], recipes: Mapping[str, JsonObject]
) -> dict[str, object]:
    """Returns the metadata of all nodes: weights, fully trained leaves and trained rows."""
    weights: dict[str, JsonObject] = {}
    rows: dict[str, JsonObject] = {}
    for path, node in nodes.items():
        if isinstance(node, LoraWeight):
            weights[path] = _settings_of_weight(node) | recipes.get(path, {})
        elif isinstance(node, TrainedRows):
            rows[path] = {"shape": node.shape, "rows": node.rows, "is_table": node.is_table}
    trained = sorted(path for path, node in nodes.items() if isinstance(node, Trained))
    return {"weights": weights, "trained": trained, "rows": rows}


def adapter_info(folder: str | os.PathLike[str]) -> JsonObject:
    """Returns the `about` facts that `save_adapter` stored with an adapter.

    Args:
      folder: an adapter folder, which may lie in a bucket (gs://).

    Raises:
      AdapterError: the folder is missing, damaged, or of another format.

    See the example of `save_adapter`.
    """
    folder = path_to_read(folder).absolute()
    about: JsonObject = _read_metadata(folder)["about"]
    template_file = folder / TEMPLATE_FILE
    if template_file.is_file():
        about[TEMPLATE_FIELD] = template_file.read_text(encoding="utf-8")
    return about


def load_adapter(
    folder: str | os.PathLike[str],
    params: Tree,
    *,
    allow_base_mismatch: bool = False,
    extras: Sequence[Part] = (),
) -> Tree:
    """Returns `params` with the adapter that `save_adapter` wrote to `folder`.

    A plain tree is adapted as the file says. An adapted tree gets the file's adapter in the place
    of its own (`lora_jax.swap`), and a function compiled for it runs on without recompiling.

    Args:
      folder: an adapter folder, which may lie in a bucket (gs://).
      params: the base the adapter was trained on, plain or adapted.
      allow_base_mismatch: accept another base of the same shapes.
      extras: the parts of your own that the adapter was trained with; see `lora_jax.LoraRule`.

    Raises:
      AdapterError: the folder is missing, damaged or of another format; the tree lacks a weight or
        has it in another shape; or the base has another fingerprint.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lj.save_adapter(f"{folder}/adapter", tree)
    ...     loaded = lj.load_adapter(f"{folder}/adapter", params)
    >>> bool((loaded["dense"]["kernel"].a == tree["dense"]["kernel"].a).all())
    True
    """
    folder = path_to_read(folder).absolute()
    metadata = _read_metadata(folder)
    refuse_bytes()
    leaves, treedef = leaves_of(strip(params))
    _check_shapes(folder, metadata, leaves)
    known_parts = PARTS | {part.name: part for part in extras}
    _check_parts(folder, metadata, known_parts)
    if not allow_base_mismatch:
        _check_base(folder, metadata, params)
    arrays = _read_arrays(folder, metadata)
    weights = metadata["weights"]
    rows = metadata["rows"]
    complete = Remaker(folder=folder, settings=weights, arrays=arrays, nodes=nodes_of(params))

    def adapt_leaf(path: str, base: BaseLike) -> Leaf:
        """Returns the restored node of a leaf, or the leaf."""
        if path in weights:
            weight = _restore_weight(base, arrays[path], weights[path], known_parts)
            return complete(path, weight)
        if path in rows:
            return TrainedRows(
                base=base,
                value=jax.device_put(arrays[path]["value"]),
                rows=tuple(rows[path]["rows"]),
                is_table=rows[path]["is_table"],
            )
        if path in metadata["trained"]:
            return Trained(jax.device_put(arrays[path]["value"]))
        return base

    adapted_leaves = [adapt_leaf(path, leaf) for path, leaf in leaves]
    loaded = fill_in_shared_arrays(treedef.unflatten(adapted_leaves))
    return swap(params, loaded) if nodes_of(params) else loaded


def _import_orbax() -> Any:
    """Imports Orbax lazily, since its import takes half as long as JAX's."""
    import orbax.checkpoint

    return orbax.checkpoint


def _make_checkpointer(ocp: Any, has_own_folder: bool) -> Any:
    """Returns an Orbax writer for all processes together, or for this process."""
    # Orbax announces folders that a thread makes by a signal, which it names after the process's
    # newest save. If another thread starts a save meanwhile, this one would wait forever.
    async_options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    if not has_own_folder:
        composite_options = ocp.CompositeOptions(async_options=async_options)
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler(composite_options=composite_options))
    process = jax.process_index()
    process_options = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process_{process}",
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(
            multiprocessing_options=process_options, async_options=async_options
        ),
        adapter=ocp.StandardCheckpointHandler(multiprocessing_options=process_options),
        lora=ocp.JsonCheckpointHandler(multiprocessing_options=process_options),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=process_options)


def _gather_array(array: Leaf) -> np.ndarray:
    """Returns the full array in the memory of each process."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    is_split_over_processes = not array.is_fully_addressable and not array.is_fully_replicated
    if is_split_over_processes:
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _check_intended_base(
    nodes: Mapping[str, Node], fingerprint: Mapping[str, str], intended_base: Tree
) -> None:
    """Raises an AdapterError if the base is not the one that was requested."""
    intended_fingerprint = base_fingerprint(intended_base)
    changed_paths = [
        path
        for path in keys_that_differ(intended_fingerprint, fingerprint)
        if not isinstance(nodes.get(path), Trained)
    ]
    if changed_paths:
        examples = ", ".join(map(repr, changed_paths[:3]))
        raise AdapterError(
            "save_adapter: the base in params differs from the argument base. "
            f"{len(changed_paths)} of {len(intended_fingerprint)} frozen leaves differ, for "
            f"example {examples}. Nothing was written. An optimiser over the whole tree also "
            "changes the base. Optimise lora_jax.split(params)[0] alone, or wrap the optimiser in "
            "lora_jax.optim.freeze_base."
        )


def _settings_of_weight(weight: LoraWeight) -> JsonObject:
    """Returns the settings of a weight as stored in the file."""
    names = ("shape", "ranks", "dropout", "frozen", "uses")
    settings = {name: getattr(weight, name) for name in names}
    for name in ("a_of", "invocation"):
        value = getattr(weight, name)
        if value is not None:
            settings[name] = value
    if weight.ties:
        settings["ties"] = weight.ties
    settings |= dataclasses.asdict(weight.roles)
    settings["scale"] = np.asarray(weight.scale).tolist()
    return settings


def _arrays_for_file(path: str, node: Node) -> Parts:
    """Returns a node's arrays as stored in the file: without padding, A as [in…, r]."""
    if not node.is_on:
        raise AdapterError(
            f"{path!r} has no adapter, because this tree is only one half of an adapted tree. Join "
            "the halves first: lora_jax.join(adapter, base)."
        )
    if not isinstance(node, LoraWeight):
        return node.parts()
    is_ragged = len(set(node.ranks)) > 1
    filed: Parts = {}
    for name, array in node.arrays.items():
        if name in ("scale", "active"):  # a setting, and the mask of a call
            continue
        axis = rank_axis(node.axes_of(name), node.labels)
        if axis >= 0 and is_ragged:
            # The members of a stack, each with its own rank, are joined along one axis.
            array = join_layers_unpadded(array, node.ranks, axis)
            axis -= 1
        if name in _LONG_AXIS_FIRST:
            array = jnp.moveaxis(array, axis, -1)
        filed[name] = array
    return filed


def _restore_weight(
    base: BaseLike,
    filed: Mapping[str, np.ndarray],
    settings: Fields,
    known_parts: Mapping[str, Part],
) -> LoraWeight:
    """Restores a weight from its stored arrays.

    Inverts `_settings_of_weight` and `_arrays_for_file`.
    """
    invocation = settings.get("invocation")
    weight = LoraWeight(
        base,
        {"scale": jax.device_put(np.asarray(settings["scale"], np.float32))},
        roles=AxisRoles(tuple(settings["in_axes"]), tuple(settings["out_axes"])),
        ranks=tuple(settings["ranks"]),
        dropout=settings["dropout"],
        extras=tuple(part for name, part in known_parts.items() if name in filed),
        frozen=tuple(settings["frozen"]),
        uses=settings["uses"],
        a_of=settings.get("a_of"),
        invocation=None if invocation is None else tuple(invocation),
        ties=tuple(settings.get("ties", ())),
    )
    arrays: dict[str, Any] = {**weight.arrays, **filed}
    is_ragged = len(set(weight.ranks)) > 1
    for name, array in arrays.items():
        axis = rank_axis(weight.axes_of(name), weight.labels)
        if name in _LONG_AXIS_FIRST:
            filed_axis = axis - 1 if is_ragged else axis
            array = np.moveaxis(array, -1, filed_axis)
        if axis >= 0 and is_ragged:
            array = pad_split_layers(array, weight.ranks, axis)
        arrays[name] = array
    return weight.replace(**jax.device_put(arrays))


def _read_metadata(folder: Path) -> JsonObject:
    """Reads an adapter's metadata; raises an AdapterError if the file is damaged."""
    file = folder / "lora" / "metadata"
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {folder}. Check the path.")
    if not file.exists():
        raise AdapterError(
            f"{folder} is no adapter folder, because it has no file {file.relative_to(folder)}. "
            "Name a folder that save_adapter wrote."
        )
    try:
        metadata = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise DamagedAdapterError(
            f"{file} is damaged and cannot be read ({error}). Copy or save the adapter again."
        ) from None
    if not isinstance(metadata, dict) or not _METADATA_FIELDS <= set(metadata):
        raise DamagedAdapterError(
            f"{file} is damaged, because some of the fields {sorted(_METADATA_FIELDS)} are "
            "missing. Copy or save the adapter again."
        )
    if metadata["format"] != FORMAT_VERSION:
        raise AdapterError(
            f"{folder} has the format {metadata['format']}, but this version of lora_jax reads "
            f"only the format {FORMAT_VERSION}. Install the version of lora_jax that wrote the "
            "adapter."
        )
    return metadata


def _check_parts(folder: Path, metadata: Fields, known_parts: Mapping[str, Part]) -> None:
    """Raises an AdapterError if an adapter has parts that neither lora_jax nor `extras` defines."""
    names: set[str] = set()
    for path in metadata["weights"]:
        names.update(metadata["arrays"][path])
    unknown = sorted(names - {*AXES, *known_parts})
    if unknown:
        raise AdapterError(
            f"the adapter {folder} has the part {unknown[0]!r}, which is none of the known parts "
            f"{sorted(known_parts)}. Pass the part that it was trained with: "
            "load_adapter(…, extras=[part])."
        )


def _check_shapes(folder: Path, metadata: Fields, leaves: list[tuple[str, Leaf]]) -> None:
    """Raises an AdapterError if an adapted leaf is missing or has another shape."""
    tree_shapes = {path: tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}
    adapter_shapes: dict[str, tuple[int, ...]] = {}
    for path, settings in {**metadata["weights"], **metadata["rows"]}.items():
        adapter_shapes[path] = tuple(settings["shape"])
    for path in metadata["trained"]:
        shape, _ = _shape_and_dtype(metadata["arrays"][path]["value"])
        adapter_shapes[path] = shape
    problems: dict[str, str] = {}
    for path, shape in adapter_shapes.items():
        tree_shape = tree_shapes.get(path)
        if tree_shape != shape:
            in_tree = "missing" if tree_shape is None else list(tree_shape)
            problems[path] = f"{path}: {list(shape)} in the adapter, {in_tree} in the tree"
    if problems:
        paths = list(problems)
        raise AdapterError(
            f"the adapter {folder} does not fit this tree, because {len(problems)} of "
            f"{len(adapter_shapes)} weights differ: {'; '.join(list(problems.values())[:5])}. "
            f"The nearest paths in the tree are {most_similar(paths[0], tree_shapes, n=3)}. Load "
            "the model that the adapter was trained on."
        )


def _shape_and_dtype(checksum_text: str) -> tuple[tuple[int, ...], str]:
    """Parses the shape and dtype at the start of a checksum ("float32[3x5]:…")."""
    array_type, _, _ = checksum_text.partition("]")
    dtype, _, sizes = array_type.partition("[")
    return tuple(int(size) for size in sizes.split("x") if size), dtype


def _check_base(folder: Path, metadata: Fields, params: Tree) -> None:
    """Raises an AdapterError if a tree's base is not the one that the adapter was trained on."""
    fingerprint = metadata["base"]
    trained = set(metadata["trained"])
    changed_paths = [
        path
        for path in keys_that_differ(fingerprint, base_fingerprint(params))
        if path not in trained
    ]
    if changed_paths:
        raise AdapterError(
            f"the adapter {folder} was trained on another base: {len(changed_paths)} of "
            f"{len(fingerprint)} frozen leaves differ, for example {', '.join(changed_paths[:3])}. "
            "Load the base that it was trained on, or accept this one with "
            "allow_base_mismatch=True (--allow-base-mismatch)."
        )


def _read_arrays(folder: Path, metadata: Fields) -> dict[str, dict[str, np.ndarray]]:
    """Reads the stored arrays by path and name, and verifies their checksums."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract_array(checksum_text: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(*_shape_and_dtype(checksum_text), sharding=device)

    abstract_arrays = jax.tree.map(abstract_array, metadata["arrays"])
    ocp = _import_orbax()
    items = ocp.args.Composite(adapter=ocp.args.StandardRestore(abstract_arrays))
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder, items)["adapter"]
    except Exception as error:  # whatever the storage layers raise for a damaged file
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        # TensorStore appends its settings, which do not help.
        reason = reason.partition(" See full TensorStore details")[0].rstrip(".")
        raise DamagedAdapterError(
            f"the adapter {folder} is damaged and cannot be read ({reason[:300]}). Copy or save it "
            "again."
        ) from None
    for path, saved_checksums in metadata["arrays"].items():
        checksums = {name: checksum(array) for name, array in restored[path].items()}
        changed_names = keys_that_differ(saved_checksums, checksums)
        if changed_names:
            name = f"{path}/{changed_names[0]}"
            raise DamagedAdapterError(
                f"the adapter {folder} is damaged, because the checksum of {name} is wrong. Copy "
                "or save it again."
            )
    # Orbax commits arrays to a device, and a function compiled for uncommitted arrays would compile
    # again. NumPy arrays are not committed.
    arrays: dict[str, dict[str, np.ndarray]] = jax.tree.map(np.asarray, restored)
    return arrays
