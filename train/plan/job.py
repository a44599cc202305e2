"""The subject of a plan: a model, a machine, a batch and a variant, as abstract arrays."""

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

_REMAT_WORDS = {"none": "no remat", "full": "remat", "dots_saveable": "remat but products"}
_REMAT_WORDS |= {"attention": "remat but attention", "offload": "remat to the host"}
_REMAT_WORDS |= {"projections": "remat but projections", "products": "remat but products of layers"}
_REMAT_WORDS |= {"dots_with_no_batch_dims_saveable": "remat but dense"}


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
        """Returns the job with another form of sharded products; unchanged for None."""
        if form is None:
            return self
        layout = dataclasses.replace(self.layout, collective_matmul=form)
        return dataclasses.replace(self, layout=layout)

    @property
    def task_facts(self) -> PlannedTask:
        """Returns the facts about the rows of the task."""
        return TASKS[self.task]

    @property
    def row_tokens(self) -> int:
        """The tokens of a row. The row of a pair has two sequences."""
        if self.share_prompt:
            return self.prompt + self.completions * (self.seq_len - self.prompt)
        return self.task_facts.sequences * self.seq_len

    @property
    def rows(self) -> int:
        """The rows in memory at once, on all devices."""
        has_all_completions = self.share_prompt and self.task_facts.draws
        return self.batch_size // self.group if has_all_completions else self.batch_size

    @property
    def completions(self) -> int:
        """The completions per prompt."""
        return self.group if self.task_facts.draws else self.task_facts.sequences

    @property
    def predicted_tokens(self) -> int:
        """The tokens of a row that the loss counts."""
        n_completions = self.completions if self.share_prompt else self.task_facts.sequences
        return n_completions * (self.seq_len - self.prompt)

    @property
    def loss(self) -> Loss:
        """The loss function."""
        return self.task_facts.loss(**self.layout.chunks(self.loss_chunk))

    @property
    def head_chunk(self) -> int:
        """Returns the predictions whose logits are in memory at once, on all devices; 0 for all.

        A chunk that holds all predictions of the step is 0 as well.
        """
        chunk: int | None = self.layout.chunks(self.loss_chunk)["chunk"]
        if chunk is None:
            config: Any = self.outline.config  # of a language model
            device_chunk = predictions_at_once(self.layout, config.vocab_size)
            chunk = device_chunk * self.layout.token_parts
        predictions_shape = (self.rows, self.predicted_tokens)
        n_chunks = number_of_chunks(predictions_shape, chunk, self.layout.sequence_parts)
        return chunk if n_chunks > 1 else 0

    @property
    def attention_choice(self) -> AttentionChoice:
        """The implementation of attention that will run, and the reason.

        Raises:
          UserError: the one that was asked for does not run on this machine.
        """
        with as_user_errors(ValueError):
            return choose_attention(
                self.outline.config,
                self.row_tokens,
                dtype=self.dtype,
                attention=self.attention,
                platform=self.layout.platform,
                split=self.layout.split(self.row_tokens),
                branched=self.share_prompt,
            )


@dataclasses.dataclass(frozen=True)
class PlanVariant:
    """One variant of training, such as an adapter or full fine-tuning.

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
        """The name of the variant for tables."""
        if self.adapter.full:
            method = "full fine-tuning"
        elif self.adapter.peft_config:
            method = "the PEFT configuration"
        elif self.adapter.targets == NO_ADAPTER:
            method = "no adapter, parts in full"
        else:
            names = [variant.name for variant in self.adapter.variants if variant.alone]
            lora_variant = names[0] if names else "LoRA"
            method = f"{lora_variant} r={self.adapter.rank}"
        if self.adapters is not None:
            method = f"{self.adapters} × {method}"
        products = f", products {self.products}" if self.products else ""
        policy, _, n_layers = self.remat.partition(":")
        remat = _REMAT_WORDS.get(policy, policy)
        if n_layers:
            remat = f"remat but {policy} of {n_layers} layers"
        return f"{method}, {remat}{products}"


def abstract_params(job: PlanJob, variant: PlanVariant) -> Any:
    """Returns the abstract adapted tree with shardings; fp32 for full fine-tuning."""
    dtype = jnp.float32 if variant.adapter.full else jnp.dtype(job.dtype)
    return adapted_shapes(job.outline, variant.adapter, dtype, job.layout)


def adapted_shapes(outline: ModelInfo, adapter: AdapterConfig, dtype: Any, layout: Layout) -> Any:
    """Returns a model's abstract adapted tree with shardings, with the adapter of --init-adapter.

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
    """Returns an abstract adapted tree with its shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        shardings(params, layout.table, layout.mesh),
    )


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of a tree on one device. Arrays without a sharding count in full."""

    def shard_of(leaf: Shaped) -> jax.ShapeDtypeStruct:
        sharding: Any = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return tree_bytes([shard_of(leaf) for leaf in jax.tree.leaves(tree)])


def batch_shapes(job: PlanJob, adapters: int | None = None) -> dict[str, Any]:
    """Returns the abstract batch of a step with shardings; adapters add an axis in front.

    The arrays are those of `Packs`, `Preferences` and `train.live.prompts.PromptFeed`.
    """
    has_all_completions = job.share_prompt and job.task_facts.draws  # of a prompt in a row
    int_shapes = _int_row_shapes(job, has_all_completions)
    group_axis = [job.group] if has_all_completions else []
    float_shapes: dict[str, Any] = {
        name: int_shapes["targets"] if shape is None else [*group_axis, *shape]
        for name, shape in job.task_facts.numbers.items()
    }
    if job.images:
        config: Any = job.outline.config
        vision = config.vision
        image_shape = [vision.num_channels, vision.image_size, vision.image_size]
        float_shapes["pixel_values"] = [job.images, *image_shape]
    batch_axes = (job.grad_accum, job.rows // (adapters or 1))

    def placed(row_shape: list[int], dtype: Any) -> jax.ShapeDtypeStruct:
        """Returns an abstract array of the batch from the shape of a row."""
        shape = (*batch_axes, *row_shape)
        sharding = job.layout.of_batch(shape, parts=True)
        if adapters is not None:
            shape = (adapters, *shape)
            sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    batch = {name: placed(row_shape, jnp.int32) for name, row_shape in int_shapes.items()}
    for name, row_shape in float_shapes.items():
        batch[name] = placed(row_shape, jnp.float32)
    return batch


def _int_row_shapes(job: PlanJob, has_all_completions: bool) -> dict[str, Any]:
    """Returns the shape of a row in each integer array of a batch.

    Args:
      job: the model, the machine, and the batch.
      has_all_completions: whether a row has all completions that are drawn for a prompt.
    """
    token_arrays = ["ids", "segment_ids", "positions"]
    target_arrays = ["predict_at", "targets", "weights"]
    shapes: dict[str, Any] = {}
    target_shape = [job.predicted_tokens]
    if has_all_completions:
        shapes["completions"] = []
        target_shape = [job.group, job.max_new_tokens]
    if job.share_prompt:
        token_arrays.append("branches")
        if not has_all_completions:
            target_arrays.append("sequences")
    shapes |= dict.fromkeys(token_arrays, [job.row_tokens])
    shapes |= dict.fromkeys(target_arrays, target_shape)
    shapes |= job.task_facts.counts
    n_experts = job.outline.active_experts
    if job.task_facts.draws and n_experts:  # the experts that the sampler has chosen
        shapes["routing"] = [job.row_tokens, job.outline.config.num_hidden_layers, n_experts]
    return shapes
