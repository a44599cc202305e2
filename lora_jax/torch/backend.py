"""Imports torchax, which runs torch modules with JAX, and calls modules in its environment."""

import contextlib
import functools
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch.utils import _pytree as torch_tree

from lora_jax.torch.packages import TorchModelError

# Operators that torch removed and that torchax 0.0.13 has in its tables: overloads with named
# dimensions (torch 2.13), `cholesky` and `qr` (2.14). No program calls them, so a name is enough.
_REMOVED_OPERATORS = """
all.dimname all.dimname_out any.dimname any.dimname_out index_add.dimname index_copy.dimname
index_copy_.dimname index_fill.Dimname_Scalar index_fill.Dimname_Tensor
index_fill_.Dimname_Scalar index_fill_.Dimname_Tensor norm.names_ScalarOpt_dim
norm.names_ScalarOpt_dim_dtype norm.names_dtype_out norm.names_out prod.dim_Dimname
std.correction_names std.correction_names_out std.names_dim std.names_out
std_mean.correction_names std_mean.names_dim unbind.Dimname cholesky qr
"""


def _name_removed_operators() -> torch.library.Library:
    """Defines removed operators again, while the returned library object exists."""
    library = torch.library.Library("aten", "FRAGMENT")
    for name in _REMOVED_OPERATORS.split():
        operator, _, overload = name.partition(".")
        overloads = getattr(torch.ops.aten, operator, None)
        if overloads is None or (overload or "default") not in overloads.overloads():
            library.define(f"{name}(Tensor self) -> Tensor")
    return library


_OPERATORS = _name_removed_operators()
os.environ.setdefault("ENABLE_RUNTIME_UPTIME_TELEMETRY", "0")  # torchax would turn it on
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchax.tensor import Environment, OperatorNotFound, Tensor
    from torchax.view import View, ViewInfo

LOCK = threading.RLock()  # a module's arrays and parts are exchanged while it is traced
_CALLED = ContextVar("called", default=False)  # a Function is called with grad
_IN_FUNCTION = ContextVar("differentiated", default=False)  # the forward of such a Function runs
_ABSENT = object()
_TO_ARGUMENTS = ("dtype", "device")  # arguments of ``torch.tensor`` that ``Tensor.to`` has, too


class _OperatorError(Exception):
    """Torchax cannot compute an operator; the message is the operator's name."""


