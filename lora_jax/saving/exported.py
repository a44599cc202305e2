"""Makes `jax.export` support functions of adapted trees, by serializing the nodes' static data.

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
    for node_class in (LoraWeight, Trained, TrainedRows):
        static_fields: list[str] = []
        array_fields: list[str] = []
        for field in dataclasses.fields(node_class):
            names = static_fields if field.metadata.get("static") else array_fields
            names.append(field.name)
        _register_node_class(node_class, static_fields, array_fields)


def _register_node_class(
    node_class: type[Node], static_fields: Sequence[str], array_fields: Sequence[str]
) -> None:
    """Registers a class of nodes with `jax.export`; its static fields are written as JSON."""

    def serialize(values: Sequence[Leaf]) -> bytes:
        fields = zip(static_fields, values, strict=True)
        return json.dumps(
            {name: _static_field_to_json(name, value) for name, value in fields}
        ).encode()

    def deserialize(text: bytes | bytearray) -> JsonObject:
        fields = json.loads(bytes(text))
        return {name: _static_field_from_json(name, value) for name, value in fields.items()}

    def from_children(aux_data: JsonObject, children: Sequence[Leaf]) -> Leaf:
        arrays = dict(zip(array_fields, children, strict=True))
        return node_class(**arrays, **aux_data)

    export.register_pytree_node_serialization(
        node_class,
        serialized_name=f"lora_jax.{node_class.__name__}",
        serialize_auxdata=serialize,
        deserialize_auxdata=deserialize,
        from_children=from_children,
    )


def _static_field_to_json(name: str, value: Leaf) -> Leaf:
    """Converts a static field to JSON's types."""
    if isinstance(value, AxisRoles):
        return dataclasses.asdict(value)
    if name == "extras":
        return [_part_name(part) for part in value]
    if name in ("ranks", "rows"):
        return [operator.index(number) for number in value]
    return value


def _part_name(part: Part) -> str:
    """Returns the name of a part; raises a ValueError for one that this library does not define."""
    if PARTS.get(part.name) is not part:
        raise ValueError(
            f"jax.export cannot write the part {part.name!r}, because it is none of lora_jax's "
            f"parts {sorted(PARTS)}. Export a function of the tree's leaves instead: leaves, "
            "structure = jax.tree.flatten(params); lambda leaves, x: "
            "forward(structure.unflatten(leaves), x)."
        )
    return part.name


def _static_field_from_json(name: str, value: Leaf) -> Leaf:
    """Converts JSON to a static field: the inverse of `_static_field_to_json`."""
    if name == "roles":
        return AxisRoles(tuple(value["in_axes"]), tuple(value["out_axes"]))
    if name == "extras":
        return tuple(PARTS[part] for part in value)
    return tuple(value) if isinstance(value, list) else value


register()
