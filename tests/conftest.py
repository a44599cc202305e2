"""Settings for all tests: four devices, and dtypes that are never promoted silently."""

import gc
import os

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
    """Drops the compiled programs after each file.

    The more of them live, the longer each new one takes to lower and to compile: a third longer
    after some thousand. Each also maps about nine pieces of memory, of which Linux grants a process
    65,530; the compiler that gets no more crashes.
    """
    yield
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


def pytest_collection_finish():
    """Spares the garbage collector what was imported, which stays."""
    gc.collect()
    gc.freeze()
