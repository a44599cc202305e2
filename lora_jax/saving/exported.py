"""Lets `jax.export` write and read functions of adapted trees, by writing the nodes' static data.

    exported = jax.export.export(jax.jit(lora_jax.adapt(fn)))(params, x)
    file.write_bytes(exported.serialize())         # needs the package flatbuffers, as in JAX
    jax.export.deserialize(file.read_bytes()).call(params, x)

Importing `lora_jax` is enough for both. Whoever writes a `lora_jax.core.base.Base` registers its
type in the same way.
"""

import dataclasses
import json
import operator
from collections.abc import Sequence

from jax import export

from lora_jax.core.axes import AxisRoles
from lora_jax.core.types import JsonObject, Leaf
from lora_jax.core.weight import LoraWeight, Node, Part, Trained, TrainedRows
from lora_jax.variants import PARTS


def register() -> None:
    """Registers the nodes of an adapted tree with `jax.export`."""
    for kind in (LoraWeight, Trained, TrainedRows):
        fields = dataclasses.fields(kind)
        static = [field.name for field in fields if field.metadata.get("static")]
        _register(kind, static, [field.name for field in fields if field.name not in static])


def _register(kind: type[Node], static: Sequence[str], arrays: Sequence[str]) -> None:
    def written(values: Sequence[Leaf]) -> bytes:
        named = dict(zip(static, values, strict=True))
        return json.dumps({name: _plain(name, value) for name, value in named.items()}).encode()

    def read(text: bytes | bytearray) -> JsonObject:
        return {name: _restored(name, value) for name, value in json.loads(bytes(text)).items()}

    def made(aux_data: JsonObject, children: Sequence[Leaf]) -> Leaf:
        return kind(**dict(zip(arrays, children, strict=True)), **aux_data)

    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"lora_jax.{kind.__name__}",
        serialize_auxdata=written,
        deserialize_auxdata=read,
        from_children=made,
    )


def _plain(name: str, value: Leaf) -> Leaf:
    """Returns a static field as JSON has it."""
    if isinstance(value, AxisRoles):
        return dataclasses.asdict(value)
    if name == "extras":
        return [_name_of(part) for part in value]
    return [operator.index(n) for n in value] if name in ("ranks", "rows") else value


def _name_of(part: Part) -> str:
    if PARTS.get(part.name) is not part:
        raise ValueError(
            f"jax.export cannot write the part {part.name!r}, which is none of {sorted(PARTS)}: "
            "its functions are your own. Export a function of the tree's leaves instead: leaves, "
            "structure = jax.tree.flatten(params); lambda leaves, x: forward(structure.unflatten("
            "leaves), x)"
        )
    return part.name


def _restored(name: str, value: Leaf) -> Leaf:
    """Returns the inverse of `_plain`."""
    if name == "roles":
        return AxisRoles(tuple(value["in_axes"]), tuple(value["out_axes"]))
    if name == "extras":
        return tuple(PARTS[part] for part in value)
    return tuple(value) if isinstance(value, list) else value


register()
