"""Settings for all tests: four devices, and dtypes that are never promoted silently."""

import os

# Machine code that nobody runs for long need not be fast. (The optimisation of HLO is untouched.)
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# Tests leave no programs in the user's cache folder, and take none from there.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def float64():
    """Equalities of algebra are tested in double precision."""
    with jax.enable_x64(True):
        yield
