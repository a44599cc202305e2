"""One sampler: tokens, their keys, stop texts and rows, for generation, rollouts and servers."""
