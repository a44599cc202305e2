"""The registry of PEFT's adapter types other than LoRA, by ``peft_type``; each has its own file."""

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
    """The content of an adapter file, with the arrays that its modules share."""

    def arrays(self, node: LoraWeight, members: Sequence[Module]) -> JsonObject:
        """Returns a weight's arrays without its scale; None removes an array.

        Args:
          node: the weight.
          members: the modules that the weight holds.
        """


class PeftForm(Protocol):
    """An adapter type of PEFT, as a Python module with these functions."""

    @property
    def VARIANT(self) -> Variant:  # noqa: N802
        """The variant of LoRA that corresponds to the type."""

    def read_file(
        self,
        reader: Any,
        kind_fields: Fields,
        nodes: Sequence[LoraWeight],
        modules: Sequence[Module],
    ) -> FileAdapter:
        """Returns the adapter in a file.

        Args:
          reader: takes the file's tensors by key.
          own: the fields that the kind alone has.
          nodes: the adapted weights.
          modules: the adapted modules.
        """

    def as_lora_fields(self, fields: Fields, where: str) -> tuple[JsonObject, JsonObject]:
        """Splits fields into those of a LoraConfig and those of the adapter type."""

    def rule_settings(self, kind_fields: Fields) -> JsonObject:
        """Returns the extra LoraRule fields that the type's fields set."""

    def module_tensors(self, module: Module, node: LoraWeight) -> dict[str, np.ndarray]:
        """Returns one adapted module's tensors by key, with s multiplied in."""

    def adapter_contents(
        self, config: Fields, nodes: Mapping[str, LoraWeight], modules: Sequence[Module]
    ) -> tuple[JsonObject, dict[str, np.ndarray]]:
        """Returns the type's configuration and the tensors that all modules share."""


FORMS: dict[str, PeftForm] = {"VERA": vera, "TINYLORA": tinylora}


def form_of_node(node: Leaf) -> PeftForm | None:
    """Returns the adapter type of a node; None for LoRA and for leaves that train in full."""
    if not isinstance(node, LoraWeight):
        return None
    variants = variants_of(node)
    for form in FORMS.values():
        if form.VARIANT in variants:
            return form
    return None


def find_common_form(nodes: Mapping[str, LoraWeight]) -> PeftForm | None:
    """Returns the adapter type of all weights of a tree; None for LoRA.

    Args:
      nodes: the adapted weights, by path.

    Raises:
      PeftError: the weights have different kinds.
    """
    form_of_path = {path: form_of_node(node) for path, node in nodes.items()}
    forms = [form for form in form_of_path.values() if form is not None]
    if not forms:
        return None
    other_paths = [path for path, form in form_of_path.items() if form is not forms[0]]
    if other_paths:
        variant = forms[0].VARIANT
        raise PeftError(
            f"{other_paths[0]!r} is adapted differently from {variant.name}, but a PEFT file holds "
            f"one kind of adapter. Set {variant.option}=True in all rules, or in none."
        )
    return forms[0]


def as_peft_node(path: str, node: Leaf) -> Leaf:
    """Returns a node in a form that PEFT has; other compact nodes become plain LoRA.

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
            f"The adapter of {path!r} has the array {unknown_parts[0]!r}, which PEFT's files "
            "cannot hold. Approximate it by plain LoRA first: "
            "lora_jax.bank.extract(lora_jax.strip(tree), lora_jax.merge(tree), rank=…)."
        )
    return node
