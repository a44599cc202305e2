"""Draws the same random numbers as torch's CPU generator, for arrays that derive from a seed.

The generator is the Mersenne twister. Source: torch's ``DistributionTemplates.h`` for CPUs.
"""

import math

import numpy as np

_BLOCK_SIZE = 16  # normal numbers are drawn in blocks of this size, unless there are fewer


def draw_uniform(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns uniform fp32 numbers in [0, 1), equal to ``torch.rand``."""
    return _draw_uniform_numbers(np.random.RandomState(seed), math.prod(shape)).reshape(shape)


def draw_normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns standard normal fp32 numbers, equal to ``torch.randn``.

    They agree with torch's up to the rounding of its logarithms and cosines.
    """
    generator = np.random.RandomState(seed)
    n = math.prod(shape)
    if n < _BLOCK_SIZE:
        return _draw_normal_pairs(generator, n).astype(np.float32).reshape(shape)
    samples = _draw_uniform_numbers(generator, n)
    for start in range(0, n - _BLOCK_SIZE + 1, _BLOCK_SIZE):
        block = slice(start, start + _BLOCK_SIZE)
        samples[block] = _normal_from_uniform(samples[block])
    # The last block overlaps the block before, and gets new numbers.
    if n % _BLOCK_SIZE:
        samples[-_BLOCK_SIZE:] = _normal_from_uniform(_draw_uniform_numbers(generator, _BLOCK_SIZE))
    return samples.reshape(shape)


def _draw_uniform_numbers(generator: np.random.RandomState, n: int) -> np.ndarray:
    """Returns n fp32 numbers in [0, 1), each from 24 random bits."""
    bits = generator.randint(0, 2**32, size=n, dtype=np.uint32) & np.uint32(2**24 - 1)
    return bits.astype(np.float32) * np.float32(2**-24)


def _normal_from_uniform(uniforms: np.ndarray) -> np.ndarray:
    """Transforms 16 uniform numbers to normal ones (Box and Muller), in pairs 8 apart."""
    radius_uniforms, angle_uniforms = np.split(uniforms, 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - radius_uniforms))
    angle = np.float32(2 * math.pi) * angle_uniforms
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def _draw_normal_pairs(generator: np.random.RandomState, n: int) -> np.ndarray:
    """Draws n normal fp64 numbers, in pairs."""
    n_pairs = -(-n // 2)
    words = generator.randint(0, 2**32, size=(n_pairs, 2, 2), dtype=np.uint32).astype(np.uint64)
    high, low = words[..., 0], words[..., 1]  # [pairs, 2]
    bits = (high << np.uint64(32) | low) & np.uint64(2**53 - 1)
    uniforms = bits.astype(np.float64) * 2.0**-53
    angle = 2 * math.pi * uniforms[:, 0]
    radius = np.sqrt(-2 * np.log1p(-uniforms[:, 1]))
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.ravel()[:n]
