"""Adapters in files, and functions of adapted trees exported by `jax.export`.

Orbax writes the files, below 1.0: there, what is `orbax.checkpoint.v1` in 0.12.8 takes the name of
`orbax.checkpoint`. As tried with 0.12.8, v1 reads what is written here whole, adapters and
checkpoints, arrays and JSON (a test reads an adapter so): no file is lost when it takes over. But
it writes other files: a dict of facts becomes arrays or, with its JsonHandler, `lora/data.json`,
where every lora_jax so far reads `lora/metadata`. So going over to it means a new `FORMAT`, beside
which this one is still read. That is due with Orbax 1.0, or with a JAX that Orbax 0.x lacks.
"""
