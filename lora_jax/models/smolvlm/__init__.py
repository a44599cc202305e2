"""SmolVLM: a SigLIP image encoder, a connector, and a decoder."""
