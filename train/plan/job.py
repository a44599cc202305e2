"""The subject of a plan: model, machine and batch, a variant, and the shapes of these."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lj
from lora_jax.core.types import Shaped
from lora_jax.models.layers.attend import AttentionChoice, choose_attention
from lora_jax.sharding import shardings
from lora_jax.training.layout import Layout
from lora_jax.training.losses import Loss, number_of_chunks, predictions_at_once
from lora_jax.training.sharded_products import ChosenForm, Form
from train.adapters.source import find_adapter
from train.console.errors import as_user_errors
from train.options.common import AdapterConfig
from train.options.conditions import NO_ADAPTER
from train.plan.machines import Machine
from train.plan.tasks import PLAIN, TASKS, PlannedTask, Task
from train.run.costs import tree_bytes
from train.run.pretrained import ModelInfo
from train.run.rules import rules

_REMAT = {"none": "no remat", "full": "remat", "dots_saveable": "remat but products"}
_REMAT |= {"attention": "remat but attention", "offload": "remat to the host"}
_REMAT |= {"projections": "remat but projections", "products": "remat but products of layers"}
_REMAT |= {"dots_with_no_batch_dims_saveable": "remat but dense"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanJob:
    """The model, machine and batch of a plan; the same for all variants.

    Attributes:
      outline: the model, without its weights.
      layout: the placement of weights and activations on the mesh.
      machine: the devices to compile for.
      batch_size: rows in memory at once, on all devices: sequences, or pairs of them.
      grad_accum: batches per step.
      seq_len: tokens per sequence; the loss counts them all, or those of completions.
      loss_chunk: predictions of a chunk on each device; see `Layout.chunks`.
      dtype: the dtype of the base and its activations; trained parameters are fp32.
      attention, experts: the implementations of attention and of experts, by name.
      products: the form of products with sharded kernels; None where there is nothing to choose.
      task: the script that trains.
      group, max_new_tokens: completions of a prompt and tokens of one, where they are drawn.
      prompt: tokens of the prompt of completions, which the loss does not count; 0 where it counts
        all.
      share_prompt: whether a row has a prompt once, and all its completions.
      images: images of a row, or the tiles that they are cut into.
    """

    outline: ModelInfo
    layout: Layout
    machine: Machine
    batch_size: int
    grad_accum: int
    seq_len: int
    loss_chunk: int | None
    dtype: str
    attention: str = "auto"
    experts: str = "auto"
    products: ChosenForm | None = None
    task: Task = PLAIN
    group: int = 1
    max_new_tokens: int = 0
    prompt: int = 0
    share_prompt: bool = False
    images: int = 0

    def with_products(self, form: Form | None) -> "PlanJob":
        """Returns the job with another form of products with sharded kernels; None for its own."""
        if form is None:
            return self
        layout = dataclasses.replace(self.layout, collective_matmul=form)
        return dataclasses.replace(self, layout=layout)

    @property
    def kind(self) -> PlannedTask:
        """Returns the facts about the rows of the task."""
        return TASKS[self.task]

    @property
    def row(self) -> int:
        """Returns the tokens of a row: those of a pair are of two sequences."""
        if self.share_prompt:
            return self.prompt + self.completions * (self.seq_len - self.prompt)
        return self.kind.sequences * self.seq_len

    @property
    def rows(self) -> int:
        """Returns the rows in memory at once, on all devices."""
        grouped = self.share_prompt and self.kind.draws
        return self.batch_size // self.group if grouped else self.batch_size

    @property
    def completions(self) -> int:
        """Returns the completions of a prompt."""
        return self.group if self.kind.draws else self.kind.sequences

    @property
    def predicted(self) -> int:
        """Returns the tokens of a row that the loss counts."""
        each = self.completions if self.share_prompt else self.kind.sequences
        return each * (self.seq_len - self.prompt)

    @property
    def loss(self) -> Loss:
        """Returns the function to minimise."""
        return self.kind.loss(**self.layout.chunks(self.loss_chunk))

    @property
    def head_chunk(self) -> int:
        """Returns the predictions whose logits are in memory at once, on all devices; 0 for all.

        A chunk that holds all predictions of the step is 0 as well.
        """
        chunk: int | None = self.layout.chunks(self.loss_chunk)["chunk"]
        if chunk is None:
            config: Any = self.outline.config  # of a language model
            words = config.vocab_size
            chunk = predictions_at_once(self.layout, words) * self.layout.token_parts
        shape, parts = (self.rows, self.predicted), self.layout.sequence_parts
        return chunk if number_of_chunks(shape, chunk, parts) > 1 else 0

    @property
    def chosen(self) -> AttentionChoice:
        """Returns the implementation of attention that will run, and why.

        Raises:
          UserError: the one that was asked for does not run on this machine.
        """
        with as_user_errors(ValueError):
            return choose_attention(
                self.outline.config,
                self.row,
                dtype=self.dtype,
                attention=self.attention,
                platform=self.layout.platform,
                split=self.layout.split(self.row),
                branched=self.share_prompt,
            )


@dataclasses.dataclass(frozen=True)
class PlanVariant:
    """A variant of training.

    Attributes:
      adapter: the parameters that train.
      remat: the activations to recompute.
      adapters: the number of adapters that train side by side; None for one run.
      products: another form of products with sharded kernels than the job's.
    """

    adapter: AdapterConfig
    remat: str
    adapters: int | None = None
    products: Form | None = None

    @property
    def name(self) -> str:
        """The variant in words, for tables."""
        if self.adapter.full:
            what = "full fine-tuning"
        elif self.adapter.peft_config:
            what = "the PEFT configuration"
        elif self.adapter.targets == NO_ADAPTER:
            what = "no adapter, parts in full"
        else:
            alone = (variant.name for variant in self.adapter.variants if variant.alone)
            kind = next(alone, "LoRA")
            what = f"{kind} r={self.adapter.rank}"
        if self.adapters is not None:
            what = f"{self.adapters} × {what}"
        products = f", products {self.products}" if self.products else ""
        return f"{what}, {_REMAT.get(self.remat, self.remat)}{products}"


def abstract_params(job: PlanJob, variant: PlanVariant) -> Any:
    """Returns the adapted tree as shapes with shardings; fp32 in full fine-tuning."""
    dtype = jnp.float32 if variant.adapter.full else jnp.dtype(job.dtype)
    return adapted_shapes(job.outline, variant.adapter, dtype, job.layout)


def adapted_shapes(outline: ModelInfo, adapter: AdapterConfig, dtype: Any, layout: Layout) -> Any:
    """Returns a model's adapted tree as shapes with shardings; --init-adapter's has its own.

    Raises:
      UserError: the rules or the adapter do not fit the model.
    """
    plain = outline.shapes(dtype, arrays=adapter.full)
    with as_user_errors(ValueError):
        if adapter.init_adapter is None:
            params = lj.lorafy(plain, rules(adapter, outline), kinds=outline.kinds)
        else:  # the base has no values to compare yet
            source = find_adapter(adapter.init_adapter, "--init-adapter")
            params = source.load(outline, plain, outline.name, allow_base_mismatch=True)
    return placed_shapes(params, layout)


def placed_shapes(params: Any, layout: Layout) -> Any:
    """Returns the shapes of an adapted tree, with its shardings."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        params,
        shardings(params, layout.table, layout.mesh),
    )


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes on one device of a tree of arrays or shapes; all where none is sharded."""

    def shard(leaf: Shaped) -> jax.ShapeDtypeStruct:
        sharding: Any = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return tree_bytes([shard(leaf) for leaf in jax.tree.leaves(tree)])


def batch_shapes(job: PlanJob, adapters: int | None = None) -> dict[str, Any]:
    """Returns the shapes of a step's batch, with shardings; of several adapters, each has a part.

    The arrays are those of `Packs`, `Preferences` and `train.live.prompts.PromptFeed`.
    """
    of = (job.grad_accum, job.rows // (adapters or 1))
    by_place, by_target = ["ids", "segment_ids", "positions"], ["predict_at", "targets", "weights"]
    grouped = job.share_prompt and job.kind.draws
    each = [job.group] if grouped else []
    ints: dict[str, Any] = {"completions": []} if grouped else {}
    if job.share_prompt:
        by_place.append("branches")
        by_target += [] if grouped else ["sequences"]
    predicted = [*each, job.max_new_tokens] if grouped else [job.predicted]
    ints |= dict.fromkeys(by_place, [job.row]) | dict.fromkeys(by_target, predicted)
    ints |= job.kind.counts
    if job.kind.draws and (n := job.outline.active_experts):  # that the sampler has chosen
        ints["routing"] = [job.row, job.outline.config.num_hidden_layers, n]
    numbers: dict[str, Any] = {
        name: predicted if sizes is None else [*each, *sizes]
        for name, sizes in job.kind.numbers.items()
    }
    if job.images:
        config: Any = job.outline.config
        vision = config.vision
        shape = [vision.num_channels, vision.image_size, vision.image_size]
        numbers["pixel_values"] = [job.images, *shape]

    def placed(rest: list[int], dtype: Any) -> jax.ShapeDtypeStruct:
        shape = (*of, *rest)
        where = job.layout.of_batch(shape, parts=True)
        if adapters is not None:
            shape = (adapters, *shape)
            where = NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    batch = {name: placed(shape, jnp.int32) for name, shape in ints.items()}
    return batch | {name: placed(shape, jnp.float32) for name, shape in numbers.items()}
