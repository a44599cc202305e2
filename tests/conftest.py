"""Settings for all tests: dtypes are never promoted silently."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def float64():
    """Equalities of algebra are tested in double precision."""
    with jax.enable_x64(True):
        yield
