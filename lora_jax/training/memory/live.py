"""The most memory that a traced function takes on a device, from the live ranges of its values.

Nothing is compiled. The model of a compiler: what is elementwise is fused into what reads it, and
takes no memory until a product, a loop, a kernel or a second reader needs it as an array; a value
is in memory from where it is made to where it is read last, in the order of the program; what a
loop stacks up is there, whole, from its beginning.
"""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from lora_jax.adapt.eqns import (
    AnyJaxpr,
    Atom,
    ShardMap,
    is_literal,
    opened,
    scan_of,
    shard_map_of,
    type_of,
    while_of,
)
from lora_jax.adapt.needed import needed_equations
from lora_jax.core.extend import ClosedJaxpr, Jaxpr, JaxprEqn
from lora_jax.core.types import Shaped, Tree
from lora_jax.training.layout import Layout
from lora_jax.training.memory.axes import (
    Axes,
    axes_of,
    bytes_of_part,
    gathered_operands,
    merged,
    output_axes,
)
from lora_jax.training.step import State

_LANES = 128  # of a register of a TPU
_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"})
_INLINED |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "few_rows"}
_PRODUCTS = frozenset({"dot_general", "ragged_dot_general", "conv_general_dilated"})
# The same bytes under another shape or name.
_VIEWS = frozenset({"reshape", "squeeze", "name", "sharding_constraint", "optimization_barrier"})
_VIEWS |= {"copy", "copy_p", "stop_gradient", "pvary", "pcast"}
# Computed into arrays; all others that hold no jaxpr are fused.
_WRITTEN = frozenset({"sort", "top_k", "scatter", "scatter-add", "cumsum", "fft", "gather"})
_WRITTEN |= {"pallas_call", "flash_kernel", "ffi_call", "random_bits", "device_put"}
_WRITTEN |= {"cholesky", "qr", "eigh", "svd"}
_GAPS = 1.05  # a compiler's heap has gaps between its buffers


class Buffer:
    """Bytes of a device, from the moment that writes them to the last one that reads them.

    Attributes:
      size: their number; 0 for what an outer program counts.
      is_frozen: whether a base's arrays alone are in it, which no step changes.
    """

    __slots__ = ("is_frozen", "size")

    def __init__(self, size: int, *, is_frozen: bool = False) -> None:
        self.size, self.is_frozen = size, is_frozen


@dataclasses.dataclass(frozen=True)
class Event:
    """A moment of a program.

    Attributes:
      reads, writes: buffers.
      alone: bytes that it takes for itself, such as those of a loop's body.
      in_place: whether it may write where it reads for the last time.
    """

    reads: frozenset[Buffer]
    writes: tuple[Buffer, ...]
    alone: int = 0
    in_place: bool = True


def peak(events: Sequence[Event], begin: Iterable[Buffer], end: Collection[Buffer]) -> int:
    """Returns the most bytes at any moment.

    Args:
      events: in order.
      begin, end: buffers that are there from the beginning, and until the end.

    >>> from lora_jax.training.memory.live import Buffer, Event, peak
    >>> a, b, c = Buffer(5), Buffer(3), Buffer(2)
    >>> product = Event(frozenset({a}), (b,), in_place=False)
    >>> peak([product, Event(frozenset({b}), (c,), alone=4)], [a], [c])
    8
    """
    last = {buf: at for at, event in enumerate(events) for buf in (*event.reads, *event.writes)}
    last |= dict.fromkeys(end, len(events))
    ending: dict[int, set[Buffer]] = {}
    for buffer, at in last.items():
        ending.setdefault(at, set()).add(buffer)
    live = {*begin}
    size = most = _bytes(live)
    for at, event in enumerate(events):
        new, dying = {*event.writes} - live, ending.get(at, set())
        made, freed = _bytes(new), _bytes(dying & live)
        most = max(most, size + event.alone + (max(0, made - freed) if event.in_place else made))
        live |= new
        gone = dying & live
        live -= gone
        size += made - _bytes(gone)
    return most


def _bytes(buffers: Iterable[Buffer]) -> int:
    return sum(buffer.size for buffer in buffers)


class _Store:
    """The bytes behind a value: an array in memory, or an expression of arrays (`sources`)."""

    __slots__ = ("size", "sources", "written")

    def __init__(self, size: int, sources: Iterable[Buffer], *, written: bool) -> None:
        self.size, self.sources, self.written = size, frozenset(sources), written

    @property
    def is_frozen(self) -> bool:
        """Returns True if it depends on a base's arrays alone."""
        return bool(self.sources) and all(source.is_frozen for source in self.sources)


class _Value(NamedTuple):
    axes: Axes
    store: _Store


