"""Published findings about LoRA, repeated by one command each."""
