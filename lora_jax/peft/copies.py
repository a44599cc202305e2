"""Adds and removes tensors that PEFT stores twice: for tied heads, and biases of saved modules."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax.core.types import Leaf
from lora_jax.core.weight import LoraWeight, TrainedRows
from lora_jax.hf.keys import Row
from lora_jax.peft.errors import PeftError
from lora_jax.peft.modules import EMBEDDING_NAMES, ends_with
from lora_jax.peft.names import KEY_PREFIX
from lora_jax.variants import variants_of


class _KeyPair(NamedTuple):
    """The key endings of a head's tensor and of the table's tensor that it duplicates."""

    head: str
    table: str
    is_transposed: bool


_KEY_PAIRS = (
    _KeyPair("lora_A.weight", "lora_embedding_B", is_transposed=True),
    _KeyPair("lora_B.weight", "lora_embedding_A", is_transposed=True),
    _KeyPair("base_layer.weight", "base_layer.weight", is_transposed=False),
    _KeyPair("weight", "weight", is_transposed=False),
)


def find_tied_heads(nodes: Mapping[str, Leaf], tied: Sequence[Row]) -> dict[str, list[str]]:
    """Finds heads that share a table's adapter or trained value, by the table's name.

    Args:
      nodes: nodes of an adapted tree, by path.
      tied: the rows of tied tables.

    Raises:
      PeftError: for a table that PEFT does not tie, and for DoRA on one.
    """
    remedy = "Adapt only one use of the table with LoraRule(uses='lookup')."
    heads: dict[str, list[str]] = {}
    for row in tied:
        node = nodes.get(row.path)
        if node is None or isinstance(node, TrainedRows):  # PEFT ties trained tokens by itself
            continue
        names = [name.removesuffix(".weight") for name in (row.hf, *row.aliases)]
        has_embedding_name = any(name.split(".")[-1] in EMBEDDING_NAMES for name in names)
        if not has_embedding_name:
            raise PeftError(
                f"{' and '.join(names)} are tied, but PEFT ties only the trained weights of layers "
                f"called {' or '.join(EMBEDDING_NAMES)}. {remedy}"
            )
        variants = variants_of(node) if isinstance(node, LoraWeight) else []
        for variant in variants:
            for part in variant.parts:
                if part.vector == "gain":
                    raise PeftError(
                        f"{row.path!r} is tied, but PEFT's {variant.name} has a {part.name} for "
                        f"each use of a tied table. {remedy}"
                    )
        table, *head_names = names
        heads[table] = head_names
    return heads


def add_head_names(names: list[str] | None, heads: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Adds heads to target_modules or modules_to_save if PEFT needs them to tie a table.

    Args:
      names: the field.
      heads: see `find_tied_heads`.
    """
    for table, head_names in heads.items():
        is_named = names and (table in names or ends_with(table, names))
        has_embedding_name = table.split(".")[-1] in EMBEDDING_NAMES
        if is_named and not has_embedding_name:
            names = sorted({*(names or ()), *head_names})
    return names


def add_head_copies(
    tensors: Mapping[str, np.ndarray], heads: Mapping[str, Sequence[str]]
) -> dict[str, np.ndarray]:
    """Adds a copy of a tied table's tensors for each of its heads, as PEFT writes them.

    Args:
      tensors: by key.
      heads: see `find_tied_heads`.
    """
    all_tensors = dict(tensors)
    for table, head_names in heads.items():
        for pair in _KEY_PAIRS:
            table_tensor = tensors.get(f"{KEY_PREFIX}{table}.{pair.table}")
            if table_tensor is None:
                continue
            for head in head_names:
                head_tensor = table_tensor.T if pair.is_transposed else table_tensor
                key = f"{KEY_PREFIX}{head}.{pair.head}"
                all_tensors[key] = np.ascontiguousarray(head_tensor)
    return all_tensors


def drop_repeated_tensors(
    tensors: Mapping[str, np.ndarray], tied: Sequence[Row], where: str
) -> dict[str, np.ndarray]:
    """Removes tensors that duplicate another tensor.

    A head that shares its table's adapter repeats the table's tensors. Under bias="all" the biases
    of a saved module are also written by their names inside PEFT's wrapper.

    Args:
      tensors: by key.
      tied: the rows of tables whose heads share their adapter.
      where: the file, for messages.

    Raises:
      PeftError: if the head of a tied table has a magnitude of its own.
    """
    remaining = {key: t for key, t in tensors.items() if not _is_wrapped_copy(key, tensors)}
    for row in tied:
        table = _key_stem(row.hf)
        for head in map(_key_stem, row.aliases):
            magnitude = f"{head}.lora_magnitude_vector"
            if magnitude in remaining:
                raise PeftError(
                    f"{where} has {magnitude}. A magnitude for each use of a tied table is not "
                    "supported. Train the adapter in PEFT without use_dora."
                )
            for pair in _KEY_PAIRS:
                head_tensor = remaining.get(f"{head}.{pair.head}")
                table_tensor = remaining.get(f"{table}.{pair.table}")
                if head_tensor is None or table_tensor is None:
                    continue
                copy = table_tensor.T if pair.is_transposed else table_tensor
                if np.array_equal(head_tensor, copy):
                    del remaining[f"{head}.{pair.head}"]
    return remaining


def _key_stem(hf_name: str) -> str:
    return KEY_PREFIX + hf_name.removesuffix(".weight")


def _is_wrapped_copy(key: str, tensors: Mapping[str, np.ndarray]) -> bool:
    """Returns True for a key inside PEFT's wrapper that duplicates one outside it."""
    outside_tensor = tensors.get(key.replace(".modules_to_save.", "."))
    if ".modules_to_save." in key and outside_tensor is not None:
        return np.array_equal(tensors[key], outside_tensor)
    return ".original_module." in key  # of the base; no adapter uses it
