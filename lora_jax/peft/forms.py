"""The registry of PEFT's kinds of adapters beside LoRA: a file each, by ``peft_type``."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lora_jax.core.types import Fields, JsonObject, Leaf
from lora_jax.core.weight import LoraWeight
from lora_jax.peft import vera
from lora_jax.peft.errors import PeftError
from lora_jax.peft.modules import Module
from lora_jax.peft.names import VECTORS
from lora_jax.variants import variants_of
from lora_jax.variants.variant import Variant


class FileAdapter(Protocol):
    """The adapter of a file: what its modules share, made once."""

    def arrays(self, node: LoraWeight, members: Sequence[Module]) -> JsonObject:
        """Returns the arrays of a weight beside its scale; None for one to take away.

        Args:
          node: the weight.
          members: the modules that the weight holds.
        """


class PeftForm(Protocol):
    """A kind of adapter: a module with these functions."""

    @property
    def VARIANT(self) -> Variant:  # noqa: N802
        """The variant of LoRA that it is."""

    def read_file(self, reader: Any, own: Fields, nodes: Sequence[LoraWeight]) -> FileAdapter:
        """Returns the adapter of a file.

        Args:
          reader: takes the file's tensors by key.
          own: the fields that the kind alone has.
          nodes: the adapted weights.
        """

    def as_lora_fields(self, fields: Fields, where: str) -> tuple[JsonObject, JsonObject]:
        """Returns the fields of a LoraConfig for the same modules, and those of the kind alone."""

    def fields(self, config: Fields) -> JsonObject:
        """Returns the configuration for the modules that fields of a LoraConfig adapt."""

    def tensors_of(self, module: Module, node: LoraWeight) -> dict[str, np.ndarray]:
        """Returns the tensors of one adapted module, by key; s is in them."""

    def shared(self, nodes: Mapping[str, LoraWeight]) -> dict[str, np.ndarray]:
        """Returns the tensors that all modules share, by key."""


FORMS: dict[str, PeftForm] = {"VERA": vera}


def form_of(node: Leaf) -> PeftForm | None:
    """Returns the form of a node of an adapted tree; None for a LoRA or a leaf trained in full."""
    variants = variants_of(node) if isinstance(node, LoraWeight) else []
    return next((form for form in FORMS.values() if form.VARIANT in variants), None)


def peft_node(path: str, node: Leaf) -> Leaf:
    """Returns a node as PEFT has it: a compact one that PEFT lacks as plain LoRA.

    Args:
      path: the node's path, for messages.
      node: a node of an adapted tree.

    Raises:
      PeftError: the node has a part that PEFT does not have.
    """
    if not isinstance(node, LoraWeight) or form_of(node):
        return node
    if node.is_compact:
        return node.as_lora()
    if unknown := [name for name in node.has if name not in VECTORS]:
        raise PeftError(
            f"{path!r} has the part {unknown[0]!r}, which PEFT does not have: make a plain adapter "
            "of the tree first, lora_jax.bank.extract(strip(tree), merge(tree), rank=…)"
        )
    return node
