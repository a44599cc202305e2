"""Codes of a parameter tree that are those of a checkpoint's files, and go back as they lay there.

Their tensors are copied from these files. So nothing is packed anew, and what memory holds in
another form, or not at all, is kept as well: nested scales, and those of activations.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.types import Fields, Leaf
from lora_jax.hf.keys import Row, WeightsError, hf_member
from lora_jax.hf.stored.raw import Entry
from lora_jax.quantized import Coded, is_coded

# The field that lists modules in floats, by quant_method. GPTQ's has none.
_LISTS = {
    "fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    "awq": "modules_to_not_convert",
    "bitsandbytes": "llm_int8_skip_modules",
    "compressed-tensors": "ignore",
    "modelopt": "ignore",
}
_EXPERTS = re.compile(r"\.experts\..*")
_FUSED = re.compile(r"\.([qkv]|gate|up)_proj\.weight")  # by vLLM: those of one module that match


class Shipped(Protocol):
    """A folder that holds tensors in codes; see `lora_jax.hf.sources.Source`.

    Attributes:
      where: the folder, for messages.
      shipped: the names of tensors that lie in codes.
      quantization: the quantization_config of its config.json.
    """

    where: str
    shipped: frozenset[str]
    quantization: Fields

    def codes(self, name: str, dtype: DTypeLike) -> Coded | None:
        """Returns a tensor in the codes of its file, of NumPy arrays; None if it is in no codes."""

    def entries(self, name: str) -> dict[str, Entry]:
        """Returns the tensors that hold one in codes, as they lie in the files."""


def _module(name: str) -> str:
    """Returns the module of a tensor; all experts of a layer are one."""
    return _EXPERTS.sub(".experts", name).removesuffix(".weight")


def _kernels(
    leaves: Mapping[str, Leaf], table: Sequence[Row], source: Shipped
) -> tuple[list[Row], list[Row]]:
    """Returns the rows that the tree holds in codes, and those that the files alone do."""
    coded = [row for row in table if is_coded(leaves[row.path])]
    shipped = [row for row in table if not source.shipped.isdisjoint(row.hf_names)]
    return coded, [row for row in shipped if row not in coded]


def not_kept(leaves: Mapping[str, Leaf], table: Sequence[Row], source: Shipped) -> list[str]:
    """Returns the paths of codes that readers want as arrays, since others are arrays.

    A layer's experts lie all in codes or none of them does; so do the projections that vLLM fuses.
    Where the method has no list of modules in floats, all kernels do.

    Args:
      leaves: the leaves of a tree, by path.
      table: the model's key table.
      source: the folder that the codes are from.
    """
    coded, changed = _kernels(leaves, table, source)
    if changed and source.quantization["quant_method"] not in _LISTS:
        return [row.path for row in coded]

    def together(row: Row) -> str:
        return _FUSED.sub(".fused", _EXPERTS.sub(".experts", row.hf))

    broken = {together(row) for row in changed}
    return [row.path for row in coded if together(row) in broken]


def check_kept(leaves: Mapping[str, Leaf], table: Sequence[Row], source: Shipped) -> None:
    """Checks codes against those of the files, a tensor at a time.

    Args:
      leaves: the leaves of a tree, by path.
      table: the model's key table.
      source: the folder that the codes are from.

    Raises:
      WeightsError: no leaf is in codes, or one is in others than the files; names it.
    """
    coded, _ = _kernels(leaves, table, source)
    if not coded:
        raise WeightsError(f"codes_from={source.where}: none of the parameters is in codes")
    for row in coded:
        leaf = leaves[row.path]
        for index, name in zip(row.members, row.hf_names, strict=True):
            ours = leaf.map(partial(hf_member, row, index=index))
            held = source.codes(name, leaf.dtype) if name in source.shipped else None
            if held is None or not _same(held, ours):
                raise WeightsError(
                    f"{row.path} is in codes ({leaf.format.name}) that are not those of {name} in "
                    f"{source.where}: name the checkpoint that they were read from, or make arrays "
                    "of them by lora_jax.quantized.dequantize(params)"
                )


def _same(a: Coded, b: Coded) -> bool:
    if a.format != b.format or a.arrays.keys() != b.arrays.keys():
        return False
    return all(np.array_equal(array, b.arrays[name]) for name, array in a.arrays.items())


def quantization_of(
    leaves: Mapping[str, Leaf], table: Sequence[Row], source: Shipped
) -> dict[str, Any]:
    """Returns the files' quantization_config, with kernels that are no longer in codes in its list.

    Args:
      leaves: the leaves of a tree, by path.
      table: the model's key table.
      source: the folder that the codes are from.

    Raises:
      WeightsError: the method has no such list, or modules are in codes in part; says what to do.
    """
    fields = dict(source.quantization)
    coded, changed = _kernels(leaves, table, source)
    names = [name for row in changed for name in row.hf_names if name in source.shipped]
    if not names:
        return fields
    modules = list(map(_module, names))
    half = {_module(name) for row in coded for name in row.hf_names}.intersection(modules)
    field = _LISTS.get(fields["quant_method"])
    if half or field is None:
        why = "{} lies in codes in part".format(*half) if half else f"{names[0]} is an array now"
        raise WeightsError(
            f"{why}, which a quantization_config of {fields['quant_method']} cannot say: "
            "lora_jax.quantized.dequantize makes arrays of the codes"
        )
    if field == "ignore":  # of modules as they lie in the file
        modules = [name.removesuffix(".weight") for name in names]
    elif not fields.get(field):  # without a list, readers leave out the heads alone
        heads = {row.hf for row in table if row.kind in ("head", "classifier")}
        heads = {name for name in heads if name.endswith(".weight")} | {"lm_head.weight"}
        modules += sorted(map(_module, heads - source.shipped))
    fields[field] = list(dict.fromkeys([*(fields.get(field) or ()), *modules]))
    return fields
