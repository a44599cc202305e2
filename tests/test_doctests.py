"""Public functions have an example, and the examples run."""

import doctest
import importlib
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax as lj
from lora_jax import init, models, optim, peft, sharding, training
from tests.support import over

PACKAGE = Path(lj.__file__).parent
# The modules with examples; others are imported by what uses them.
MODULES = sorted(
    ".".join(["lora_jax", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(
        ".__init__"
    )
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text()
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NO_EXAMPLE = {  # types and errors, which functions above return, take or raise
    "AdapterError", "FactorShape", "Initialiser", "LeftOutWarning", "LoraWeight",
    "MergeError", "MergeWarning", "ProjectionState", "RoleError", "RoleWarning", "TokensError",
    "Trained", "TrainedRows",
}  # fmt: skip


# Their examples take longest.
LONG = {
    f"lora_jax.{name}"
    for name in (
        "adapt.activate", "bank.bank", "bank.mixing", "bank.sums.combine",
        "bank.together.together", "hf.keys",
        "init", "models.pretrained", "models.sampling.generate", "models.sampling.rollouts",
        "models.sampling.streaming", "optim", "peft.contents", "peft.rules", "quantized.trees",
        "saving.checkpoint", "subspace.saving", "subspace.space", "training.finetune",
        "training.held_out", "training.neftune", "training.step",
    )
}  # fmt: skip


@over("name", MODULES, often={*MODULES} - LONG)
def test_examples_run(name):
    module = importlib.import_module(name)
    given = {"jax": jax, "jnp": jnp, "lj": lj, "optax": optax}
    found = doctest.DocTestFinder(recurse=True).find(module, name, globs=given)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    with jax.numpy_dtype_promotion("standard"):
        for test in found:
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def public(module):
    """The public functions of a module, and of the package itself its classes."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    for name in names:
        value = getattr(module, name)
        own = hasattr(module, "__path__") or value_is_of(value, module)  # a package re-exports
        kinds = (inspect.isfunction, inspect.isclass) if module is lj else (inspect.isfunction,)
        if own and any(is_kind(value) for is_kind in kinds):
            yield name, value


def value_is_of(value, module):
    return getattr(value, "__module__", None) == module.__name__


@pytest.mark.parametrize(
    "module", [lj, init, models, optim, peft, sharding, training], ids=lambda m: m.__name__
)
def test_public_functions_have_examples(module):
    found = dict(public(module))
    assert len(found) > 3
    shown = {n: any(m in (v.__doc__ or "") for m in (">>>", "example")) for n, v in found.items()}
    assert [name for name, has in shown.items() if not has and name not in NO_EXAMPLE] == []
