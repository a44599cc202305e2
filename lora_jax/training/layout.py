"""Places weights, adapters, batches and activations on a mesh."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax.core.types import Model, Tree
from lora_jax.hf.format import ModelConfig
from lora_jax.lorafy import split
from lora_jax.models import compiler_options, partition_specs
from lora_jax.models.layers.masks import Split
from lora_jax.models.layers.placement import Activation, Attention, Mixture, Placement, platform_of
from lora_jax.models.specs import AXES, BATCH, SHARDS
from lora_jax.sharding import Table, place, sharding_for, sharding_of, shardings
from lora_jax.training import context, exchange
from lora_jax.training.data.batches import HostBatch
from lora_jax.training.errors import TrainingError
from lora_jax.training.losses.chunks import ON_CPU
from lora_jax.training.mesh import make_mesh
from lora_jax.training.sharded_products import COMPILER_OPTIONS, Form

_ACTIVATION_AXES: dict[str, tuple[Any, ...]] = {
    "residual": (BATCH, ("sequence", "tensor"), None),
    "inputs": (BATCH, "sequence", None),
    "heads": (BATCH, "sequence", "tensor", None),
    "features": (BATCH, "sequence", "tensor"),
}


def layout_of_one_device() -> "Layout":
    """Returns the layout of any model on the first device."""
    return Layout(make_mesh(jax.devices()[:1]), ())


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """A function under `jax.jit` that is traced and called under its mesh."""

    jitted: Any
    mesh: Mesh

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self.jitted(*args)

    def trace(self, *args: Any) -> jax.stages.Traced:
        """Traces the function for these arrays, or for shapes with shardings."""
        with jax.set_mesh(self.mesh):
            traced: jax.stages.Traced = self.jitted.trace(*args)
            return traced


@dataclasses.dataclass(frozen=True)
class Layout(Placement):
    """Places weights, adapters, batches and activations on a mesh.

    Attributes:
      mesh: with the axes `lora_jax.models.specs.AXES`; see `make_mesh`.
      table: sharding table of the parameters; see `lora_jax.sharding`.
      sorts_apart: whether each device sorts its own tokens by expert.
      collective_matmul: form of products with sharded kernels on TPUs; see
        `lora_jax.training.sharded_products`.
      keeps_rows: whether MLPs take long rows whole, as an activated LoRA needs; see `takes_chunks`.
    """

    mesh: Mesh
    table: Table
    sorts_apart: bool = True
    collective_matmul: Form = "windowed"
    keeps_rows: bool = False

    def __post_init__(self) -> None:
        """Raises a TrainingError for a mesh that lacks an axis."""
        if lacking := [name for name in AXES if name not in self.mesh.shape]:
            raise TrainingError(
                f"the mesh has the axes {', '.join(self.mesh.shape)} and lacks "
                f"{', '.join(lacking)}. Use lora_jax.training.make_mesh, which adds missing axes "
                "with a size of 1."
            )

    @classmethod
    def of(cls, mesh: Mesh, config: ModelConfig) -> "Layout":
        """Returns the layout of a model with this configuration."""
        return cls(mesh, partition_specs(config))

    @property
    def batch_parts(self) -> int:
        """Returns the number of shards of a batch."""
        return math.prod(self.mesh.shape[name] for name in BATCH)

    @property
    def platform(self) -> str:
        """Returns the platform of the mesh's devices or device descriptions."""
        return platform_of(self.mesh.devices.flat[0])

    @property
    def kernels(self) -> bool:
        """Returns True, because `attention` runs kernels on each device separately."""
        return True

    @property
    def takes_chunks(self) -> bool:
        """Returns True if rows and kernels are not sharded, except over the tensor axis.

        Not with `keeps_rows`: which tokens of a row see an adapter is not known of a chunk.
        """
        return not self.keeps_rows and all(self.mesh.shape[name] == 1 for name in SHARDS)

    @property
    def ragged_kernels(self) -> bool:
        """Returns True if ragged products run as kernels; see `compiler_options`."""
        return self.platform == "tpu" and self.sorts_apart

    @property
    def compiler_options(self) -> dict[str, str]:
        """Returns the compiler options; see `lora_jax.models.compiler_options`."""
        options = compiler_options(self.platform)
        if self.platform == "tpu":
            options |= COMPILER_OPTIONS[self.collective_matmul]
        return options

    @property
    def sequence_parts(self) -> int:
        """Returns the number of shards of a long row."""
        return int(self.mesh.shape["sequence"])

    @property
    def token_parts(self) -> int:
        """Returns the number of shards of a batch's tokens."""
        return self.batch_parts * self.sequence_parts

    @property
    def word_parts(self) -> int:
        """Returns the number of shards of the head's vocabulary."""
        return int(self.mesh.shape["tensor"])

    def chunks(self, asked: int | None) -> dict[str, Any]:
        """Returns the arguments `chunk`, `parts` and `placement` of losses; see `token_values`.

        Args:
          asked: predictions of a chunk on each device; 0 for all at once, None for the default.
        """
        if asked is None and self.platform == "cpu":
            asked = ON_CPU
        chunk = None if asked is None else asked * self.token_parts
        return {"chunk": chunk, "parts": self.sequence_parts, "placement": self}

    def check_lengths(self, lengths: Sequence[int]) -> None:
        """Raises a TrainingError for rows that cannot be split evenly over the sequence axis.

        Args:
          lengths: the numbers of tokens that rows are padded to.
        """
        parts = self.sequence_parts
        uneven = [str(length) for length in lengths if length % parts]
        if not uneven:
            return
        has_several_lengths = len(lengths) > 1
        raise TrainingError(
            lambda option: (
                f"the mesh has sequence={parts}, which does not divide rows of {', '.join(uneven)} "
                f"tokens. Use lengths that are multiples of {2 * parts}, or another mesh."
                + (
                    f" {option('packing', True)} gives all rows one length."
                    if has_several_lengths
                    else ""
                )
            )
        )

    def split(self, seq: int) -> Split | None:
        """Returns the split of causal queries over devices; None if each device has all."""
        return context.split_queries(seq, self.sequence_parts, causal=True)

    def jitted(self, function: Callable[..., Any], out: Any = None, **options: Any) -> OnMesh:
        """Returns a function jitted for the mesh.

        Args:
          function: the function.
          out: the shardings of its results; by default each device gets the whole.
          **options: further options of `jax.jit`.
        """
        options |= {"out_shardings": out or self.whole, "compiler_options": self.compiler_options}
        return OnMesh(jax.jit(function, **options), self.mesh)

    def of_parameter(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Returns the sharding with which a parameter is loaded."""
        return sharding_of(path, shape, self.table, self.mesh)

    def placed(self, params: Tree) -> Tree:
        """Returns an adapted tree on the mesh, with the adapter sharded like its base."""
        return place(params, self.table, self.mesh)

    def step_shardings(self, params: Tree) -> Tree:
        """Returns an adapter's shardings inside a step, with A and B gathered over SHARDS.

        They are small, so they are gathered once a step; layer by layer it would be three times:
        forward, recomputed, and backward. Leaves that train in full are not small: they keep their
        sharding, and so does the state of the optimiser. Nothing is gathered over tensor, nor over
        the axis of experts: a device has the factors of its own features and experts.
        """

        stored_shardings, _ = split(shardings(params, self.table, self.mesh))
        gathered_shardings, _ = split(shardings(params, self._gathered_table, self.mesh))
        step_shardings: Tree = {}
        for path, stored in stored_shardings.items():
            step_shardings[path] = dict(gathered_shardings[path])
            if "value" in stored:  # a leaf that trains in full
                step_shardings[path]["value"] = stored["value"]
        return step_shardings

    def head_shardings(self, params: Tree) -> Tree | None:
        """Returns shardings of parameters gathered over SHARDS; None for one device.

        Within a loop, a head would be gathered once a chunk of predictions.
        """
        if all(self.mesh.shape[name] == 1 for name in SHARDS):
            return None
        return shardings(params, self._gathered_table, self.mesh)

    @property
    def _gathered_table(self) -> Table:
        """Returns the sharding table with parameters gathered over SHARDS."""

        def gathered(entry: Any) -> Any:
            if entry == "expert":  # an axis of experts; of a dense kernel, SHARDS has it
                return entry
            names = (entry,) if isinstance(entry, str) else entry or ()
            return tuple(name for name in names if name not in SHARDS)

        return [(path, P(*map(gathered, spec))) for path, spec in self.table]

    @property
    def whole(self) -> NamedSharding:
        """Returns the sharding of a replicated array."""
        return NamedSharding(self.mesh, P())

    def constrained(self, model: Model, *, dropout: bool = False) -> Model:
        """Returns the model with sharding constraints on its activations.

        Dropout on experts depends on the order of the tokens that are sorted for them. To get the
        result of one device, all tokens are then sorted together, which takes more memory.
        """
        sorts_apart = self.mesh.size == 1 or not dropout
        constrained: Model = model.clone(
            placement=dataclasses.replace(self, sorts_apart=sorts_apart)
        )
        return constrained

    def constrain(self, x: jax.Array, kind: Activation) -> jax.Array:
        """Returns an activation with a sharding constraint; see `Placement`.

        Rematerialisation keeps the residual stream of each layer, so it is sharded over the tensor
        axis as well: by tokens, since norms are taken of each token by itself. For the products of
        a block it is gathered over that axis; there each device has its heads or features of all
        tokens, so that no kernel moves over the tensor axis.
        """
        if self.mesh.size == 1:
            return x
        placed: jax.Array = jax.lax.with_sharding_constraint(
            x, self._fitting(x.shape, _ACTIVATION_AXES[kind])
        )
        return placed

    def mixture(self, mixed: Mixture) -> Mixture:
        """Returns a mixture that runs sharded over devices; see `exchange`."""
        if self.mesh.size == 1 or not self.sorts_apart:
            return mixed
        return exchange.shard_experts(mixed, self.mesh)

    def attention(self, local: Attention) -> Attention:
        """Returns attention that runs sharded over batch, heads and queries."""
        return local if self.mesh.size == 1 else context.shard_attention(local, self.mesh)

    def batch(self, batch: HostBatch, *, parts: bool) -> dict[str, jax.Array]:
        """Returns a batch on the mesh, made from each process's own shards.

        Args:
          batch: arrays [batch, …], or [accumulate, batch, …] with `parts`.
          parts: whether there is the first axis of the parts that are accumulated.
        """
        return {
            name: jax.make_array_from_callback(
                array.shape, self.of_batch(array.shape, parts=parts), array.__getitem__
            )
            for name, array in batch.items()
        }

    def of_batch(self, shape: tuple[int, ...], *, parts: bool) -> NamedSharding:
        """Returns the sharding of a batch's array."""
        return self._fitting(shape, (None, BATCH) if parts else (BATCH,))

    def _fitting(self, shape: tuple[int, ...], axes: tuple[Any, ...]) -> NamedSharding:
        axes = axes + (None,) * (len(shape) - len(axes))
        return sharding_for(axes, shape, self.mesh)
