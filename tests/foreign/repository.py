"""A repository of the page: its models at small sizes, and what its code needs."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tests.foreign.case import Made
from tests.foreign.registry import Environment


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of a repository.

    Attributes:
      name: the name of the model on the page.
      lines: a function from what a user of the repository has to what is adapted. The page prints
        its source.
      arguments: a function that returns small random arguments of `lines`.
      tolerance: the largest max|Δ| / max(1, max|ref|) in single precision.
    """

    name: str
    lines: Callable[..., Made]
    arguments: Callable[[], tuple[Any, ...]]
    tolerance: float = 1e-4

    def make(self) -> Made:
        """Returns the function, its random parameters and inputs."""
        return self.lines(*self.arguments())


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository that a user has checked out.

    Attributes:
      name: the name of the checkout's folder.
      title: the title of the repository's section.
      address: the URL of the repository.
      pins: versions that the repository asks for.
      models: the models, in the order of the page.
      source: folder in the checkout from which its packages are imported.
      requirements: packages that its code imports, for pip, beside lora_jax.
      python: releases that the requirements install on.
      shown: distributions whose versions are printed, beside JAX and Flax.
      absent: packages that its code imports and does not use here. They are replaced by empty ones.
      prepare: puts back what the code needs from older releases, before its import.
      notes: sentences that say what was changed, and what to know.
      not_run: why its models do not run on JAX 0.10; then it has no models.
    """

    name: str
    title: str
    address: str
    pins: str
    models: tuple[Model, ...]
    source: str = "."
    requirements: tuple[str, ...] = ()
    python: tuple[str, ...] = ("3.11", "3.12", "3.13")
    shown: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    prepare: Callable[[], None] = lambda: None
    notes: tuple[str, ...] = ()
    not_run: str = ""

    @property
    def environment(self) -> Environment:
        """The packages that its code imports, and the releases of Python."""
        return Environment(self.name, (), self.shown, self.requirements, self.python)


def typed(lines: Callable[..., Made]) -> str:
    """Returns the lines that a user types for a model: the body of `lines`, then the adaptation."""
    source = textwrap.dedent(inspect.getsource(lines))
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.FunctionDef)
    end = definition.body[-1]
    assert isinstance(end, ast.Return) and isinstance(end.value, ast.Call)
    fn, params, args = map(ast.unparse, end.value.args)
    args = args.strip("()").rstrip(",")
    lines = source.splitlines()
    code = ""
    statements = definition.body[:-1]
    for index, statement in enumerate(statements):
        text = "\n".join(lines[statement.lineno - 1 : statement.end_lineno])
        if index:
            code += _gap(statements[index - 1], statement)
        code += textwrap.dedent(text)
    is_function_last = isinstance(statements[-1], ast.FunctionDef)
    code += "\n\n\n" if is_function_last else "\n\n"
    return (
        f"{code}"
        'rules = [lj.LoraRule(targets="all-linear", rank=16)]\n'
        f"tree = lj.lorafy({params}, rules, trace=({fn}, {params}, {args}))\n"
        f"outputs = lj.adapt({fn})(tree, {args})\n"
    )


def _gap(before: ast.stmt, after: ast.stmt) -> str:
    """Returns the line breaks between two statements of a module, as ruff sets them."""
    if isinstance(before, ast.FunctionDef) or isinstance(after, ast.FunctionDef):
        return "\n\n\n"
    imports = (ast.Import, ast.ImportFrom)
    return "\n\n" if isinstance(before, imports) and not isinstance(after, imports) else "\n"


def drawn(params: Any, size: float = 0.1) -> Any:
    """Returns parameters plus random numbers: what is initialized as zero would train nothing."""
    rng = np.random.default_rng(0)

    def leaf(value: Any) -> Any:
        if not jax.numpy.issubdtype(value.dtype, jax.numpy.floating):
            return value
        noise = size * rng.standard_normal(value.shape)
        return jax.numpy.asarray(np.asarray(value) + noise.astype(value.dtype))

    return jax.tree.map(leaf, params)