def _outside(axes: Axes, *, is_frozen: bool = False) -> _Value:
    """Returns a value of an outer program, which counts its bytes."""
    return _Value(axes, _Store(0, (Buffer(0, is_frozen=is_frozen),), written=True))


class _Program:
    """The events of a function on one device, in order.

    Attributes:
      mesh: the sizes of the mesh's axes.
      on_tpu: whether the compiler is a TPU's.
      events: so far.
      gathered: what is gathered of arguments alone.
    """

    def __init__(self, mesh: Mapping[str, int], *, on_tpu: bool) -> None:
        self.mesh, self.on_tpu = mesh, on_tpu
        self.events: list[Event] = []
        self.gathered: list[Buffer] = []
        self._readers = Counter[Any]()

    def run(self, jaxpr: AnyJaxpr, values: Sequence[_Value]) -> list[_Value]:
        """Appends the events of a jaxpr whose inputs are `values`; returns its outputs."""
        inner, _ = opened(jaxpr)
        known: dict[Any, _Value] = {
            var: _outside(((),) * int(type_of(var).ndim)) for var in inner.constvars
        }
        known |= dict(zip(inner.invars, values, strict=True))
        wanted = (True,) * len(inner.outvars)
        equations = [eqn for eqn, *_ in needed_equations(inner, wanted).equations]
        readers = Counter(atom for eqn in equations for atom in {*filter(_is_var, eqn.invars)})
        readers.update(filter(_is_var, inner.outvars))

        def value(atom: Atom) -> _Value:
            if is_literal(atom):
                return _Value(((),) * int(type_of(atom).ndim), _Store(0, (), written=False))
            return known[atom]

        for eqn in equations:
            self._readers = readers
            outputs = self._equation(eqn, [value(atom) for atom in eqn.invars])
            for out, made in zip(eqn.outvars, outputs, strict=True):
                known[out] = made
                joins = len(made.store.sources) > 1 and eqn.primitive.name not in _VIEWS
                if joins and readers[out] > 1:
                    self.write(made)
        return [value(atom) for atom in inner.outvars]

    def write(self, value: _Value) -> frozenset[Buffer]:
        """Makes an array of a value, unless it is one; returns the buffers to read it from."""
        store = value.store
        if not store.written and store.sources:
            buffer = Buffer(store.size)
            self.events.append(Event(store.sources, (buffer,), in_place=not self.on_tpu))
            store.sources, store.written = frozenset({buffer}), True
        return store.sources

    def write_all(self, values: Iterable[_Value]) -> frozenset[Buffer]:
        """Makes arrays of values."""
        return frozenset[Buffer]().union(*map(self.write, values))

    def _size(self, aval: Any, axes: Axes) -> int:
        """Returns the bytes of an array; a TPU fills its heads up to the width of a register."""
        size = bytes_of_part(aval, axes, self.mesh)
        width: int = aval.shape[-1] if len(axes) >= 3 else _LANES
        if self.on_tpu and _LANES // 4 <= width < _LANES:
            return size * _LANES // width
        return size

    def _new(self, aval: Any, axes: Axes, size: int | None = None) -> _Value:
        buffer = Buffer(self._size(aval, axes) if size is None else size)
        return _Value(axes, _Store(buffer.size, (buffer,), written=True))

    def _add(self, reads: frozenset[Buffer], made: Sequence[_Value], **event: Any) -> list[_Value]:
        """Appends an event that writes values; returns them."""
        writes = tuple(buffer for value in made for buffer in value.store.sources)
        self.events.append(Event(reads, writes, **event))
        return [*made]

    def _equation(self, eqn: JaxprEqn, values: Sequence[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        if name in _INLINED and (inner := next(_jaxprs(eqn), None)) is not None:
            return self.run(inner, values[len(values) - len(opened(inner)[0].invars) :])
        if name == "scan":
            return self._scan(eqn, values)
        if name == "cond" and eqn.params.get("branches_platforms"):
            return self.run(self._lowered_branch(eqn), values[1:])
        if name in ("while", "cond", "shard_map"):
            return self._nested(eqn, values)
        axes = output_axes(eqn, [value.axes for value in values])
        avals = [type_of(out) for out in eqn.outvars]
        if name in _VIEWS:
            of = zip(eqn.invars, values, avals, axes, strict=True)
            return [self._view(atom, *view) for atom, *view in of]
        if name in _PRODUCTS:
            return self._product(eqn, values, axes[0])
        if name in _WRITTEN or next(_jaxprs(eqn), None) is not None:
            made = [self._new(aval, named) for aval, named in zip(avals, axes, strict=True)]
            in_place = name.startswith("scatter")
            return self._add(self.write_all(values), made, in_place=in_place)
        sources = frozenset[Buffer]().union(*(value.store.sources for value in values))
        return [
            _Value(named, _Store(self._size(aval, named), sources, written=False))
            for aval, named in zip(avals, axes, strict=True)
        ]

    def _lowered_branch(self, eqn: JaxprEqn) -> Any:
        """Returns the branch of ``lax.platform_dependent`` that is lowered for the platform."""
        platform = "tpu" if self.on_tpu else "cpu"
        pairs = zip(eqn.params["branches_platforms"], eqn.params["branches"], strict=True)
        return next(branch for names, branch in pairs if names is None or platform in names)

    def _view(self, atom: Atom, value: _Value, aval: Any, axes: Axes) -> _Value:
        """Returns a view of a value; where it is gathered, it is written anew."""
        store = value.store
        before = bytes_of_part(type_of(atom), value.axes, self.mesh)
        if bytes_of_part(aval, axes, self.mesh) <= before or not store.sources:
            if not store.written:
                store.size = max(store.size, self._size(aval, axes))
            return _Value(axes, store)
        made = self._new(aval, axes)
        if store.is_frozen:  # gathered early, beside other work
            self.gathered += made.store.sources
        return self._add(store.sources, [made], in_place=False)[0]

    def _product(self, eqn: JaxprEqn, values: Sequence[_Value], axes: Axes) -> list[_Value]:
        """Handles a product: a TPU's decodes its kernels on the fly; some are gathered for it.

        A ragged one is a kernel there, for which they are written.
        Others than TPUs multiply operands of one dtype alone: the narrower one is written again.
        """
        reads, alone = frozenset[Buffer](), 0
        can_fuse = self.on_tpu and eqn.primitive.name != "ragged_dot_general"
        for atom, value in zip(eqn.invars, values, strict=True):
            fuses = value.store.is_frozen or (_is_var(atom) and self._readers[atom] == 1)
            reads |= value.store.sources if fuses and can_fuse else self.write(value)
        if eqn.primitive.name != "conv_general_dilated":
            placed = [value.axes for value in values[:2]]
            left = gathered_operands(eqn, placed, axes)
            avals = [type_of(atom) for atom in eqn.invars[:2]]
            widest = max(aval.dtype.itemsize for aval in avals)
            for aval, own, kept in zip(avals, placed, left, strict=True):
                size = bytes_of_part(aval, kept or own, self.mesh)
                alone += size * (kept is not None)
                if not self.on_tpu and aval.dtype.itemsize < widest:
                    alone += size * widest // aval.dtype.itemsize
        made = self._new(type_of(eqn.outvars[0]), axes)
        return self._add(reads, [made], alone=alone, in_place=False)

    def _scan(self, eqn: JaxprEqn, values: Sequence[_Value]) -> list[_Value]:
        scan = scan_of(eqn)
        body, n, m = opened(scan.body)[0], scan.n_consts, scan.n_carry
        axes = [v.axes if at < n + m else v.axes[1:] for at, v in enumerate(values)]
        for _ in range(2):  # a carry is sharded as it comes back
            inner = _Program(self.mesh, on_tpu=self.on_tpu)
            inside = [
                _outside(named, is_frozen=value.store.is_frozen)
                for named, value in zip(axes, values, strict=True)
            ]
            outs = inner.run(scan.body, inside)
            for at in range(m):
                shape = type_of(body.outvars[at]).shape
                axes[n + at] = merged(shape, [axes[n + at], outs[at].axes])
        end = inner.write_all(outs)
        made = [
            self._new(type_of(out), v.axes) for out, v in zip(eqn.outvars, outs[:m], strict=False)
        ]
        for out, value in zip(eqn.outvars[m:], outs[m:], strict=True):
            named, size = ((), *value.axes), scan.length * value.store.size
            made.append(self._new(type_of(out), named, size or None))
        alone = peak(inner.events, (), end)
        return self._add(self.write_all(values), made, alone=alone)

    def _nested(self, eqn: JaxprEqn, values: Sequence[_Value]) -> list[_Value]:
        """Handles an equation whose bodies read its operands as they are, or a device's part."""
        name, mesh, given = eqn.primitive.name, self.mesh, values
        shard = shard_map_of(eqn) if name == "shard_map" else None
        if shard:
            bodies, mesh = [shard.body], {}
            given = [_Value(((),) * len(value.axes), value.store) for value in values]
        elif name == "cond":
            bodies, given = [*eqn.params["branches"]], values[1:]
        else:
            loop = while_of(eqn)
            bodies, given = [loop.body], values[loop.n_condition_consts :]
        alone, outs = 0, list[_Value]()
        for body in bodies:
            inner = _Program(mesh, on_tpu=self.on_tpu)
            frozen = [value.store.is_frozen for value in given]
            inside = [_outside(v.axes, is_frozen=is_) for v, is_ in zip(given, frozen, strict=True)]
            outs = inner.run(body, inside)
            end = inner.write_all(outs)
            alone = max(alone, peak(inner.events, (), end) - sum(buffer.size for buffer in end))
        axes = [out.axes for out in outs]
        if shard:
            axes = _axes_in(shard.mesh, shard.out_specs, eqn.outvars)
            alone += self._gathered_for(eqn, values, shard)
        made = [
            self._new(type_of(out), named) for out, named in zip(eqn.outvars, axes, strict=True)
        ]
        return self._add(self.write_all(values), made, alone=alone, in_place=not shard)

    def _gathered_for(self, eqn: JaxprEqn, values: Sequence[_Value], shard: ShardMap) -> int:
        """Returns the bytes of operands that are gathered for a `shard_map`: of two at a time.

        While one is in use, the next one is on its way.
        """
        inside = _axes_in(shard.mesh, shard.in_specs, eqn.invars)
        sizes = [
            [bytes_of_part(type_of(atom), axes, self.mesh) for axes in (value.axes, named)]
            for atom, value, named in zip(eqn.invars, values, inside, strict=True)
        ]
        return sum(sorted(part for has, part in sizes if part > has)[-2:])


def _axes_in(mesh: Any, specs: Iterable[Any], atoms: Iterable[Atom]) -> list[Axes]:
    """Returns the axes of operands or outputs of a `shard_map`."""
    pairs = zip(specs, atoms, strict=True)
    return [axes_of(NamedSharding(mesh, spec), type_of(atom).ndim) for spec, atom in pairs]


def _is_var(atom: Any) -> bool:
    return not is_literal(atom)


def _jaxprs(eqn: JaxprEqn) -> Iterator[AnyJaxpr]:
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield inner


def peak_bytes(
    jaxpr: AnyJaxpr,
    shardings: Sequence[Any],
    donated: Sequence[bool],
    mesh: Mapping[str, int],
    *,
    platform: str,
) -> int:
    """Returns the most bytes of a device while a traced function runs, its arguments among them.

    Args:
      jaxpr: the function, ``jax.jit(f).trace(*args).jaxpr``.
      shardings: shardings of its arguments, in order.
      donated: whether each argument may be overwritten.
      mesh: sizes of the mesh's axes.
      platform: "cpu", "gpu" or "tpu".

    >>> import jax
    >>> from lora_jax.training.memory.live import peak_bytes
    >>> def f(w, x):
    ...     return (x @ w) @ w.T
    >>> traced = jax.jit(f).trace(jax.numpy.ones((4, 8)), jax.numpy.ones((2, 4)))
    >>> where = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # w, x, x @ w, the result
    >>> peak_bytes(traced.jaxpr, [where] * 2, [False] * 2, {}, platform="tpu") // 4
    64
    """
    program, values = _Program(mesh, on_tpu=platform == "tpu"), list[_Value]()
    for var, sharding, moves in zip(opened(jaxpr)[0].invars, shardings, donated, strict=True):
        axes = axes_of(sharding, type_of(var).ndim)
        buffer = Buffer(bytes_of_part(type_of(var), axes, mesh), is_frozen=not moves)
        values.append(_Value(axes, _Store(buffer.size, (buffer,), written=True)))
    held = [buffer for value in values for buffer in value.store.sources]
    outs = program.run(jaxpr, values)
    end = {buffer for out in outs for buffer in out.store.sources}
    end |= {buffer for buffer in held if buffer.is_frozen}
    return peak(program.events, [*held, *program.gathered], end)


def predicted_bytes(
    traced: jax.stages.Traced, layout: Layout, state: State, base: Tree, batch: Mapping[str, Shaped]
) -> int:
    """Returns the bytes of a device that a traced step takes, its arguments among them.

    Args:
      traced: the step; see `lora_jax.training.setup.Setup.trace`.
      layout: the mesh.
      state, base, batch: its arguments, arrays or shapes with shardings; the state is donated.
    """
    donated, kept = jax.tree.leaves(state), jax.tree.leaves((base, dict(batch)))
    mesh = dict(layout.mesh.shape)
    most = peak_bytes(
        traced.jaxpr,
        [leaf.sharding for leaf in (*donated, *kept)],
        [True] * len(donated) + [False] * len(kept),
        mesh,
        platform=layout.platform,
    )
    held = sum(
        bytes_of_part(leaf, axes_of(leaf.sharding, leaf.ndim), mesh) for leaf in (*donated, *kept)
    )
    return held + round(_GAPS * (most - held))
