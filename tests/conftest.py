"""Settings for all tests: four devices, and dtypes that are never promoted silently."""

import gc
import os
from pathlib import Path

import jaxlib

# Machine code that nobody runs for long need not be fast, and compiling is what tests spend their
# time on: at the level 0, and fusions by XLA's older emitters, it takes half of it. Newer jaxlibs
# have no older emitters, and end the process at a flag that they do not know.
FLAGS = ["--xla_backend_optimization_level=0"]
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# Tests leave no programs in the user's cache folder, and take none from there.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax  # noqa: E402  (the flags come before)
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Drops the compiled programs after a file if there are many.

    Each program maps about nine pieces of memory, and Linux grants a process 65,530: the compiler
    that gets no more crashes, some thousands of tests into a session.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def tpu_compiler(monkeypatch):
    """Has the TPU's compiler, or skips the test: it ends the process at a flag that is not its own.

    By then this process's CPU compiler has read its flags.
    """
    pytest.importorskip("libtpu")
    jax.devices("cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.fixture
def float64():
    """Equalities of algebra are tested in double precision."""
    with jax.enable_x64(True):
        yield
