"""Public functions have an example, and the examples run."""

import doctest
import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax as lj
from lora_jax import init, optim, sharding

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lj.__path__, "lora_jax.")
    if not module.name.endswith("__main__")
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NO_EXAMPLE = {  # types and errors, which functions above return, take or raise
    "AdapterError", "FactorShape", "Initialiser", "LoraWeight", "MergeError", "MergeWarning",
    "ProjectionState", "RoleError", "Trained", "TrainedRows",
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    given = {"jax": jax, "jnp": jnp, "lj": lj, "optax": optax}
    found = doctest.DocTestFinder(recurse=True).find(module, name, globs=given)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    with jax.numpy_dtype_promotion("standard"):
        for test in found:
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("module", [lj, init, optim, sharding], ids=lambda m: m.__name__)
def test_public_functions_have_examples(module):
    without = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__.startswith(module.__name__)
        and name not in NO_EXAMPLE
        and not any(mark in (value.__doc__ or "") for mark in (">>>", "example"))
    ]
    assert without == []
