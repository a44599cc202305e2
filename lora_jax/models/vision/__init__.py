"""Image encoders: ViT and DINOv2, with a classification head."""
