"""Files for schedulers, which `lora-jax launch` prints with a command line filled in."""
