"""Random numbers as torch's generator for CPUs draws them, for what a file leaves to its seed.

The generator is the Mersenne twister. Source: torch's ``DistributionTemplates.h`` for CPUs.
"""

import math

import numpy as np

_FEW = 16  # so many normal numbers or more are drawn in blocks of this size


def uniform(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns uniform numbers in [0, 1), fp32, as ``torch.rand`` draws them."""
    return _uniform(np.random.RandomState(seed), math.prod(shape)).reshape(shape)


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns normal numbers of mean 0 and variance 1, fp32, as ``torch.randn`` draws them.

    They agree with torch's up to the rounding of its logarithms and cosines.
    """
    generator, n = np.random.RandomState(seed), math.prod(shape)
    if n < _FEW:
        return _few_normal(generator, n).astype(np.float32).reshape(shape)
    drawn = _uniform(generator, n)
    for start in range(0, n - _FEW + 1, _FEW):
        drawn[start : start + _FEW] = _block(drawn[start : start + _FEW])
    if n % _FEW:  # the last block begins earlier, and is drawn anew
        drawn[-_FEW:] = _block(_uniform(generator, _FEW))
    return drawn.reshape(shape)


def _uniform(generator: np.random.RandomState, n: int) -> np.ndarray:
    bits = generator.randint(0, 2**32, size=n, dtype=np.uint32) & np.uint32(2**24 - 1)
    return bits.astype(np.float32) * np.float32(2**-24)


def _block(drawn: np.ndarray) -> np.ndarray:
    """Returns normal numbers by the method of Box and Muller: of pairs eight numbers apart."""
    first, second = np.split(drawn, 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * math.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def _few_normal(generator: np.random.RandomState, n: int) -> np.ndarray:
    """Returns normal numbers, fp64, drawn one pair after the other."""
    words = generator.randint(0, 2**32, size=(-(-n // 2), 2, 2), dtype=np.uint32).astype(np.uint64)
    bits = (words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64(2**53 - 1)
    first, second = np.moveaxis(bits.astype(np.float64) * 2.0**-53, 1, 0)
    radius, angle = np.sqrt(-2 * np.log1p(-second)), 2 * math.pi * first
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.ravel()[:n]
