"""Writes codes back in their original layout if a tree has kept them unchanged from a checkpoint.

Their tensors are copied from these files. So nothing is packed anew, and what memory holds in
another form, or not at all, is kept as well: nested scales, and those of activations.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from jax.typing import DTypeLike

from lora_jax.core.types import Fields, Tree
from lora_jax.hf.keys import Row, WeightsError, check_leaves, hf_tensor_of_member
from lora_jax.hf.stored.raw import TensorEntry
from lora_jax.quantized import Coded, is_coded

# The field that lists modules in floats, by quant_method. GPTQ's has none.
_FLOAT_MODULES_FIELD = {
    "fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    "awq": "modules_to_not_convert",
    "bitsandbytes": "llm_int8_skip_modules",
    "compressed-tensors": "ignore",
    "modelopt": "ignore",
}
_EXPERT_SUFFIX = re.compile(r"\.experts\..*")
# A pattern's flags, which may stand at its beginning alone, and the rest.
_PATTERN_FLAGS = re.compile(r"((?:\(\?[a-zA-Z]+\))?)(.*)", re.DOTALL)
# Escaped characters and sets of characters, and the ^ outside of them, which anchors a name.
_PATTERN_ATOMS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\^")
_FUSED_PROJECTION = re.compile(
    r"\.([qkv]|gate|up)_proj\.weight"
)  # by vLLM: those of one module that match


class CodesFolder(Protocol):
    """A folder with quantized tensors; see `lora_jax.hf.sources.Source`.

    Attributes:
      where: the folder, for messages.
      coded_names: the names of tensors that lie in codes.
      quantization: the quantization_config of its config.json, by the table's names.
    """

    where: str
    coded_names: frozenset[str]
    quantization: Fields

    def codes(self, name: str, dtype: DTypeLike) -> Coded | None:
        """Returns a quantized tensor's codes as NumPy arrays; None if it is not quantized."""

    def entries(self, name: str) -> dict[str, TensorEntry]:
        """Returns the stored tensors of a quantized weight, by the key table's names."""


def rename_modules(config: Fields, rename: Callable[[str], str]) -> dict[str, Any]:
    """Returns a quantization_config with renamed modules.

    Args:
      config: the quantization_config.
      rename: a tensor's name -> its other name.
    """

    def rename_all(modules: Sequence[str]) -> list[str]:
        return [_rename_module(module, rename) for module in modules]

    renamed = dict(config)
    field = _FLOAT_MODULES_FIELD.get(config.get("quant_method", ""), "")
    if config.get(field):
        renamed[field] = rename_all(config[field])
    groups = config.get("config_groups")
    if groups:
        renamed["config_groups"] = {
            key: {**group, "targets": rename_all(group.get("targets") or [])}
            for key, group in groups.items()
        }
    return renamed


def _rename_module(module: str, rename: Callable[[str], str]) -> str:
    """Renames a module; a pattern ("re:…") also gets a form that matches any prefix."""
    if not module.startswith("re:"):
        return rename(f"{module}.weight").removesuffix(".weight")
    match = _PATTERN_FLAGS.fullmatch(module.removeprefix("re:"))
    assert match is not None
    flags, pattern = match.groups()
    matches_any_prefix = pattern.startswith((".*", "^.*")) and not _has_alternatives(pattern)
    if matches_any_prefix:
        return module
    unanchored = _PATTERN_ATOMS.sub(lambda atom: "" if atom[0] == "^" else atom[0], pattern)
    return rf"re:{flags}(?:.*\.)?(?:{unanchored})"


def _has_alternatives(pattern: str) -> bool:
    """Returns True if a pattern has a | outside its groups."""
    text = _PATTERN_ATOMS.sub("", pattern)
    n_removed = 1
    while n_removed > 0:  # the innermost groups first
        text, n_removed = re.subn(r"\([^()]*\)", "", text)
    return "|" in text


def _module_of(tensor: str) -> str:
    """Returns the module of a tensor; all experts of a layer share one."""
    return _EXPERT_SUFFIX.sub(".experts", tensor).removesuffix(".weight")


