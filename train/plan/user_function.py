"""Plans a function that a user wrote: memory, FLOPs, time and traffic on any machine.

    from train import plan
    plan.function(step, adapter, opt_state, base, batch, topology="v5e:2x2", mesh={"fsdp": 4},
                  shardings=..., donate=(0, 1)).show()

The function is compiled by the compiler of the machine, from shapes alone.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from lora_jax.adapt.eqns import jaxpr_and_consts, scope_of
from lora_jax.adapt.user_code import user_line_of
from lora_jax.core.names import ALL_SCORES_REASONS
from lora_jax.training.remat import compiled_bytes, is_refusal
from train.console.errors import UserError
from train.plan.clock.groups import RECOMPUTED
from train.plan.clock.summary import Clock, clock_of
from train.plan.compile import (
    compile_largest,
    compiler_message,
    optimized_hlo_of,
    parse_refused_bytes,
)
from train.plan.flops.checked import HLO, StepWork, count_traced, step_work
from train.plan.flops.jaxpr import inner_jaxprs
from train.plan.hlo.slices import slices_in_hlo
from train.plan.machines import Machine, find_machine
from train.plan.user_plan import FunctionPlan, LargeArray

_MOST_ARRAYS = 8  # that a refusal lists
_CALLBACKS = ("pure_callback", "io_callback", "debug_callback")


def plan_function(
    fn: Callable[..., Any],
    *args: Any,
    topology: str,
    mesh: Mapping[str, int] | Mesh | None = None,
    shardings: Any = None,
    out_shardings: Any = None,
    donate: int | Sequence[int] = (),
    static: int | Sequence[int] = (),
    compiler_options: Mapping[str, Any] | None = None,
    machine: Machine | None = None,
) -> FunctionPlan:
    """Plans a function that you wrote, for a machine that need not be here.

    The compiler of the machine compiles the function from shapes alone. The plan has the memory of
    a device, FLOPs, bytes over links, and on TPUs the compiler's estimate of the time, by groups.

    Args:
      fn: the function, or ``jax.jit(fn, …)`` with options of its own.
      *args: arguments of the function. Arrays may be `jax.ShapeDtypeStruct`\\ s, with shardings if
        `shardings` is None; elements are never read.
      topology: "v5e:2x2", "h100:8", "rtx4090:1", "cpu:4" and the like, as `find_machine` takes it.
      mesh: the size of each axis of the mesh, such as ``{"fsdp": 4}``, or a mesh.
      shardings: a sharding of each argument that is not static: a `PartitionSpec`, a `Sharding`, or
        a tree of them. None stands for an argument that each device has whole.
      out_shardings: shardings of the result, in the same form; the compiler chooses by default.
      donate: positions of the arguments that are donated.
      static: positions of the arguments that are static.
      compiler_options: further options of the compiler.
      machine: the machine of the topology, if it was found already.

    Returns:
      The plan. ``plan.show()`` prints it, and its attributes hold the figures.

    Raises:
      UserError: the machine does not exist, the mesh or the shardings do not fit it, or the
        function cannot be traced.
    """
    machine = machine or find_machine(topology)
    device_mesh = mesh_of(mesh, machine)
    donated = _as_positions(donate)
    static_positions = _as_positions(static)
    abstract_args = list(args)
    for position, arg in enumerate(args):
        if position not in static_positions:
            # Shardings of arguments count only where no `shardings` are given.
            arg_mesh = device_mesh if shardings is None else None
            abstract_args[position] = _abstract_arg(arg, arg_mesh)
    jitted = _jit(
        fn, abstract_args, device_mesh, shardings, out_shardings, donated, static_positions
    )
    name = getattr(fn, "__name__", type(fn).__name__)
    start_seconds = time.perf_counter()
    with jax.set_mesh(device_mesh):
        traced = _trace(name, jitted, abstract_args)
        lowered = _lower(name, traced)
    compiled, error = _compile(lowered, machine, dict(compiler_options or {}))
    if compiled is not None:
        _check_devices_share(name, compiled, device_mesh)
    compile_seconds = time.perf_counter() - start_seconds
    hlo_text = None if compiled is None else optimized_hlo_of(compiled, lowered, machine)
    n_devices = len(machine.devices)
    work = step_work(
        hlo_text,
        count_traced(traced.jaxpr),
        n_devices,
        products_in_hlo=machine.platform != "gpu",
        slices=slices_in_hlo(device_mesh),
    )
    sizes = {} if compiled is None else _memory(compiled)
    if error is not None:
        sizes = parse_refused_bytes(str(error), {}, machine.capacity)
    total = sizes.get("total")
    fits_share = {
        f"{share:g}": total is not None and error is None and total <= share * machine.capacity
        for share in machine.shares
    }
    message = None if error is None else compiler_message(error)
    is_too_large = error is not None and is_refusal(error)
    has_arrays = is_too_large or not any(fits_share.values())
    return FunctionPlan(
        name=name,
        machine=machine,
        mesh=dict(device_mesh.shape),
        fits_share=fits_share,
        memory={**sizes, "capacity": machine.capacity},
        refused=message if is_too_large else None,
        failed=None if is_too_large else message,
        work=work,
        clock=_clock(hlo_text, machine, work),
        largest_arrays=_largest_arrays(traced.jaxpr) if has_arrays else (),
        unused_donations={} if compiled is None else _unused_donations(lowered, compiled),
        compile_seconds=compile_seconds,
        notes=(
            *work.notes,
            *_callback_notes(traced.jaxpr),
            *_attention_notes(traced.jaxpr),
            *machine.remarks,
        ),
    )


def mesh_of(mesh: Mapping[str, int] | Mesh | None, machine: Machine) -> Mesh:
    """Returns a mesh of a machine's devices, with automatic axes or the axes of a given mesh.

    Raises:
      UserError: the mesh has another number of devices than the machine, or none is given for
        several devices.
    """
    n_devices = len(machine.devices)
    if isinstance(mesh, Mesh):
        if set(mesh.devices.flat) == set(machine.devices):
            return mesh  # whose order of devices suits the links between them
        sizes = dict(mesh.shape)
        axis_types = mesh.axis_types
    else:
        sizes = dict(mesh or {})
        if not sizes and n_devices > 1:
            raise UserError(
                f"{machine.name} has {n_devices} devices, but no mesh is given, so every device "
                'would do all of the work. Pass a mesh, such as mesh={"fsdp": '
                f"{n_devices}}}, and shardings= for the arguments."
            )
        sizes = sizes or {"data": 1}
        n_named_devices = math.prod(size for size in sizes.values() if size != -1)
        # -1 stands for the remaining devices.
        for name, size in sizes.items():
            if size == -1:
                sizes[name] = max(1, n_devices // n_named_devices)
        axis_types = (AxisType.Auto,) * len(sizes)
    if math.prod(sizes.values()) != n_devices:
        raise UserError(
            f"The mesh {sizes} has {math.prod(sizes.values())} devices, but {machine.name} has "
            f"{n_devices}. Change the sizes, so that their product is {n_devices}."
        )
    grid = np.array(machine.devices).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=axis_types)


def _as_positions(positions: int | Sequence[int]) -> tuple[int, ...]:
    return (positions,) if isinstance(positions, int) else tuple(positions)


def _abstract_arg(arg: Any, mesh: Mesh | None) -> Any:
    """Returns an argument with abstract arrays in place of its arrays.

    Args:
      arg: a pytree. Leaves that are no arrays stay.
      mesh: the mesh of the shardings of `jax.ShapeDtypeStruct`s; None removes these shardings.

    Raises:
      UserError: a sharding belongs to other devices.
    """

    def as_struct(leaf: Any) -> Any:
        """Returns the abstract array of a leaf; leaves that are not arrays stay unchanged."""
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        sharding = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            weak_type=getattr(leaf, "weak_type", False),
            sharding=None if sharding is None or mesh is None else _place_on_mesh(sharding, mesh),
        )

    return jax.tree.map(as_struct, arg)


def _jit(
    fn: Callable[..., Any],
    args: Sequence[Any],
    mesh: Mesh,
    shardings: Any,
    out_shardings: Any,
    donated: tuple[int, ...],
    static: tuple[int, ...],
) -> Any:
    """Returns the compiled form of a function, with shardings on a mesh.

    Raises:
      UserError: several devices have no shardings; or the function has options of `jax.jit` already
        and gets them here again.
    """
    if hasattr(fn, "trace"):  # under jax.jit already
        options = {
            "shardings": shardings is not None,
            "out_shardings": out_shardings is not None,
            "donate": bool(donated),
            "static": bool(static),
        }
        refused_options = [option for option, is_used in options.items() if is_used]
        if refused_options:
            raise UserError(
                f"{', '.join(refused_options)} cannot be given for a function under jax.jit, which "
                "has options of its own. Pass the plain function, or give the options to jax.jit."
            )
        return fn
    struct_shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(list(args))]
    has_shardings = any(sharding is not None for sharding in struct_shardings)
    if shardings is None and mesh.size > 1 and not has_shardings:
        raise UserError(
            f"The mesh {dict(mesh.shape)} has {mesh.size} devices, but no shardings are given, so "
            "every device would do all of the work. Pass shardings=, with a PartitionSpec, or a "
            "tree of them, for each argument."
        )
    n_traced = len(args) - len(static)
    jit_options: dict[str, Any] = {}
    if shardings is not None:
        if len(shardings) != n_traced:
            raise UserError(
                f"shardings has {len(shardings)} entries, but the function has {n_traced} "
                "arguments that are not static. Give one entry for each of them."
            )
        in_shardings = tuple(_place_on_mesh(sharding, mesh) for sharding in shardings)
        jit_options["in_shardings"] = in_shardings
    if out_shardings is not None:
        jit_options["out_shardings"] = _place_on_mesh(out_shardings, mesh)
    return jax.jit(
        fn,
        donate_argnums=donated,
        static_argnums=static,
        **jit_options,
    )


def _check_devices_share(name: str, compiled: Any, mesh: Mesh) -> None:
    """Raises a UserError if all arguments are replicated on several devices."""
    in_shardings = jax.tree.leaves(compiled.input_shardings)
    is_shared = any(not sharding.is_fully_replicated for sharding in in_shardings)
    if mesh.size > 1 and not is_shared:
        raise UserError(
            f"Every device would do all of the work of {name}, because each of the {mesh.size} "
            "devices has all of each argument. Give the arguments shardings on the mesh, by "
            "shardings= for a plain function, by in_shardings= of jax.jit, or by sharding= of "
            "jax.ShapeDtypeStruct."
        )


def _place_on_mesh(shardings: Any, mesh: Mesh) -> Any:
    """Returns the shardings on a mesh for specs, or for shardings on other devices."""

    def place(sharding: Any) -> Sharding:
        """Returns a sharding on the mesh; raises a UserError if it belongs to another mesh."""
        if sharding is None:
            return NamedSharding(mesh, PartitionSpec())
        if isinstance(sharding, PartitionSpec):
            return NamedSharding(mesh, sharding)
        if isinstance(sharding, NamedSharding) and dict(sharding.mesh.shape) == dict(mesh.shape):
            return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
        raise UserError(
            f"The sharding {sharding} belongs to other devices than those of the plan, whose mesh "
            f"is {dict(mesh.shape)}. Pass a PartitionSpec, or make_step(mesh) that uses the mesh "
            "that it gets."
        )

    return jax.tree.map(
        place, shardings, is_leaf=lambda node: node is None or isinstance(node, PartitionSpec)
    )


def _trace(name: str, jitted: Any, args: Sequence[Any]) -> Any:
    """Returns the traced function.

    Raises:
      UserError: the function cannot be traced; the message is the function's own.
    """
    try:
        return jitted.trace(*args)
    except UserError:
        raise
    except Exception as error:  # whatever the user's code raises
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{name} cannot be traced with these arguments: {type(error).__name__}: "
            f"{reason[0] if reason else ''}. Check that jax.eval_shape(fn, *args) works."
        ) from error


def _lower(name: str, traced: Any) -> Any:
    """Returns the lowered function.

    Raises:
      UserError: the function cannot be lowered, for example because a class of its arguments
        refuses fields that are no arrays.
    """
    try:
        return traced.lower()
    except Exception as error:  # JAX's, or of the user's classes
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{name} cannot be lowered: {type(error).__name__}: {reason[0] if reason else ''} If a "
            "class of the arguments checks the types of its fields, switch the check off, for "
            'example by jaxtyping.config.update("jaxtyping_disable", True).'
        ) from error


def _compile(
    lowered: Any, machine: Machine, options: dict[str, Any]
) -> tuple[Any, jax.errors.JaxRuntimeError | None]:
    """Returns the compiled program and None, or None and the compiler's error."""
    compilations = [{**compilation, **options} for compilation in machine.compilations]
    try:
        return compile_largest(lowered, compilations), None
    except jax.errors.JaxRuntimeError as error:
        return None, error


