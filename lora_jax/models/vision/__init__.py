"""Encoders of images: ViT and DINOv2, with their head for classes."""
