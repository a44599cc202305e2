"""Reports on this machine and its troubles, with remedies, also where JAX does not start."""
