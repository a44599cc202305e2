"""Qwen3.5 with images: an encoder of images of any size, and a decoder with linear layers."""
