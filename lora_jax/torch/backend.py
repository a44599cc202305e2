"""torchax, which runs a torch module by JAX: its import, and calls within its environment."""

import contextlib
import os
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import torch

from lora_jax.hf.fields import ConfigError

# Overloads with named dimensions, which torch 2.13 removed, and torchax 0.0.13 has tables of. No
# program calls them: that they have names is enough.
_REMOVED = {
    "all": ("dimname", "dimname_out"),
    "any": ("dimname", "dimname_out"),
    "index_add": ("dimname",),
    "index_copy": ("dimname",),
    "index_copy_": ("dimname",),
    "index_fill": ("Dimname_Scalar", "Dimname_Tensor"),
    "index_fill_": ("Dimname_Scalar", "Dimname_Tensor"),
    "norm": ("names_ScalarOpt_dim", "names_ScalarOpt_dim_dtype", "names_dtype_out", "names_out"),
    "prod": ("dim_Dimname",),
    "std": ("correction_names", "correction_names_out", "names_dim", "names_out"),
    "std_mean": ("correction_names", "names_dim"),
    "unbind": ("Dimname",),
}


class TorchModelError(ConfigError):
    """A torch module that cannot run as a JAX function, or not as asked."""


def _name_removed_overloads() -> torch.library.Library:
    """Gives the removed overloads their names again, for as long as the returned object lives."""
    library = torch.library.Library("aten", "FRAGMENT")
    for operator, overloads in _REMOVED.items():
        for overload in overloads:
            if overload not in getattr(torch.ops.aten, operator).overloads():
                library.define(f"{operator}.{overload}(Tensor self) -> Tensor")
    return library


_OVERLOADS = _name_removed_overloads()
os.environ.setdefault("ENABLE_RUNTIME_UPTIME_TELEMETRY", "0")  # torchax would turn it on
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
        import torchax as torchax
        from torchax.interop import call_jax as call_jax
        from torchax.tensor import OperatorNotFound
        from torchax.tensor import Tensor as Tensor
    except ImportError as error:
        raise ImportError("torch modules run by torchax: pip install 'lora_jax[torch]'") from error


def _type_as(tensor: Any, other: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in another's dtype; torchax's own changes the tensor, and knows no views."""
    cast: torch.Tensor = tensor.to(other.dtype)
    return cast


setattr(Tensor, "type_as", _type_as)  # noqa: B010  a method is no attribute to assign to
LOCK = threading.RLock()  # a module's arrays and parts are exchanged while it is traced


@contextlib.contextmanager
def running(what: str) -> Iterator[Any]:
    """Runs torch code by JAX; yields torchax's environment.

    Args:
      what: the model, for messages.

    Raises:
      TorchModelError: an operator that has no lowering, or a value that decides what is computed;
        names both the operator and the module.
    """
    env = torchax.default_env()
    try:
        with LOCK, warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
            warnings.simplefilter("ignore")  # of torch's and torchax's own making
            with torch.no_grad(), env:
                yield env
    except OperatorNotFound as error:
        operator = str(error).removeprefix("Operator with name ").removesuffix(" has no lowering")
        raise TorchModelError(
            f"{what}: {_place(error)} calls {operator}, which torchax cannot lower to JAX"
        ) from error
    except (jax.errors.ConcretizationTypeError, jax.errors.NonConcreteBooleanIndexError) as error:
        first = str(error).splitlines()[0]
        raise TorchModelError(
            f"{what}: {_place(error)} lets a computed value decide what is computed, which no "
            f"compiled program can: {first}"
        ) from error


def _place(error: Exception) -> str:
    """Returns the innermost module, and its line of code, that an error passed through."""
    module, line = "the model", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        own = frame.f_locals.get("self")
        if isinstance(own, torch.nn.Module):
            module = type(own).__name__
            file = os.path.basename(frame.f_code.co_filename)
            line = f" ({file}, line {number})" if file != "module.py" else line
    return module + line
