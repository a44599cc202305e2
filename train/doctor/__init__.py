"""Reports this machine's troubles with remedies, even if JAX does not start."""
