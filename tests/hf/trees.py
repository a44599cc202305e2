"""The tiny models of tests/models, made once, with NumPy parameters: writing them compiles nothing.

Each call returns containers of its own; the arrays are read-only.
"""

import functools
from typing import Any

import jax
import numpy as np

from tests.models import tiny, tiny_encoders

_decoder = functools.cache(tiny.decoder)
_encoder = functools.cache(tiny_encoders.model)


def decoder(case: str) -> tuple[Any, dict[str, Any]]:
    """Returns `tiny.decoder`'s model and parameters."""
    model, params = _decoder(case)
    return model, jax.tree.map(np.asarray, params)


def encoder(case: str, head: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Returns `tiny_encoders.model`'s model and parameters."""
    model, params = _encoder(case, head)
    return model, jax.tree.map(np.asarray, params)
