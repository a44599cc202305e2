"""SmolVLM: a SigLIP encoder of images, a connector, and a decoder."""
