"""HTTP: what clients say, and what they are told; knows no JAX."""
