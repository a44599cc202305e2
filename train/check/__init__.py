"""Tests the kernels and real training steps on the devices that JAX computes on."""
