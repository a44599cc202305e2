"""PEFT's adapter types other than LoRA, one file each; see `lora_jax.peft.forms`."""
