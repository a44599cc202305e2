"""The registry of PEFT's kinds of adapters beside LoRA: a file each, by ``peft_type``."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lora_jax.core.types import Fields, JsonObject, Leaf
from lora_jax.core.weight import LoraWeight
from lora_jax.peft.errors import PeftError
from lora_jax.peft.kinds import tinylora, vera
from lora_jax.peft.modules import Module
from lora_jax.peft.names import VECTOR_PARTS
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

    def read_file(
        self,
        reader: Any,
        kind_fields: Fields,
        nodes: Sequence[LoraWeight],
        modules: Sequence[Module],
    ) -> FileAdapter:
        """Returns the adapter of a file.

        Args:
          reader: takes the file's tensors by key.
          own: the fields that the kind alone has.
          nodes: the adapted weights.
          modules: the adapted modules.
        """

    def as_lora_fields(self, fields: Fields, where: str) -> tuple[JsonObject, JsonObject]:
        """Returns the fields of a LoraConfig for the same modules, and those of the kind alone."""

    def rule_settings(self, kind_fields: Fields) -> JsonObject:
        """Returns the fields of a LoraRule beside the variant's and a LoraConfig's."""

    def module_tensors(self, module: Module, node: LoraWeight) -> dict[str, np.ndarray]:
        """Returns the tensors of one adapted module, by key; s is in them."""

    def adapter_contents(
        self, config: Fields, nodes: Mapping[str, LoraWeight], modules: Sequence[Module]
    ) -> tuple[JsonObject, dict[str, np.ndarray]]:
        """Returns the configuration, from a LoraConfig's fields, and the tensors of all modules."""


FORMS: dict[str, PeftForm] = {"VERA": vera, "TINYLORA": tinylora}


def form_of_node(node: Leaf) -> PeftForm | None:
    """Returns the form of a node of an adapted tree; None for a LoRA or a leaf trained in full."""
    if not isinstance(node, LoraWeight):
        return None
    variants = variants_of(node)
    for form in FORMS.values():
        if form.VARIANT in variants:
            return form
    return None


def find_common_form(nodes: Mapping[str, LoraWeight]) -> PeftForm | None:
    """Returns the form of all adapted weights of a tree; None for LoRA.

    Args:
      nodes: the adapted weights, by path.

    Raises:
      PeftError: some have another one.
    """
    form_of_path = {path: form_of_node(node) for path, node in nodes.items()}
    forms = [form for form in form_of_path.values() if form is not None]
    if not forms:
        return None
    other_paths = [path for path, form in form_of_path.items() if form is not forms[0]]
    if other_paths:
        variant = forms[0].VARIANT
        raise PeftError(
            f"{other_paths[0]!r} is adapted otherwise than by {variant.name}, and PEFT has one "
            f"kind of adapter in a file: give all rules {variant.option}=True, or none"
        )
    return forms[0]


def as_peft_node(path: str, node: Leaf) -> Leaf:
    """Returns a node as PEFT has it: a compact one that PEFT lacks as plain LoRA.

    Args:
      path: the node's path, for messages.
      node: a node of an adapted tree.

    Raises:
      PeftError: the node has a part that PEFT does not have.
    """
    if not isinstance(node, LoraWeight) or form_of_node(node) is not None:
        return node
    if node.is_compact:
        return node.as_lora()
    unknown_parts = [name for name in node.has if name not in VECTOR_PARTS]
    if unknown_parts:
        raise PeftError(
            f"{path!r} has the part {unknown_parts[0]!r}, which PEFT does not have: make a plain "
            "adapter of the tree first, lora_jax.bank.extract(strip(tree), merge(tree), rank=…)"
        )
    return node
