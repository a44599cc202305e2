"""The optimiser's settings, the same in JAX and torch, whose defaults differ."""

LEARNING_RATE = 1e-3
BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.01
