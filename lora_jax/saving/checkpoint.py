"""Adapters on disk: the adapter subtree alone, with the settings to put it on its base again.

A folder written by Orbax with two items: ``adapter``, the arrays, in the order of the algebra
(A [batch…, in…, r], B [batch…, r, out…], padding left out), and ``lora``, JSON: the format's
version, the roles, ranks, scales and dropout of each weight, which rows of a leaf train, a checksum
of each array, and the fingerprint of the base. Factors that follow from the base or from a seed are
made again on loading, and compared: see `lora_jax.saving.derived`.
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

from lora_jax.buckets.copies import is_copy, readable, writes_to_buckets
from lora_jax.core.axes import AxisRoles
from lora_jax.core.parts import AXES, padded, rank_axis, unpadded
from lora_jax.core.paths import nearest
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
from lora_jax.folders import TEMPLATE_FILE, local_path, partial_of, put_in_place
from lora_jax.lorafy import nodes_of, strip, swap
from lora_jax.saving.derived import Remaker, take_out_derived
from lora_jax.saving.errors import AdapterError
from lora_jax.saving.fingerprint import base_fingerprint, checksum, differing
from lora_jax.select.sharing import check_owners, with_shared
from lora_jax.variants import PARTS

FORMAT = 2
_LONG_AXIS_FIRST = ("a", "start_a")  # filed as [batch…, in…, r]
TEMPLATE = "chat_template"  # of the facts: a text in a file of its own
_FIELDS = {"format", "weights", "trained", "rows", "arrays", "base", "about"}


@writes_to_buckets(by_all=True)
def save_adapter(
    folder: str | os.PathLike[str],
    params: Tree,
    *,
    about: Fields | None = None,
    overwrite: bool = False,
    base: Tree = None,
) -> None:
    """Writes the adapter of an adapted tree to `folder`, which appears whole or not at all.

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
            f"{folder} exists; name another folder, or give overwrite=True to replace it"
        )
    facts, nodes = dict(about or {}), nodes_of(params)
    if not nodes:
        raise AdapterError("save_adapter needs an adapted tree, and this one is plain")
    check_owners(nodes)
    fingerprint = base_fingerprint(params)
    if base is not None:
        _check_meant(nodes, fingerprint, base)
    arrays = {path: _arrays(path, node) for path, node in nodes.items()}
    derived = take_out_derived(nodes, arrays)
    metadata = {
        "format": FORMAT,
        "weights": {
            path: _settings(n) | derived.get(path, {})
            for path, n in nodes.items()
            if isinstance(n, LoraWeight)
        },
        "trained": sorted(path for path, n in nodes.items() if isinstance(n, Trained)),
        "rows": {
            path: {"shape": n.shape, "rows": n.rows, "is_table": n.is_table}
            for path, n in nodes.items()
            if isinstance(n, TrainedRows)
        },
        "arrays": jax.tree.map(checksum, arrays),
        "base": fingerprint,
        "about": {name: fact for name, fact in facts.items() if name != TEMPLATE},
    }
    is_own = is_copy(folder) and jax.process_count() > 1  # each process has this folder of its own
    if is_own:
        arrays = jax.tree.map(_gathered, arrays)
    ocp, partial = _orbax(), partial_of(folder)
    args = ocp.args
    items = args.Composite(adapter=args.StandardSave(arrays), lora=args.JsonSave(metadata))
    with _checkpointer(ocp, is_own) as checkpointer:
        checkpointer.save(partial, items, force=True)
    if is_own or jax.process_index() == 0:
        if (template := facts.get(TEMPLATE)) is not None:
            (partial / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        put_in_place(partial, folder)


def adapter_info(folder: str | os.PathLike[str]) -> JsonObject:
    """Returns the facts that `save_adapter` was told `about` the adapter in a folder.

    Args:
      folder: an adapter folder, which may lie in a bucket (gs://).

    Raises:
      AdapterError: the folder is missing, damaged, or of another format.

    See the example of `save_adapter`.
    """
    folder = readable(folder).absolute()
    about: JsonObject = _read_metadata(folder)["about"]
    if (file := folder / TEMPLATE_FILE).is_file():
        about[TEMPLATE] = file.read_text(encoding="utf-8")
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
    folder = readable(folder).absolute()
    metadata = _read_metadata(folder)
    refuse_bytes()
    leaves, treedef = leaves_of(strip(params))
    _check_shapes(folder, metadata, leaves)
    known = PARTS | {part.name: part for part in extras}
    _check_parts(folder, metadata, known)
    if not allow_base_mismatch:
        _check_base(folder, metadata, params)
    arrays, weights, rows = _read_arrays(folder, metadata), metadata["weights"], metadata["rows"]
    complete = Remaker(folder, weights, arrays, nodes_of(params))

    def adapted(path: str, base: BaseLike) -> Leaf:
        if path in weights:
            return complete(path, _weight(base, arrays[path], weights[path], known))
        if path in rows:
            value, table = jax.device_put(arrays[path]["value"]), rows[path]
            return TrainedRows(base, value, tuple(table["rows"]), table["is_table"])
        in_full = path in metadata["trained"]
        return Trained(jax.device_put(arrays[path]["value"])) if in_full else base

    loaded = with_shared(treedef.unflatten(adapted(path, leaf) for path, leaf in leaves))
    return swap(params, loaded) if nodes_of(params) else loaded


def _orbax() -> Any:
    """Returns Orbax. Its import takes half as long as JAX's, so it waits until it is needed."""
    import orbax.checkpoint

    return orbax.checkpoint


def _checkpointer(ocp: Any, is_own: bool) -> Any:
    """Returns Orbax's writer: of all processes together, or of this one alone."""
    # Folders that a thread makes are announced by a signal. Its name is the number of the process's
    # newest save: where another thread begins one meanwhile, this save waits for a signal in vain.
    at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    if not is_own:
        composite_options = ocp.CompositeOptions(async_options=at_once)
        return ocp.Checkpointer(ocp.CompositeCheckpointHandler(composite_options=composite_options))
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(
            multiprocessing_options=alone, async_options=at_once
        ),
        adapter=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
        lora=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _gathered(array: Leaf) -> np.ndarray:
    """Returns an array in the host's memory, whole in each process."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if not array.is_fully_replicated:
            from jax.experimental import multihost_utils

            array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _check_meant(nodes: Mapping[str, Node], fingerprint: Mapping[str, str], base: Tree) -> None:
    """Raises an AdapterError where the base of an adapter is not the one that it is meant for."""
    meant = base_fingerprint(base)
    trained = {path for path, node in nodes.items() if isinstance(node, Trained)}
    if wrong := [path for path in differing(meant, fingerprint) if path not in trained]:
        some = ", ".join(map(repr, wrong[:3]))
        raise AdapterError(
            f"save_adapter: the tree is over another base than the one given: {len(wrong)} of "
            f"{len(meant)} frozen leaves differ, {some} among them. Nothing was written. An "
            "optimiser over the whole tree moves the base with the adapter: optimise the adapter "
            "alone, lora_jax.split(params)[0], or wrap it, lora_jax.optim.freeze_base(optimizer)"
        )


def _settings(weight: LoraWeight) -> JsonObject:
    names = ("shape", "ranks", "dropout", "frozen", "uses")
    settings = {name: getattr(weight, name) for name in names}
    settings |= {n: v for n in ("a_of", "invocation") if (v := getattr(weight, n)) is not None}
    settings |= {"ties": weight.ties} if weight.ties else {}
    scale = np.asarray(weight.scale).tolist()
    return {**settings, **dataclasses.asdict(weight.roles), "scale": scale}


def _arrays(path: str, node: Node) -> Parts:
    """Returns the arrays of a node as the file holds them."""
    if not node.is_on:
        raise AdapterError(
            f"{path!r} has no adapter in this half of the tree: join(adapter, base) first"
        )
    if not isinstance(node, LoraWeight):
        return node.parts()
    apart = ("scale", "active")  # a setting, and the mask of a call
    filed = {name: array for name, array in node.arrays.items() if name not in apart}
    ragged = len(set(node.ranks)) > 1
    for name, array in filed.items():
        axis = rank_axis(node.axes_of(name), node.labels)
        if axis >= 0 and ragged:
            array, axis = unpadded(array, node.ranks, axis), axis - 1
        if name in _LONG_AXIS_FIRST:
            array = jnp.moveaxis(array, axis, -1)
        filed[name] = array
    return filed


def _weight(
    base: BaseLike, filed: Mapping[str, np.ndarray], settings: Fields, known: Mapping[str, Part]
) -> LoraWeight:
    """Returns the inverse of `_settings` and `_arrays`."""
    invocation = settings.get("invocation")
    weight = LoraWeight(
        base,
        {"scale": jax.device_put(np.asarray(settings["scale"], np.float32))},
        roles=AxisRoles(tuple(settings["in_axes"]), tuple(settings["out_axes"])),
        ranks=tuple(settings["ranks"]),
        dropout=settings["dropout"],
        extras=tuple(part for name, part in known.items() if name in filed),
        frozen=tuple(settings["frozen"]),
        uses=settings["uses"],
        a_of=settings.get("a_of"),
        invocation=invocation if invocation is None else tuple(invocation),
        ties=tuple(settings.get("ties", ())),
    )
    arrays: dict[str, Any] = {**weight.arrays, **filed}
    ragged = len(set(weight.ranks)) > 1
    for name, array in arrays.items():
        axis = rank_axis(weight.axes_of(name), weight.labels)
        if name in _LONG_AXIS_FIRST:
            array = np.moveaxis(array, -1, axis - ragged)
        if axis >= 0 and ragged:
            array = padded(array, weight.ranks, axis)
        arrays[name] = array
    return weight.replace(**jax.device_put(arrays))


def _read_metadata(folder: Path) -> JsonObject:
    file = folder / "lora" / "metadata"
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {folder}")
    if not file.exists():
        raise AdapterError(f"{folder} is no adapter folder: it lacks {file.relative_to(folder)}")
    try:
        metadata = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(f"{file} is damaged: {error}") from None
    if not isinstance(metadata, dict) or not _FIELDS <= set(metadata):
        raise AdapterError(f"{file} is damaged: it lacks some of the fields {sorted(_FIELDS)}")
    if metadata["format"] != FORMAT:
        raise AdapterError(
            f"{folder} has the format {metadata['format']}, and this version reads {FORMAT}: "
            "use a version of lora_jax that reads it"
        )
    return metadata


def _check_parts(folder: Path, metadata: Fields, known: Mapping[str, Part]) -> None:
    names = {name for path in metadata["weights"] for name in metadata["arrays"][path]}
    if unknown := sorted(names - {*AXES, *known}):
        raise AdapterError(
            f"the adapter {folder} has the part {unknown[0]!r}, which is none of {sorted(known)}: "
            "give the part that it was trained with, load_adapter(…, extras=[part])"
        )


def _check_shapes(folder: Path, metadata: Fields, leaves: list[tuple[str, Leaf]]) -> None:
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves if hasattr(leaf, "shape")}
    settings = {**metadata["weights"], **metadata["rows"]}
    wanted = {path: tuple(each["shape"]) for path, each in settings.items()}
    wanted |= {path: _type(metadata["arrays"][path]["value"])[0] for path in metadata["trained"]}
    if wrong := [path for path, shape in wanted.items() if shapes.get(path) != shape]:
        here = {path: f"{list(shape)}" for path, shape in shapes.items()}
        shown = [
            f"{path}: {list(wanted[path])} in the adapter, {here.get(path, 'missing')} in the tree"
            for path in wrong[:5]
        ]
        raise AdapterError(
            f"the adapter {folder} does not fit this tree; {len(wrong)} of {len(wanted)} weights "
            f"differ: {'; '.join(shown)}. The nearest paths in the tree are "
            f"{nearest(wrong[0], shapes, n=3)}"
        )


def _type(described: str) -> tuple[tuple[int, ...], str]:
    """Returns the shape and the dtype that a checksum begins with ("float32[3x5]:…")."""
    dtype, _, sizes = described.partition("]")[0].partition("[")
    return tuple(int(size) for size in sizes.split("x") if size), dtype


def _check_base(folder: Path, metadata: Fields, params: Tree) -> None:
    saved, trained = metadata["base"], set(metadata["trained"])
    if wrong := [p for p in differing(saved, base_fingerprint(params)) if p not in trained]:
        raise AdapterError(
            f"the adapter {folder} was trained on another base: {len(wrong)} of {len(saved)} "
            f"frozen leaves differ, {', '.join(wrong[:3])} among them. Load the base that it was "
            "trained on, or accept this one with allow_base_mismatch=True (--allow-base-mismatch)"
        )


def _read_arrays(folder: Path, metadata: Fields) -> dict[str, dict[str, np.ndarray]]:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda described: jax.ShapeDtypeStruct(*_type(described), sharding=device),
        metadata["arrays"],
    )
    ocp = _orbax()
    items = ocp.args.Composite(adapter=ocp.args.StandardRestore(abstract))
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(folder, items)["adapter"]
    except Exception as error:  # whatever the storage layers raise for a damaged file
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise AdapterError(f"the adapter {folder} is damaged: {reason[:300]}") from None
    for path, parts in metadata["arrays"].items():
        checksums = {name: checksum(array) for name, array in restored[path].items()}
        if wrong := differing(parts, checksums):
            name = f"{path}/{wrong[0]}"
            raise AdapterError(f"the adapter {folder} is damaged: {name} is not what was saved")
    # Through the host: Orbax commits arrays to a device, and a function compiled for arrays that
    # are not committed would compile again.
    arrays: dict[str, dict[str, np.ndarray]] = jax.tree.map(np.asarray, restored)
    return arrays
