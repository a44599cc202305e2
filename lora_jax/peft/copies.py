"""Adds and removes tensors that PEFT writes twice: a tied head's, a saved module's biases."""

from collections.abc import Mapping, Sequence

import numpy as np

from lora_jax.core.types import Leaf
from lora_jax.core.weight import LoraWeight, TrainedRows
from lora_jax.hf.keys import Row
from lora_jax.peft.errors import PeftError
from lora_jax.peft.modules import EMBEDDING_NAMES, ends_with
from lora_jax.peft.names import PREFIX
from lora_jax.variants import variants_of

# The end of a head's key, the end of the table's key, and whether one tensor is transposed.
_PAIRS = (
    ("lora_A.weight", "lora_embedding_B", True),
    ("lora_B.weight", "lora_embedding_A", True),
    ("base_layer.weight", "base_layer.weight", False),
    ("weight", "weight", False),
)


def tied_heads(nodes: Mapping[str, Leaf], tied: Sequence[Row]) -> dict[str, list[str]]:
    """Returns the heads that share a table's adapter or its trained value, by the table's name.

    Args:
      nodes: nodes of an adapted tree, by path.
      tied: the rows of tied tables.

    Raises:
      PeftError: for a table that PEFT does not tie, and for DoRA on one.
    """
    heads: dict[str, list[str]] = {}
    for row in tied:
        node, remedy = nodes.get(row.path), "adapt one use of it, LoraRule(uses='lookup')"
        if node is None or isinstance(node, TrainedRows):  # PEFT ties trained tokens by itself
            continue
        names = [name.removesuffix(".weight") for name in (row.hf, *row.aliases)]
        if not any(name.split(".")[-1] in EMBEDDING_NAMES for name in names):
            raise PeftError(
                f"{' and '.join(names)} are tied, and PEFT ties trained weights of layers called "
                f"{' or '.join(EMBEDDING_NAMES)} only: {remedy}"
            )
        for variant in variants_of(node) if isinstance(node, LoraWeight) else ():
            for part in variant.parts:
                if part.vector == "gain":
                    raise PeftError(
                        f"{row.path!r} is tied, and PEFT's {variant.name} has a {part.name} for "
                        f"each of its uses: {remedy}"
                    )
        heads[names[0]] = names[1:]
    return heads


def add_head_names(names: list[str] | None, heads: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Returns target_modules or modules_to_save, with the heads that PEFT ties tables by.

    Args:
      names: the field.
      heads: see `tied_heads`.
    """
    for table, others in heads.items():
        is_named = names and (table in names or ends_with(table, names))
        if is_named and table.split(".")[-1] not in EMBEDDING_NAMES:
            names = sorted({*(names or ()), *others})
    return names


def add_heads(
    tensors: Mapping[str, np.ndarray], heads: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Returns the tensors with copies of a tied table's tensors for its heads, as PEFT writes them.

    Args:
      tensors: by key.
      heads: see `tied_heads`.
    """
    copies = dict(tensors)
    for table, others in heads.items():
        for head in others:
            for of_head, of_table, is_transposed in _PAIRS:
                if (tensor := tensors.get(f"{PREFIX}{table}.{of_table}")) is not None:
                    copy = tensor.T if is_transposed else tensor
                    copies[f"{PREFIX}{head}.{of_head}"] = np.ascontiguousarray(copy)
    return copies


def drop_copies(
    tensors: Mapping[str, np.ndarray], tied: Sequence[Row], where: str
) -> dict[str, np.ndarray]:
    """Returns the tensors without those that only repeat another.

    A head that is tied, adapter and all, repeats its table's tensors. Under bias="all" the biases
    of a saved module are written by their names inside PEFT's wrapper as well.

    Args:
      tensors: by key.
      tied: the rows of tables whose heads are tied, adapter and all.
      where: the file, for messages.

    Raises:
      PeftError: if the head of a tied table has a magnitude of its own.
    """
    kept = {key: t for key, t in tensors.items() if not _is_wrapped(key, tensors)}
    for row in tied:
        for head in map(_stem, row.aliases):
            if (magnitude := f"{head}.lora_magnitude_vector") in kept:
                raise PeftError(
                    f"{where}: {magnitude}: PEFT has a magnitude for each use of a tied table, "
                    "which is not supported; train it in PEFT without use_dora"
                )
            for of_head, of_table, is_transposed in _PAIRS:
                copy = kept.get(key := f"{head}.{of_head}")
                of = kept.get(f"{_stem(row.hf)}.{of_table}")
                if copy is None or of is None:
                    continue
                if np.array_equal(copy, of.T if is_transposed else of):
                    del kept[key]
    return kept


def _stem(hf: str) -> str:
    return PREFIX + hf.removesuffix(".weight")


def _is_wrapped(key: str, tensors: Mapping[str, np.ndarray]) -> bool:
    """Returns True for a key inside PEFT's wrapper of a saved module that is repeated outside."""
    plain = tensors.get(key.replace(".modules_to_save.", "."))
    if ".modules_to_save." in key and plain is not None:
        return np.array_equal(tensors[key], plain)
    return ".original_module." in key  # the base's, which is not used
