"""The devices of a run as a mesh, and where what a step works on lies on it."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.lorafy import split
from lora_jax.models import partition_specs
from lora_jax.models.layers.placement import Activation, Mixture, Placement
from lora_jax.models.specs import AXES, BATCH
from lora_jax.sharding import Table, fitted, place, sharding_of, shardings
from train.batches import Batch
from train.run.errors import UserError

_ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "residual": (BATCH, ("sequence", "tensor"), None),
    "inputs": (BATCH, "sequence", None),
    "heads": (BATCH, "sequence", "tensor", None),
    "features": (BATCH, "sequence", "tensor"),
}


def parse_mesh(text: str | None) -> dict[str, int]:
    """The sizes that --mesh gives, such as ``data=2,fsdp=4``; {} for none. -1 means all the rest.

    Raises UserError where it is not of this form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(",") if text else ():
        found = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d*)\s*", part)
        if found is None or found[1] not in AXES or found[1] in sizes:
            raise UserError(
                f"--mesh {text}: sizes such as data=2,fsdp=4 are needed, each of {', '.join(AXES)} "
                "at most once (-1 for all the devices that are left)"
            )
        sizes[found[1]] = int(found[2])
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"--mesh {text}: only one axis can take all the devices that are left")
    return sizes


def all_devices() -> list[jax.Device]:
    """Those of all processes."""
    return jax.devices()


def make_mesh(text: str | None, batch_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes, or those that are given, as a mesh of all axes.

    By default as many are on fsdp as the batch can be shared out over, and the others on tensor.

    Raises UserError where the sizes are not those of the devices, or cannot share out the batch.
    """
    here = ""
    if devices is None:
        devices = all_devices()
        here = f" ({jax.process_count()} processes with {jax.local_device_count()} each)"
    rows = math.gcd(batch_size, len(devices))
    sizes = parse_mesh(text) or {"fsdp": rows, "tensor": len(devices) // rows}
    given = math.prod(size for size in sizes.values() if size > 0)
    rest = [name for name, size in sizes.items() if size == -1]
    if rest and len(devices) % given == 0:
        sizes[rest[0]] = len(devices) // given
    elif rest or given != len(devices):
        raise UserError(f"--mesh {text} is of {given} devices, and there are {len(devices)}{here}")
    shape = tuple(sizes.get(name, 1) for name in AXES)
    parts = math.prod(sizes.get(name, 1) for name in BATCH)
    if batch_size % parts:
        shown = " × ".join(f"{name} {sizes.get(name, 1)}" for name in BATCH)
        raise UserError(
            f"--batch-size {batch_size} cannot be shared out evenly over {parts} parts of the "
            f"mesh ({shown}): give a multiple of {parts}, or another --mesh"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=tuple(devices))


@dataclasses.dataclass(frozen=True)
class Layout(Placement):
    """Where weights, adapters, batches and activations lie on the mesh.

    Attributes:
      mesh: with the axes `lora_jax.models.specs.AXES`.
      table: of the parameters; see `lora_jax.sharding`.
      sorts_apart: whether, before experts, each device sorts its own tokens.
    """

    mesh: Mesh
    table: Table
    sorts_apart: bool = True

    @classmethod
    def of(cls, mesh: Mesh, config: Any) -> "Layout":
        """The layout of a model with this configuration."""
        return cls(mesh, partition_specs(config))

    @property
    def batch_parts(self) -> int:
        """How many parts a batch is shared out into."""
        return math.prod(self.mesh.shape[name] for name in BATCH)

    def of_parameter(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where to load a parameter to; see `lora_jax.models.from_pretrained`."""
        return sharding_of(path, shape, self.table, self.mesh)

    def placed(self, params: Any) -> Any:
        """An adapted tree on the mesh, the adapter as its base lies."""
        return place(params, self.table, self.mesh)

    def at_work(self, params: Any) -> Any:
        """Where a step works with an adapter: its factors are gathered over the fsdp axis.

        So that happens once a step; layer by layer, it would be three times: forward, recomputed,
        and backward. They are small. What trains in full is not: it stays where it lies, and so
        does the state of the optimiser. Over tensor and expert nothing is gathered: a device has
        the factors of its own features and experts.
        """

        def gathered(entry: Any) -> Any:
            names = (entry,) if isinstance(entry, str) else entry or ()
            return tuple(name for name in names if name != "fsdp")

        table = [(path, P(*map(gathered, spec))) for path, spec in self.table]
        lies = split(shardings(params, self.table, self.mesh))[0]
        works = split(shardings(params, table, self.mesh))[0]
        return {
            path: {name: (lies if name == "value" else works)[path][name] for name in parts}
            for path, parts in lies.items()
        }

    @property
    def whole(self) -> NamedSharding:
        """That of an array that each device has."""
        return NamedSharding(self.mesh, P())

    def constrained(self, model: Any, *, dropout: bool = False) -> Any:
        """The model with its activations on the mesh; on one device as it is.

        Dropout on experts depends on the order of the tokens that are sorted for them. To be what
        it is on one device, it has them sorted all at once, which takes more memory.
        """
        if self.mesh.size == 1:
            return model
        return model.clone(placement=dataclasses.replace(self, sorts_apart=not dropout))

    def constrain(self, x: jax.Array, kind: Activation) -> jax.Array:
        """An activation of a model; see `lora_jax.models.layers.placement.Placement`.

        The residual stream is what rematerialisation keeps of each layer, so it is shared out over
        the tensor axis as well: by tokens, since norms are taken of each token by itself. For the
        products of a block it is gathered over that axis; each device has its heads or features
        of all tokens there, so that no kernel moves over the tensor axis.
        """
        return jax.lax.with_sharding_constraint(x, self._fitting(x.shape, _ACTIVATIONS[kind]))

    def mixture(self, mixed: Mixture) -> Mixture:
        """Experts, each device its own tokens, and its own features of all experts.

        So no token moves; kernels are gathered over the other axes, a layer at a time.
        """
        tokens, inner, outer = P(BATCH, "sequence"), P(None, None, "tensor"), P(None, "tensor")
        specs = (tokens, tokens, tokens, inner, inner, outer)

        def apart(*args: jax.Array) -> jax.Array:
            return jax.lax.psum(mixed(*args), "tensor")

        def called(*args: jax.Array) -> jax.Array:
            fit = all(
                NamedSharding(self.mesh, spec).is_equivalent_to(
                    self._fitting(arg.shape, tuple(spec)), arg.ndim
                )
                for arg, spec in zip(args, specs, strict=True)
            )
            if not self.sorts_apart or not fit:
                return mixed(*args)
            return jax.shard_map(apart, mesh=self.mesh, in_specs=specs, out_specs=tokens)(*args)

        return called

    def batch(self, batch: Batch, *, parts: bool) -> dict[str, jax.Array]:
        """A batch on the mesh: all processes know it, and each gives what its devices need.

        Args:
          batch: arrays [batch, …], or [accumulate, batch, …] with `parts`.
        """
        return {
            name: jax.make_array_from_callback(
                array.shape, self.of_batch(array.shape, parts=parts), array.__getitem__
            )
            for name, array in batch.items()
        }

    def of_batch(self, shape: tuple[int, ...], *, parts: bool) -> NamedSharding:
        """The sharding of one of a batch's arrays."""
        return self._fitting(shape, (None, BATCH) if parts else (BATCH,))

    def _fitting(self, shape: tuple[int, ...], axes: tuple[Any, ...]) -> NamedSharding:
        axes = axes + (None,) * (len(shape) - len(axes))
        return fitted(axes, shape, self.mesh)
