"""The sampler of generation, rollouts and servers: token choice, keys, stop texts and rows."""
