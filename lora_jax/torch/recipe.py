"""Recipes from which torch modules are built without memory for weights."""

import copy
import dataclasses
import functools
import json
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lora_jax.core.types import Fields
from lora_jax.torch.attention import ATTENTION_NAME
from lora_jax.torch.diffusion import CLASS_FIELD
from lora_jax.torch.diffusion import module_class as diffusers_class
from lora_jax.torch.examples import Example, example_of
from lora_jax.torch.experts import EXPERTS_NAME
from lora_jax.torch.packages import TorchModelError

CAUSAL = "AutoModelForCausalLM"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The recipe of a torch module: a config.json, or a module.

    Attributes:
      text: the config.json, with sorted names; "" for a module without one.
      auto: transformers' class that builds the module, such as `AutoModelForCausalLM`.
      scan: whether layers that compute the same are stacked, and run as one scan.
      module: the user's module; None if it is built from the config.json.
      example: arguments for a trace in which layers are compared. None for those of `example_of`,
        and for a causal language model, which needs none.
    """

    text: str
    auto: str = CAUSAL
    scan: bool = True
    module: Any = None
    example: Example | None = None

    @functools.cached_property
    def fields(self) -> Fields:
        """The fields of the config.json."""
        fields: Fields = json.loads(self.text) if self.text else {}
        return fields

    @functools.cached_property
    def hf(self) -> Any:
        """The configuration as an object of transformers; None for modules of other packages."""
        if self.module is not None:
            config = getattr(self.module, "config", None)
            return config if isinstance(config, transformers.PreTrainedConfig) else None
        if CLASS_FIELD in self.fields:
            return None
        config_class = CONFIG_MAPPING[self.fields["model_type"]]
        return config_class.from_dict(config_class._decode_special_floats(self.fields))

    @functools.cached_property
    def continues(self) -> bool:
        """True for a causal language model."""
        if self.module is None:
            return self.auto == CAUSAL and CLASS_FIELD not in self.fields
        return type(self.module).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def example_arguments(self, module: Any) -> dict[str, Any] | None:
        """Returns arguments by which layers can be compared; None if there are none.

        A causal language model needs none: a short row of tokens will do.
        """
        example = None if self.continues else self.example or example_of(module)
        return None if example is None else example.arguments

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the family."""
        class_name = self.fields.get(CLASS_FIELD) or type(self.module).__name__
        return str(getattr(self.hf, "model_type", "") or class_name)

    def empty_module(self) -> Any:
        """Builds the module with its parameters on the meta device, and its buffers with values.

        Raises:
          TorchModelError: transformers has no such class.
        """
        if self.module is not None:
            # Copy the user's module, with empty parameters in place of its own.
            empty_parameters = {
                id(p): torch.nn.Parameter(p.to("meta"), False) for p in self.module.parameters()
            }
            module: Any = copy.deepcopy(self.module, empty_parameters)
            uses_interface = _supports_attention_interface(type(module))
            if uses_interface and hasattr(module, "set_attn_implementation"):
                module.set_attn_implementation(ATTENTION_NAME)
            if hasattr(module, "set_experts_implementation"):
                module.set_experts_implementation(EXPERTS_NAME)
            return module
        if CLASS_FIELD in self.fields:
            with init_empty_weights(include_buffers=False):
                return diffusers_class(self.fields).from_config(self.fields)
        hf = copy.deepcopy(self.hf)
        module_class = self._class_of(hf)
        uses_interface = _supports_attention_interface(module_class)
        with init_empty_weights(include_buffers=False):
            module = module_class._from_config(
                hf,
                experts_implementation=EXPERTS_NAME,
                attn_implementation=ATTENTION_NAME if uses_interface else "eager",
            )
        module.tie_weights()
        return module

    def _class_of(self, hf: Any) -> Any:
        """Returns the module's class, by the configuration's class or by its `architectures`.

        The text part of a model that also reads images may be known by its name alone.
        """
        class_of_config = getattr(transformers, self.auto)._model_mapping
        suffix = self.auto.removeprefix("AutoModel")
        module_class = class_of_config.get(type(hf), None)
        if module_class is None:
            for name in hf.architectures or ():
                if module_class is None and name.endswith(suffix):
                    module_class = getattr(transformers, name, None)
        if module_class is None:
            raise TorchModelError(
                f"transformers has no class {self.auto} for the model type {self.model_type}. Pass "
                "another class as auto, such as AutoModel."
            )
        return module_class[0] if isinstance(module_class, tuple) else module_class


def _supports_attention_interface(module_class: type) -> bool:
    return bool(getattr(module_class, "_supports_attention_backend", False))
