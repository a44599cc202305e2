"""Adapters on disk: the adapter subtree alone, with what is needed to put it on its base again.

A folder written by Orbax with two items: ``adapter``, the arrays, in the order of the algebra
(A [batch…, in…, r], B [batch…, r, out…], padding left out), and ``lora``, JSON: the format's
version, the roles, ranks, scales and dropout of each weight, which rows of a leaf train, a checksum
of each array, and the fingerprint of the base.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lora_jax.axes import AxisRoles
from lora_jax.fingerprint import base_fingerprint, checksum, differing
from lora_jax.folders import partial_of, put_in_place
from lora_jax.lorafy import Tree, swap
from lora_jax.parts import AXES, Part, padded, rank_axis, unpadded
from lora_jax.paths import nearest
from lora_jax.variants import PARTS
from lora_jax.weight import LoraWeight, Node, Trained, TrainedRows, is_node, leaves_of

FORMAT = 2
_LONG_AXIS_FIRST = ("a", "start_a")  # filed as [batch…, in…, r]


_FIELDS = {"format", "weights", "trained", "rows", "arrays", "base"}


class AdapterError(ValueError):
    """An adapter folder that can't be written or read, or does not belong to the tree."""


def save_adapter(folder: str | os.PathLike[str], params: Tree, *, overwrite: bool = False) -> None:
    """Writes the adapter of an adapted tree to `folder`, which appears whole or not at all.

    Args:
      folder: created; its parents too.
      params: an adapted tree; of its base only a fingerprint is written.
      overwrite: replace an adapter that is there. Without it, an existing folder is an error.

    Raises AdapterError where the folder exists, or the tree is not adapted.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not overwrite:
        raise AdapterError(
            f"{folder} exists; name another folder, or give overwrite=True to replace it"
        )
    nodes = {path: leaf for path, leaf in leaves_of(params)[0] if is_node(leaf)}
    if not nodes:
        raise AdapterError("save_adapter needs an adapted tree, and this one is plain")
    arrays = {path: _arrays(path, node) for path, node in nodes.items()}
    metadata = {
        "format": FORMAT,
        "weights": {path: _settings(n) for path, n in nodes.items() if isinstance(n, LoraWeight)},
        "trained": sorted(path for path, n in nodes.items() if isinstance(n, Trained)),
        "rows": {path: _rows(n) for path, n in nodes.items() if isinstance(n, TrainedRows)},
        "arrays": {
            path: {name: checksum(array) for name, array in parts.items()}
            for path, parts in arrays.items()
        },
        "base": base_fingerprint(params),
    }
    partial = partial_of(folder)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            partial,
            ocp.args.Composite(
                adapter=ocp.args.StandardSave(arrays), lora=ocp.args.JsonSave(metadata)
            ),
            force=True,
        )
    if jax.process_index() == 0:
        put_in_place(partial, folder)


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
      folder: an adapter folder.
      params: the base the adapter was trained on, plain or adapted.
      allow_base_mismatch: accept another base of the same shapes.
      extras: the parts of your own that the adapter was trained with; see `lora_jax.LoraRule`.

    Raises AdapterError where the folder is missing, damaged or of a later format; where the tree
    lacks a weight or has it in another shape; or where the base has another fingerprint.
    """
    folder = Path(folder).absolute()
    metadata = _read_metadata(folder)
    leaves, treedef = leaves_of(params)
    _check_shapes(folder, metadata, leaves)
    known = PARTS | {part.name: part for part in extras}
    _check_parts(folder, metadata, known)
    if not allow_base_mismatch:
        _check_base(folder, metadata, params)
    arrays = _read_arrays(folder, metadata)

    def adapted(path: str, leaf: Any) -> Any:
        if path in metadata["trained"]:
            return Trained(jnp.asarray(arrays[path]["value"]))
        if path in metadata["rows"]:
            settings = metadata["rows"][path]
            value = jnp.asarray(arrays[path]["value"])
            rows, is_table = tuple(settings["rows"]), settings["is_table"]
            return TrainedRows(_plain(leaf), value, rows=rows, is_table=is_table)
        if path not in metadata["weights"]:
            return _plain(leaf)
        return _weight(_plain(leaf), arrays[path], metadata["weights"][path], known)

    loaded = treedef.unflatten(adapted(path, leaf) for path, leaf in leaves)
    return swap(params, loaded) if any(is_node(leaf) for _, leaf in leaves) else loaded


def _plain(leaf: Any) -> Any:
    return leaf.base if is_node(leaf) else leaf


def _rows(node: TrainedRows) -> dict[str, Any]:
    return {"shape": list(node.shape), "rows": list(node.rows), "is_table": node.is_table}


def _settings(weight: LoraWeight) -> dict[str, Any]:
    return {
        "shape": list(weight.shape),
        "in_axes": list(weight.roles.in_axes),
        "out_axes": list(weight.roles.out_axes),
        "ranks": list(weight.ranks),
        "scale": np.asarray(weight.scale).tolist(),
        "dropout": weight.dropout,
        "frozen": list(weight.frozen),
        "uses": weight.uses,
    }


def _arrays(path: str, node: Node) -> dict[str, Any]:
    """Returns the arrays of a node as they are filed."""
    if not node.is_on:
        raise AdapterError(
            f"{path!r} has no adapter in this half of the tree: join(adapter, base) first"
        )
    if not isinstance(node, LoraWeight):
        return node.parts()
    filed = {}
    for name, array in node.arrays.items():
        axis = rank_axis(node.axes_of(name), node.labels)
        if axis >= 0 and len(set(node.ranks)) > 1:
            array, axis = unpadded(array, node.ranks, axis), axis - 1
        if name in _LONG_AXIS_FIRST:
            array = jnp.moveaxis(array, axis, -1)
        filed[name] = array
    del filed["scale"]  # among the settings
    return filed


