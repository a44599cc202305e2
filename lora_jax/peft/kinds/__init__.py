"""PEFT's kinds of adapters beside LoRA, a file each; see `lora_jax.peft.forms`."""
