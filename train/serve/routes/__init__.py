"""The HTTP routes, which read requests and write answers without JAX."""