def _memory(compiled: Any) -> dict[str, int | None]:
    """Returns the bytes of a device that a program needs, by use.

    Raises:
      UserError: the compiler does not report them.
    """
    sizes = compiled_bytes(compiled)
    if not sizes:
        raise UserError("This compiler does not report how much memory a program needs.")
    # A donated argument becomes an output, so both count its bytes.
    return {
        "arguments": sizes["arguments"],
        "outputs": sizes["outputs"] - sizes["aliased"],
        "temporaries": sizes["temporaries"],
        "program": sizes["program"],
        "total": sum(sizes.values()) - 2 * sizes["aliased"],
    }


def _clock(hlo_text: str | None, machine: Machine, work: StepWork) -> Clock | None:
    """Returns the estimate of a program; its MFU counts no product that is recomputed."""
    # On several devices, gathered kernels would be taken for activations.
    clock = clock_of(hlo_text, machine, finds_attention=len(machine.devices) == 1)
    if clock is None or clock.seconds is None or not machine.flops or work.source != HLO:
        return clock
    hides_remat = bool(work.kernels)  # a kernel recomputes inside, where nothing shows it
    if hides_remat or work.per_chip is None or not clock.seconds:
        return clock
    recomputed = sum(group.flops for group in clock.groups if group.phase == RECOMPUTED)
    needed = work.per_chip - recomputed
    return dataclasses.replace(
        clock,
        mfu=needed / (machine.flops * clock.seconds),
        model_flops=needed * len(machine.devices),
    )