class CodesCheck:
    """Compares a tree's codes with the files that they were read from.

    Args:
      params: the tree.
      table: the model's key table.
      source: the folder of the files.

    Attributes:
      leaves: the leaves of the tree, by path.

    Raises:
      WeightsError: the tree does not fit the table.
    """

    def __init__(self, params: Tree, table: Sequence[Row], source: CodesFolder):
        self.leaves = check_leaves(params, table, in_codes=True)
        self._source = source
        self._float_list = _FLOAT_MODULES_FIELD.get(source.quantization.get("quant_method", ""))
        self._heads = [row.hf for row in table if row.kind in ("head", "classifier")]
        self._coded_rows = [row for row in table if is_coded(self.leaves[row.path])]
        # The rows whose codes in the files have become arrays.
        self._decoded_rows = [
            row
            for row in table
            if not is_coded(self.leaves[row.path])
            and not source.coded_names.isdisjoint(row.hf_names)
        ]

    def paths_to_dequantize(self) -> list[str]:
        """Returns the codes to write as arrays, since members of their group are arrays.

        A layer's experts lie all in codes or none of them does; so do the projections that vLLM
        fuses. Where the method has no list of modules in floats, all kernels do.
        """

        def group_of(row: Row) -> str:
            """Returns a key shared by rows that must all be quantized or not."""
            if not self._float_list:
                return ""
            return _FUSED_PROJECTION.sub(".fused", _EXPERT_SUFFIX.sub(".experts", row.hf))

        decoded_groups = set(map(group_of, self._decoded_rows))
        return [row.path for row in self._coded_rows if group_of(row) in decoded_groups]

    def check(self) -> None:
        """Compares all codes with the files, one tensor at a time.

        Raises:
          WeightsError: there are none, or they are others; names the first.
        """
        source = self._source
        if not self._coded_rows:
            raise WeightsError(
                f"codes_from={source.where} has no effect, because no parameter is quantized. "
                "Remove codes_from."
            )
        for row in self._coded_rows:
            leaf = self.leaves[row.path]
            for index, name in zip(row.members, row.hf_names, strict=True):
                tree_codes = leaf.map(partial(hf_tensor_of_member, row, index=index))
                file_codes = source.codes(name, leaf.dtype) if name in source.coded_names else None
                if file_codes is None or not _are_codes_equal(file_codes, tree_codes):
                    raise WeightsError(
                        f"{row.path} is quantized ({leaf.format.name}), but differs from {name} "
                        f"in {source.where}. Name the checkpoint that the parameters were loaded "
                        "from, or call lora_jax.quantized.dequantize(params) first."
                    )

    def quantization(self) -> dict[str, Any]:
        """Returns the files' quantization_config, with dequantized modules listed.

        Raises:
          WeightsError: the method has no list, or modules are in codes in part; says what to do.
        """
        fields = dict(self._source.quantization)
        shipped = self._source.coded_names
        decoded_tensors = []
        for row in self._decoded_rows:
            decoded_tensors += [name for name in row.hf_names if name in shipped]
        if not decoded_tensors:
            return fields
        modules = [_module_of(name) for name in decoded_tensors]
        coded_modules = {_module_of(name) for row in self._coded_rows for name in row.hf_names}
        mixed_modules = coded_modules.intersection(modules)
        if mixed_modules or self._float_list is None:
            problem = f"{decoded_tensors[0]} is no longer quantized"
            if mixed_modules:
                problem = f"{min(mixed_modules)} is quantized only in part"
            raise WeightsError(
                f"{problem}, which a quantization_config of {fields['quant_method']} cannot "
                "describe. Call lora_jax.quantized.dequantize(params) first."
            )
        listed_modules = fields.get(self._float_list) or []
        if self._float_list == "ignore":  # of modules as they lie in the files
            modules = [name.removesuffix(".weight") for name in decoded_tensors]
        elif not listed_modules:  # without a list, readers leave out the heads alone
            heads = {name for name in self._heads if name.endswith(".weight")}
            heads.add("lm_head.weight")
            modules += sorted(map(_module_of, heads - shipped))
        fields[self._float_list] = list(dict.fromkeys([*listed_modules, *modules]))
        return fields


def _are_codes_equal(a: Coded, b: Coded) -> bool:
    """Returns True if two `Coded` have the same format and equal arrays."""
    if a.format != b.format or a.arrays.keys() != b.arrays.keys():
        return False
    return all(np.array_equal(array, b.arrays[name]) for name, array in a.arrays.items())
