"""torchax, which runs a torch module by JAX: its import, and calls within its environment."""

import contextlib
import functools
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.utils import _pytree as torch_tree

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
        from torchax.tensor import Environment, OperatorNotFound
        from torchax.tensor import Tensor as Tensor
        from torchax.view import View, ViewInfo
    except ImportError as error:
        raise ImportError("torch modules run by torchax: pip install 'lora_jax[torch]'") from error


def _type_as(tensor: Any, other: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in another's dtype; torchax's own changes the tensor, and knows no views."""
    cast: torch.Tensor = tensor.to(other.dtype)
    return cast


setattr(Tensor, "type_as", _type_as)  # noqa: B010  a method is no attribute to assign to
LOCK = threading.RLock()  # a module's arrays and parts are exchanged while it is traced


_IN_FUNCTION = ContextVar("differentiated", default=False)  # a Function that was called with grad


class _Environment(Environment):  # type: ignore[misc]  # torchax has no types
    """torchax's environment, with torch's meaning of ``torch.no_grad`` within a module.

    torchax's own differentiates what a module computes there, too.
    """

    def dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Computes an operator; there is no gradient of what it returns under ``no_grad``."""
        if func is torch.ops.aten.detach.default:  # of a slice
            return _alias(args[0])
        out = super().dispatch(func, types, args, kwargs)
        return _frozen(out, (args, kwargs))


def _frozen(out: Any, args: Any) -> Any:
    """Returns an operator's output, without a gradient under ``no_grad``.

    A tensor that the operator was given is returned as it is, as in torch.
    """
    if torch.is_grad_enabled() or _IN_FUNCTION.get():
        return out
    given = {id(arg) for arg in torch_tree.tree_leaves(args)}
    return torch_tree.tree_map_only(
        (Tensor, View), lambda tensor: tensor if id(tensor) in given else _stopped(tensor), out
    )


def _stopped(tensor: Any) -> Any:
    """Returns a tensor, or a slice of one that can be written to, without a gradient."""
    out = _alias(tensor)
    return out if out is tensor or isinstance(tensor, View) else Tensor(out.jax(), tensor._env)


def _alias(tensor: Any) -> Any:
    """Returns a tensor through which another one is read, and written to, without a gradient."""
    has_gradients = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    return View(tensor, _Stopped(), tensor._env) if has_gradients else tensor


class _Stopped(ViewInfo):  # type: ignore[misc]  # torchax has no types
    """A view of all of a tensor, through which no gradient passes, and what it writes has none."""

    def transform_tensor(self, jax_array: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(jax_array)

    def update_tensor(self, new_value: jax.Array, jax_array: jax.Array) -> jax.Array:
        return _overwrite(jax_array, new_value)

    def calculate_output_shape(self, source: jax.Array) -> tuple[int, ...]:
        return source.shape


@jax.custom_jvp
def _written(old: jax.Array, new: jax.Array) -> jax.Array:
    """Returns the new array, with the gradient of the old one."""
    return new


@_written.defjvp
def _(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


def _hold(tensor: Any, array: jax.Array) -> None:
    """Gives a tensor its array; what is written under ``no_grad`` changes no gradient."""
    old, records = vars(tensor).get("_held"), torch.is_grad_enabled() or _IN_FUNCTION.get()
    vars(tensor)["_held"] = array if old is None or records else _overwrite(old, array)


def _overwrite(old: jax.Array, new: jax.Array) -> jax.Array:
    alike = (old.shape, old.dtype) == (new.shape, new.dtype)
    if alike and jnp.issubdtype(old.dtype, jnp.inexact):
        return _written(old, new)
    return jax.lax.stop_gradient(new)


def _set_data(tensor: Any, other: Any) -> None:
    vars(tensor)["_held"] = _overwrite(tensor.jax(), other.jax())


# All writes to a tensor, by operators, by slices and by `.data`, set its array.
setattr(Tensor, "_elem", property(lambda tensor: vars(tensor)["_held"], _hold))  # noqa: B010
setattr(Tensor, "data", property(_alias, _set_data))  # noqa: B010
setattr(Tensor, "detach", _alias)  # noqa: B010


def call_jax(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of JAX's arrays with torchax's tensors; returns such tensors."""
    env = environment()
    return _frozen(env.j2t_iso(function(*env.t2j_iso(args))), args)


@contextlib.contextmanager
def _differentiated_functions() -> Iterator[None]:
    """Lets gradients through the forward of each ``torch.autograd.Function``, within a block.

    Torch runs it under ``no_grad``, for the Function's own backward; JAX differentiates it instead.
    """
    # A base of `Function` to which its `apply` leads, also one that somebody has a reference to.
    base: Any = torch.autograd.function._SingleLevelFunction
    outer = base.__dict__.get("apply")

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        token = _IN_FUNCTION.set(_IN_FUNCTION.get() or torch.is_grad_enabled())
        try:
            return super(base, cls).apply(*args, **kwargs)
        finally:
            _IN_FUNCTION.reset(token)

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        del base.apply
        if outer is not None:
            base.apply = outer


@functools.lru_cache(maxsize=1)
def environment() -> Environment:
    """Returns the environment that torch code runs in."""
    with jax.ensure_compile_time_eval():  # its key is an array, and no part of a traced program
        return _Environment()


@contextlib.contextmanager
def running(what: str) -> Iterator[Any]:
    """Runs torch code by JAX; yields torchax's environment.

    Args:
      what: the model, for messages.

    Raises:
      TorchModelError: an operator that has no lowering, or a value that decides what is computed;
        names both the operator and the module.
    """
    try:
        with LOCK, warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
            warnings.simplefilter("ignore")  # of torch's and torchax's own making
            env = environment()
            # With gradients, so that a module's own no_grad is known.
            with _differentiated_functions(), torch.enable_grad(), env:
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
