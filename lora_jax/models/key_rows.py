"""Builds a key table row by row; Hugging Face's names follow from our paths."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

from jax.sharding import PartitionSpec

from lora_jax.hf.keys import Kind, Row
from lora_jax.models.specs import COLUMNS, REPLICATED

_WEIGHTS = ("kernel", "embedding", "scale")  # are called "weight" in files; others as here


class KeyTable(list[Row]):
    """A key table under construction.

    Args:
      layers: the path of the stack of layers.
      n_layers: their number.
      transpose: True if Hugging Face stores kernels as [out, in].
    """

    def __init__(self, layers: str, n_layers: int, *, transpose: bool = True):
        super().__init__()
        self._layers = layers
        self._n_layers = n_layers
        self._transpose = transpose
        self._stack_suffix = ""
        self._layer_indices: tuple[int, ...] | None = None

    def begin(self, place: str, numbers: range) -> None:
        """Starts the stack of some layers.

        Args:
          place: its path behind that of all layers.
          numbers: the layers, by Hugging Face's numbers.
        """
        self._stack_suffix = f"/{place}"
        self._n_layers = len(numbers)
        self._layer_indices = tuple(numbers)

    def add(
        self,
        kind: Kind,
        path: str,
        leaf: str,
        shape: tuple[int, ...],
        spec: PartitionSpec = REPLICATED,
        *,
        experts: int | None = None,
        **more: Any,
    ) -> None:
        """Adds a parameter.

        Args:
          kind: the part of the model.
          path: the module's path, without the number of the layer.
          leaf: the parameter's name in the module.
          shape: the shape of one member of the stack.
          spec: the sharding of its last axes.
          experts: the number of experts in a layer, if each has such a parameter.
          **more: other fields of the row.
        """
        hf_leaf = "weight" if leaf in _WEIGHTS else leaf
        hf_path = f"{path}/{hf_leaf}"
        stack: tuple[int, ...] = ()
        fields: dict[str, Any] = {"transpose": leaf == "kernel" and self._transpose, **more}
        # Files have a tensor for each layer, and for each expert: {} stands for their numbers.
        if path.startswith(f"{self._layers}/"):
            stack_path = f"{self._layers}{self._stack_suffix}"
            hf_path = hf_path.replace(stack_path, f"{self._layers}/{{}}", 1)
            stack = (self._n_layers,)
            fields["numbers"] = self._layer_indices
        if experts is not None:
            hf_path = hf_path.replace("/experts/", "/experts/{}/")
            stack = (*stack, experts)
        row = Row(
            path=f"{path}/{leaf}",
            hf=hf_path.replace("/", "."),
            shape=shape,
            stack=stack,
            kind=kind,
            spec=spec,
            **fields,
        )
        self.append(row)

    def named(
        self,
        kind: Kind,
        path: str,
        hf: str,
        shape: tuple[int, ...],
        spec: PartitionSpec,
        **more: Any,
    ) -> None:
        """Adds a parameter of each layer whose file name differs from our path.

        Args:
          kind, shape, spec: see ``add``.
          path: the parameter's path.
          hf: Hugging Face's name behind that of the stack, with ``{}`` for the layer's number.
          **more: other fields of the row.
        """
        row = Row(
            path=path,
            hf=f"{self._layers.replace('/', '.')}.{hf}",
            shape=shape,
            stack=(self._n_layers,),
            kind=kind,
            spec=spec,
        )
        self.append(dataclasses.replace(row, numbers=self._layer_indices, **more))

    def linear(
        self,
        kind: Kind,
        path: str,
        shape: tuple[int, int],
        spec: PartitionSpec,
        bias: bool = True,
        **more: Any,
    ) -> None:
        """Adds a kernel, [in, out], and its bias if any; see ``add``."""
        self.add(kind, path, "kernel", shape, spec, **more)
        if bias:
            split = PartitionSpec("tensor") if spec == COLUMNS else REPLICATED
            self.add(kind, path, "bias", shape[1:], split, **more)

    def layer_norm(self, path: str, size: int, **more: Any) -> None:
        """Adds a LayerNorm's scale and bias; see ``add``."""
        self.add("norm", path, "scale", (size,), **more)
        self.add("norm", path, "bias", (size,), **more)


def names_of_bare(bare: str, prefix: str) -> Callable[[str, Any], str]:
    """Returns a function that adds a missing prefix to tensor names.

    The tensors of a model without a head come without the prefix. The function takes the name of a
    file's tensor and the model's configuration, and returns the table's name.

    Args:
      bare: a pattern of the names without the prefix.
      prefix: the prefix, "model.".
    """
    pattern = re.compile(bare)
    return lambda name, config: prefix + name if pattern.fullmatch(name) else name


def with_prefix(rows: Iterable[Row], inside: str, prefix: str) -> list[Row]:
    """Returns rows whose names in files have another prefix.

    Args:
      rows: the rows.
      inside: the prefix, "bert."; rows without it stay as they are.
      prefix: the prefix in its place.
    """
    renamed_rows = []
    for row in rows:
        if row.hf.startswith(inside):
            row = dataclasses.replace(row, hf=prefix + row.hf.removeprefix(inside))
        renamed_rows.append(row)
    return renamed_rows
