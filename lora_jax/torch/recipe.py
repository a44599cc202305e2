"""The recipe of a torch module: it is built from a configuration without memory for weights."""

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
from lora_jax.torch.attention import NAME
from lora_jax.torch.packages import TorchModelError

CAUSAL = "AutoModelForCausalLM"
_EXPERTS = "batched_mm"  # transformers' implementation of experts that torchax can lower


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A torch module that is built from a config.json, or one that is given.

    Attributes:
      text: the config.json, with sorted names; "" for a module without one.
      auto: transformers' class that builds it: `AutoModelForCausalLM` and its like.
      scan: whether layers that are alike are stacked, and run as one scan.
      module: the module, if it was given.
    """

    text: str
    auto: str = CAUSAL
    scan: bool = True
    module: Any = None

    @functools.cached_property
    def fields(self) -> Fields:
        """The fields of the config.json."""
        fields: Fields = json.loads(self.text) if self.text else {}
        return fields

    @functools.cached_property
    def hf(self) -> Any:
        """Transformers' own configuration; None for a module without one."""
        if self.module is not None:
            config = getattr(self.module, "config", None)
            return config if isinstance(config, transformers.PreTrainedConfig) else None
        kind = CONFIG_MAPPING[self.fields["model_type"]]
        return kind.from_dict(kind._decode_special_floats(self.fields))

    @functools.cached_property
    def continues(self) -> bool:
        """True for a causal language model."""
        if self.module is None:
            return self.auto == CAUSAL
        return type(self.module).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    @property
    def model_type(self) -> str:
        """Hugging Face's name of the family."""
        return str(getattr(self.hf, "model_type", "") or type(self.module).__name__)

    def empty_module(self) -> Any:
        """Returns the module with its parameters on the meta device, and its buffers as they are.

        Raises:
          TorchModelError: transformers has no such class.
        """
        if self.module is not None:
            memo = {
                id(p): torch.nn.Parameter(p.to("meta"), False) for p in self.module.parameters()
            }
            module: Any = copy.deepcopy(self.module, memo)
            if hasattr(module, "set_attn_implementation") and _takes_attention(type(module)):
                module.set_attn_implementation(NAME)
            if hasattr(module, "set_experts_implementation"):
                module.set_experts_implementation(_EXPERTS)
            return module
        hf = copy.deepcopy(self.hf)
        kind = self._class_of(hf)
        options = {"attn_implementation": NAME if _takes_attention(kind) else "eager"}
        with init_empty_weights(include_buffers=False):
            module = kind._from_config(hf, experts_implementation=_EXPERTS, **options)
        module.tie_weights()
        return module

    def _class_of(self, hf: Any) -> Any:
        """Returns the module's class: by its configuration's, or by the name in the config.json.

        A model that reads more than texts may have a part for texts alone, whose configuration only
        that name tells from others.
        """
        mapping, suffix = getattr(transformers, self.auto)._model_mapping, self.auto[9:]
        kind = mapping.get(type(hf), None)
        for name in hf.architectures or () if kind is None else ():
            kind = kind or (getattr(transformers, name, None) if name.endswith(suffix) else None)
        if kind is None:
            raise TorchModelError(f"transformers has no {suffix} of {self.model_type}")
        return kind[0] if isinstance(kind, tuple) else kind


def _takes_attention(kind: type) -> bool:
    return bool(getattr(kind, "_supports_attention_backend", False))
