"""Reads PEFT's adapters as adapted trees, and writes adapted trees as PEFT adapters.

params = lora_jax.peft.load("path/or/hub-name", model, params)   # PEFT's logits
lora_jax.peft.save("folder", model, params)                      # for PEFT, or a serving engine
lora_jax.peft.save_gguf("file.gguf", model, params)              # for llama.cpp
lora_jax.peft.save_diffusers("file.safetensors", model, params)  # for diffusers and ComfyUI
rules = lora_jax.peft.rules("adapter_config.json", model)        # train by PEFT's configuration
lora_jax.peft.serving_problems("folder")                         # lists an engine's refusals
"""

from lora_jax.peft.contents import save
from lora_jax.peft.diffusers import load_diffusers, save_diffusers
from lora_jax.peft.errors import PeftError
from lora_jax.peft.experts import can_hold
from lora_jax.peft.gguf import save_gguf
from lora_jax.peft.load import load
from lora_jax.peft.rules import rules
from lora_jax.peft.serving import serving_problems

__all__ = [
    "PeftError",
    "can_hold",
    "load",
    "load_diffusers",
    "rules",
    "save",
    "save_diffusers",
    "save_gguf",
    "serving_problems",
]
