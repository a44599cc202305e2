"""Llama 2 and 3, and models of their kind, such as SmolLM2."""

from lora_jax.models.decoder.families.family import DecoderFamily

LLAMA = DecoderFamily(
    model_type="llama",
    architecture="LlamaForCausalLM",
    reads=frozenset({"attention_bias", "mlp_bias"}),
    gguf="llama",
    reads_gguf=True,
    gguf_pairs_rows=True,
)
