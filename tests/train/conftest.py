"""Settings for the tests of the scripts."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    """Takes the place of the core's setting: Optax's Adam raises a float to an integer's power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def few_devices():
    """Scripts see one device: what compiles for several takes longer, and has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("mesh", "cache"):
            patch.setattr(f"train.processes.{module}.all_devices", lambda: jax.devices()[:1])
        yield