def _weight(
    base: Any, filed: Mapping[str, Any], settings: Mapping[str, Any], known: Mapping[str, Part]
) -> LoraWeight:
    """Returns the inverse of `_settings` and `_arrays`."""
    weight = LoraWeight(
        base,
        {"scale": jnp.asarray(settings["scale"], jnp.float32)},
        roles=AxisRoles(tuple(settings["in_axes"]), tuple(settings["out_axes"])),
        ranks=tuple(settings["ranks"]),
        dropout=settings["dropout"],
        extras=tuple(part for name, part in known.items() if name in filed),
        frozen=tuple(settings["frozen"]),
        uses=settings["uses"],
    )
    arrays = {}
    for name, array in filed.items():
        array, axis = jnp.asarray(array), rank_axis(weight.axes_of(name), weight.labels)
        several = axis >= 0 and len(set(weight.ranks)) > 1
        if name in _LONG_AXIS_FIRST:
            array = jnp.moveaxis(array, -1, axis - several)
        arrays[name] = padded(array, weight.ranks, axis) if several else array
    return weight.replace(**arrays)


def _read_metadata(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {folder}")
    file = folder / "lora" / "metadata"
    try:
        metadata = json.loads(file.read_text())
    except FileNotFoundError:
        raise AdapterError(
            f"{folder} is no adapter folder: it lacks {file.relative_to(folder)}"
        ) from None
    except (ValueError, OSError) as error:
        raise AdapterError(f"{file} is damaged: {error}") from None
    if not isinstance(metadata, dict) or not _FIELDS <= set(metadata):
        raise AdapterError(f"{file} is damaged: it lacks what describes the adapter")
    if metadata["format"] != FORMAT:
        raise AdapterError(
            f"{folder} has the format {metadata['format']}, and this version reads {FORMAT}: "
            "update lora_jax"
        )
    return metadata


def _check_parts(folder: Path, metadata: Mapping[str, Any], known: Mapping[str, Part]) -> None:
    names = {name for path in metadata["weights"] for name in metadata["arrays"][path]}
    if unknown := sorted(names - {*AXES, *known}):
        raise AdapterError(
            f"the adapter {folder} has the part {unknown[0]!r}, which is none of {sorted(known)}: "
            "give the part that it was trained with, load_adapter(…, extras=[part])"
        )


def _check_shapes(folder: Path, metadata: Mapping[str, Any], leaves: list[tuple[str, Any]]) -> None:
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}
    wanted = {path: tuple(s["shape"]) for path, s in metadata["weights"].items()}
    wanted |= {path: tuple(s["shape"]) for path, s in metadata["rows"].items()}
    wanted |= {path: _shape(metadata["arrays"][path]["value"]) for path in metadata["trained"]}
    wrong = [
        f"{path}: {list(shape)} in the adapter, "
        + (f"{list(shapes[path])} in the tree" if path in shapes else "missing in the tree")
        for path, shape in wanted.items()
        if shapes.get(path) != shape
    ]
    if wrong:
        near = nearest(wrong[0].split(":")[0], shapes, n=3)
        raise AdapterError(
            f"the adapter {folder} does not fit this tree; {len(wrong)} of {len(wanted)} weights "
            f"differ: {'; '.join(wrong[:5])}. The nearest paths in the tree are {near}"
        )


def _shape(described: str) -> tuple[int, ...]:
    """The shape that a checksum begins with ("float32[3x5]:…")."""
    sizes = described[described.index("[") + 1 : described.index("]")]
    return tuple(int(size) for size in sizes.split("x")) if sizes else ()


def _dtype(described: str) -> Any:
    return jnp.dtype(described[: described.index("[")])


def _check_base(folder: Path, metadata: Mapping[str, Any], params: Tree) -> None:
    saved = metadata["base"]
    found = base_fingerprint(params)
    trained = set(metadata["trained"])
    wrong = [path for path in differing(saved, found) if path not in trained]
    if wrong:
        raise AdapterError(
            f"the adapter {folder} was trained on another base: {len(wrong)} of {len(saved)} "
            f"frozen leaves differ, {', '.join(wrong[:3])} among them. Load the base that it was "
            "trained on, or accept this one with allow_base_mismatch=True "
            "(--allow-base-mismatch)"
        )


def _read_arrays(folder: Path, metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        path: {
            name: jax.ShapeDtypeStruct(_shape(described), _dtype(described), sharding=device)
            for name, described in parts.items()
        }
        for path, parts in metadata["arrays"].items()
    }
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                folder, ocp.args.Composite(adapter=ocp.args.StandardRestore(abstract))
            )
    except Exception as error:  # whatever the storage layers raise for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise AdapterError(f"the adapter {folder} is damaged: {reason[:300]}") from None
    for path, parts in metadata["arrays"].items():
        for name, described in parts.items():
            if checksum(restored["adapter"][path][name]) != described:
                raise AdapterError(
                    f"the adapter {folder} is damaged: {path}/{name} is not what was saved"
                )
    # Through the host: Orbax commits arrays to a device, and a function compiled for arrays that
    # are not committed would compile again.
    return jax.tree.map(np.asarray, restored["adapter"])
