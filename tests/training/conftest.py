"""Settings for the tests of training."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    """Takes the place of the core's setting: Optax's Adam raises a float to an integer's power."""
    with jax.numpy_dtype_promotion("standard"):
        yield