@contextlib.contextmanager
def set_attributes(attributes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Sets attributes, (owner, name, value), within a block; restores them after it."""
    originals: list[tuple[Any, str, Any]] = []
    try:
        for owner, name, value in attributes:
            originals.append((owner, name, vars(owner).get(name, _ABSENT)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(originals):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


class _Environment(Environment):  # type: ignore[misc]  # torchax has no types
    """torchax's environment, in which ``torch.no_grad`` inside a module works as in torch.

    The original environment ignores ``torch.no_grad``. It also refuses operators that mix its
    tensors with torch's, which a module makes where it names no device.
    """

    def dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Computes an operator; its output has no gradient under ``no_grad``.

        Raises:
          _OperatorError: torchax cannot compute the operator of these arguments.
        """
        if func is torch.ops.aten.detach.default and isinstance(args[0], View):
            return _alias(args[0])
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and isinstance(args[0], Tensor | View):
            if func is torch.tensor:
                args = (Tensor(lax.stop_gradient(args[0].jax()), self),)
            func, kwargs = torch.Tensor.to, {name: kwargs.get(name) for name in _TO_ARGUMENTS}
        elif func is torch.Tensor.__getitem__ and any(map(_is_jax, torch_tree.tree_leaves(args))):
            args = (self._constant(args[0]), *args[1:])
        has_fp64 = any(map(_is_fp64, torch_tree.tree_leaves((args, kwargs))))
        try:
            # JAX has no fp64 by default. Some models compute the angles of positions in fp64.
            with jax.enable_x64(True) if has_fp64 else contextlib.nullcontext():
                out = super().dispatch(func, types, args, kwargs)
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise _OperatorError(torch.overrides.resolve_name(func) or str(func)) from error
        return _respect_no_grad(out, (args, kwargs))

    def t2j_iso(self, tensors: Any) -> Any:
        """Converts tensors in a tree to JAX's arrays."""
        return super().t2j_iso(torch_tree.tree_map_only(torch.Tensor, self._constant, tensors))

    def _constant(self, tensor: Any) -> Any:
        """Converts a tensor of torch to a constant of the program; a scalar stays as it is."""
        is_array = not _is_jax(tensor) and tensor.ndim > 0
        return Tensor(self.t2j_copy(tensor), self) if is_array else tensor


def _is_jax(value: Any) -> bool:
    return isinstance(value, Tensor | View)


def _is_fp64(value: Any) -> bool:
    """Returns True for the dtype fp64 and for tensors of fp64."""
    dtype = value.dtype if isinstance(value, torch.Tensor) else value
    return dtype is torch.float64 or dtype is torch.complex128


def _respect_no_grad(out: Any, args: Any) -> Any:
    """Returns an operator's output, and stops its gradient under ``no_grad``.

    A tensor that is also an argument of the operator is returned as it is, as in torch.
    """
    if torch.is_grad_enabled() or _IN_FUNCTION.get():
        return out
    argument_ids = set(map(id, torch_tree.tree_leaves(args)))

    def without_gradient(tensor: Any) -> Any:
        return tensor if id(tensor) in argument_ids else _stop_gradient(tensor)

    return torch_tree.tree_map_only((Tensor, View), without_gradient, out)


def _stop_gradient(tensor: Any) -> Any:
    """Returns a tensor without a gradient; a slice stays a view that can be written to."""
    is_slice = isinstance(tensor, View)
    return _alias(tensor) if is_slice else Tensor(lax.stop_gradient(tensor.jax()), tensor._env)


def _alias(tensor: Any) -> Any:
    """Returns a view of a tensor for reads and writes that have no gradient."""
    has_gradients = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    return View(tensor, _StoppedView(), tensor._env) if has_gradients else tensor


class _StoppedView(ViewInfo):  # type: ignore[misc]  # torchax has no types
    """A view of a whole tensor, whose reads and writes have no gradient."""

    def transform_tensor(self, jax_array: jax.Array) -> jax.Array:
        return lax.stop_gradient(jax_array)

    def update_tensor(self, new_value: jax.Array, jax_array: jax.Array) -> jax.Array:
        return _overwrite(jax_array, new_value)

    def calculate_output_shape(self, source: jax.Array) -> tuple[int, ...]:
        return source.shape


# (old, new) -> the new array, with the gradient of the old one.
_write_with_old_gradient = jax.custom_jvp(lambda old, new: new)
_write_with_old_gradient.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def _overwrite(old: jax.Array, new: jax.Array) -> jax.Array:
    """Returns the new array with the gradient of the old array, if shape and dtype allow that."""
    has_same_form = (old.shape, old.dtype) == (new.shape, new.dtype)
    keeps_gradient = has_same_form and jnp.issubdtype(old.dtype, jnp.inexact)
    array: jax.Array = (
        _write_with_old_gradient(old, new) if keeps_gradient else lax.stop_gradient(new)
    )
    return array


def _set_array(tensor: Any, array: jax.Array) -> None:
    """Sets the array of a tensor; a write under ``no_grad`` changes no gradient."""
    old = vars(tensor).get("_elem")
    has_gradients = torch.is_grad_enabled() or _IN_FUNCTION.get()
    vars(tensor)["_elem"] = array if old is None or has_gradients else _overwrite(old, array)


def _set_data(tensor: Any, other: Any) -> None:
    vars(tensor)["_elem"] = _overwrite(tensor.jax(), other.jax())


def _function_attribute(function: Any, name: str) -> Any:
    """Returns an attribute of a ``torch.autograd.Function``, whose forward JAX differentiates.

    Torch looks up `_backward_cls` when a Function is called. It then runs `forward` under
    ``no_grad``, because the Function has its own backward. JAX differentiates the forward instead.
    The method ``apply`` cannot be replaced, because modules may hold a reference to it.
    """
    attribute = type.__getattribute__(function, name)
    if name == "_backward_cls":
        _CALLED.set(torch.is_grad_enabled())
    if name != "forward":
        return attribute
    has_gradients = _IN_FUNCTION.get() or _CALLED.get()
    _CALLED.set(False)

    @functools.wraps(attribute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        """Runs the forward function, and differentiates it if gradients are needed."""
        token = _IN_FUNCTION.set(has_gradients)
        try:
            return attribute(*args, **kwargs)
        finally:
            _IN_FUNCTION.reset(token)

    return forward


# Replacements in torchax and torch while a module runs, by which gradients are torch's.
_TORCH_BEHAVIOR: list[tuple[Any, str, Any]] = [
    # All writes to a tensor, by operators, by slices and by `.data`, set its array.
    (Tensor, "_elem", property(lambda tensor: vars(tensor)["_elem"], _set_array)),
    (Tensor, "data", property(_alias, _set_data)),
    (Tensor, "detach", _alias),
    # torchax's own changes the tensor, and fails for views.
    (Tensor, "type_as", lambda tensor, other: tensor.to(other.dtype)),
    (type(torch.autograd.Function), "__getattribute__", _function_attribute),
    # transformers checks inputs by it, but a compiled program cannot look at values.
    (torch, "_check_tensor_all_with", lambda *args: None),
]


_DEFINITIONS: dict[Any, Callable[..., Any]] = {}  # by torch's function


def define_function(function: Any, definition: Callable[..., Any]) -> None:
    """Makes torch code call `definition`, with torchax's tensors, where it calls `function`."""
    _DEFINITIONS[function] = definition


@functools.lru_cache(maxsize=1)
def environment() -> Environment:
    """Returns the environment that torch code runs in."""
    with jax.ensure_compile_time_eval():  # its key is an array, and no part of a traced program
        env = _Environment()
    for function, definition in _DEFINITIONS.items():
        env.override_op_definition(function, definition)
    return env


def to_torch(tree: Any) -> Any:
    """Converts JAX's and NumPy's arrays in a tree to torchax's tensors."""
    env = environment()
    return torch_tree.tree_map_only(
        (jax.Array, np.ndarray), lambda x: Tensor(jnp.asarray(x), env), tree
    )


def call_module(
    module: torch.nn.Module, arrays: Mapping[str, Any], args: Any, kwargs: Mapping[str, Any]
) -> Any:
    """Calls a module with JAX's arrays as its parameters and buffers, by name."""
    tensors: Any = to_torch((dict(arrays), tuple(args), dict(kwargs)))
    return torch.func.functional_call(module, *tensors, tie_weights=False)


def to_jax_arrays(tree: Any) -> Any:
    """Converts tensors in a tree to JAX's arrays."""
    return environment().t2j_iso(tree)


def call_jax(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of JAX arrays with torchax tensors; returns torchax tensors."""
    return _respect_no_grad(to_torch(function(*to_jax_arrays(args))), args)


# Errors of code that asks for the value of an array that a compiled program computes.
_VALUE_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


@contextlib.contextmanager
def run_with_jax(model_name: str) -> Iterator[None]:
    """Runs torch code with JAX within a block.

    Args:
      model_name: the name of the model in messages.

    Raises:
      TorchModelError: an operator has no lowering, or the code branches on a computed value; names
        the operator and the module.
    """
    try:
        with LOCK, warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
            warnings.simplefilter("ignore")  # of torch's and torchax's own making
            # Gradients are on, so that a module's own no_grad can be noticed.
            with set_attributes(_TORCH_BEHAVIOR), torch.enable_grad(), environment():
                yield
    except OperatorNotFound as error:
        operator = str(error).removeprefix("Operator with name ").removesuffix(" has no lowering")
        raise TorchModelError(
            f"{model_name}: {_where_raised(error)} calls the operator {operator}, "
            "which torchax cannot lower to JAX. Use another model, or replace this operator."
        ) from error
    except _OperatorError as error:
        reason = str(error.__cause__).partition("\n")[0]
        raise TorchModelError(
            f"{model_name}: {_where_raised(error)} calls the operator {error}, "
            f"which torchax cannot compute ({reason}). Use another model, or replace this operator."
        ) from error
    except _VALUE_ERRORS as error:
        first = str(error).splitlines()[0]
        raise TorchModelError(
            f"{model_name}: {_where_raised(error)} lets a computed value decide what is computed, "
            f"which no compiled program can: {first}"
        ) from error


def _where_raised(error: Exception) -> str:
    """Returns the innermost module that raised an error, with its file and line."""
    module, line = "the model", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            module = type(owner).__name__
            file = os.path.basename(frame.f_code.co_filename)
            line = f" ({file}, line {number})" if file != "module.py" else line
    return module + line
