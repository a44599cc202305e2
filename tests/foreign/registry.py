"""The cases of the table, and the environments that they run in."""

import dataclasses
import importlib

from tests.foreign.case import Case


@dataclasses.dataclass(frozen=True)
class Environment:
    """A set of packages that install together.

    Attributes:
      name: of the environment.
      modules: in tests/foreign/cases, in the order of the table.
      shown: distributions whose versions are printed.
      requirements: for pip, beside lora_jax; none: the environment that the command runs in, with
        the extra 'foreign'.
      python: releases that the requirements install on; the first that is found is taken.
    """

    name: str
    modules: tuple[str, ...]
    shown: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    python: tuple[str, ...] = ("3.11", "3.12", "3.13")


EXTRA = Environment(
    "extra 'foreign'",
    ("flax", "equinox", "haiku", "keras", "packaged", "graphs", "penzai", "solvers"),
    ("equinox", "dm-haiku", "keras", "nano-moe-jax", "jaxnn")
    + ("jraph", "penzai", "diffrax", "optimistix"),
)
ENVIRONMENTS = (
    EXTRA,
    # tensorflow-text
    Environment("keras-hub", ("keras_hub",), ("keras-hub", "keras"), ("keras-hub",)),
    # The newest sentencepiece wants a protobuf that its tensorflow refuses.
    Environment(
        "gemma", ("gemma",), ("gemma",), ("gemma", "sentencepiece<0.2.3"), ("3.13", "3.12")
    ),
    # It holds numpy and absl back.
    Environment("recurrentgemma", ("recurrentgemma",), ("recurrentgemma",), ("recurrentgemma",)),
    # It holds transformers and tokenizers back.
    Environment("google-tunix", ("tunix",), ("google-tunix",), ("google-tunix",)),
    # Release 1.3 imports what JAX 0.10 no longer has.
    Environment("haliax", ("haliax",), ("haliax", "equinox"), ("haliax>=1.4.dev0",)),
    Environment(
        "transformers 4", ("transformers4",), ("transformers",), ("transformers>=4.57,<5",)
    ),
)


def cases_of(environment: Environment) -> list[Case]:
    """Returns the cases of an environment, in the order of the table."""
    modules = (importlib.import_module(f"tests.foreign.cases.{m}") for m in environment.modules)
    return [case for module in modules for case in module.CASES]


def all_cases() -> list[Case]:
    """Returns the cases of all environments."""
    return [case for environment in ENVIRONMENTS for case in cases_of(environment)]
