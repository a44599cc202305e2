"""GGUF files: their parts, their tensors by Hugging Face's names, and their tokenizers."""

from lora_jax.hf.gguf.files import open_gguf as open_gguf
from lora_jax.hf.gguf.model import GGUFFile as GGUFFile