def _largest_arrays(jaxpr: Any) -> tuple[LargeArray, ...]:
    """Returns the largest arrays that a function computes, the largest first."""
    arrays: dict[tuple[str, tuple[int, ...], str], LargeArray] = {}
    for eqn in _equations(jaxpr):
        for variable in eqn.outvars:
            aval: Any = variable.aval
            if not hasattr(aval, "shape") or not hasattr(aval.dtype, "itemsize"):
                continue
            line = str(user_line_of(eqn))
            n_bytes = math.prod(aval.shape) * aval.dtype.itemsize
            key = (str(aval.dtype), tuple(aval.shape), line)
            arrays[key] = LargeArray(dtype=key[0], shape=key[1], n_bytes=n_bytes, line=line)
    by_size = sorted(arrays.values(), key=lambda array: array.n_bytes, reverse=True)
    return tuple(by_size[:_MOST_ARRAYS])


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Yields the equations of a jaxpr and of its inner jaxprs that compute something."""
    inner, _ = jaxpr_and_consts(jaxpr)
    for eqn in inner.eqns:
        bodies = list(inner_jaxprs(eqn))
        for body in bodies:
            yield from _equations(body)
        if not bodies:
            yield eqn


def _callback_notes(jaxpr: Any) -> tuple[str, ...]:
    """Returns a note on calls of Python, whose time and memory no compiler knows."""
    names = {eqn.primitive.name for eqn in _equations(jaxpr)} & {*_CALLBACKS}
    if not names:
        return ()
    return (
        f"The function calls Python on the host ({', '.join(sorted(names))}). The plan leaves out "
        "the time and the memory of these calls.",
    )


def _attention_notes(jaxpr: Any) -> tuple[str, ...]:
    """Returns a note for each reason why attention holds all scores, with the most scores."""
    largest_shapes: dict[str, tuple[int, ...]] = {}
    for eqn in _equations(jaxpr):
        name = next((name for name in ALL_SCORES_REASONS if name in scope_of(eqn)), None)
        shape = tuple(getattr(eqn.outvars[0].aval, "shape", ()))
        if name is not None and math.prod(shape) > math.prod(largest_shapes.get(name, (0,))):
            largest_shapes[name] = shape
    return tuple(
        f"A call of attention holds all scores, in arrays of up to {list(shape)}, because "
        f"{ALL_SCORES_REASONS[name]}. Other calls run on a kernel or block by block."
        for name, shape in largest_shapes.items()
    )


def _unused_donations(lowered: Any, compiled: Any) -> dict[str, int]:
    """Returns the bytes per device of each donated input that no output replaces, by path.

    An output can replace an input of its dtype, its shape on one device, and its sharding.
    """
    treedef: Any
    infos, treedef = jax.tree.flatten_with_path(lowered.args_info)
    in_shardings = treedef.flatten_up_to(compiled.input_shardings)
    out_infos = jax.tree.leaves(lowered.out_info)
    out_shardings = jax.tree.leaves(compiled.output_shardings)
    outputs = list(map(_replaceable, out_infos, out_shardings))
    unused: dict[str, int] = {}
    for (key_path, info), sharding in zip(infos, in_shardings, strict=True):
        is_read = sharding is not None
        if not info.donated or not is_read:
            continue
        key = _replaceable(info, sharding)
        if key in outputs:
            outputs.remove(key)
            continue
        path = jax.tree_util.keystr(key_path, simple=True, separator="/")
        unused[path] = math.prod(key[1]) * info.dtype.itemsize
    return unused


def _replaceable(info: Any, sharding: Any) -> tuple[Any, ...]:
    """Returns the properties that an output must share to replace a donated input."""
    return (info.dtype, tuple(sharding.shard_shape(info.shape)))
