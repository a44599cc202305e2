"""Settings for the tests of plans."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def few_devices():
    """Plans are for machines of their own; JAX has all its devices before the first."""
    assert jax.device_count() == 4
