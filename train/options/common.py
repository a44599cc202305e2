"""Options shared by all training scripts: frozen dataclasses, checked before anything is read."""

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import arg

from lora_jax.training import arguments
from lora_jax.training.arguments import NumberRange, numbers_from
from lora_jax.training.errors import TrainingError
from lora_jax.training.optimizers.named import Name
from lora_jax.training.optimizers.schedules import DECAY, ScheduleKind
from lora_jax.training.remat import COUNTED, countable_layers
from lora_jax.variants import VARIANTS, Variants
from lora_jax.variants.variant import Setting, Variant
from train.console.errors import UserError, as_user_errors, flag
from train.options import field
from train.options.conditions import NoEffect
from train.options.field import FACTORS, PLAIN, CardSection, SharedOption, Uncompared, option
from train.options.optim import check_optim
from train.options.paths import Place, Words
from train.reporters.registry import TRACKERS

_REMAT: dict[str, bool | str] = {"none": False, "full": True}


def _switch(variant: Variant) -> Any:
    """Returns the field of the option that turns a variant on."""
    compared_by = "methods" if variant.is_compared else None
    return option(False, FACTORS if variant.alone else PLAIN, compared_by=compared_by)


def _variant_fields() -> list[tuple[str, Any, Any]]:
    """Returns the name, type and dataclass field of each option of the variants."""
    fields: list[tuple[str, Any, Any]] = []
    for variant in VARIANTS:
        kind = Annotated[bool, arg(help=variant.help)]
        fields.append((variant.option, kind, _switch(variant)))
        for setting in variant.settings:
            fields.append(_variant_number(variant, setting))
    return fields


def _variant_number(variant: Variant, setting: Setting) -> tuple[str, Any, Any]:
    """Returns the name, type and dataclass field of an option that only one variant reads."""
    no_variant = NoEffect[f"NO_{variant.option.upper()}"]
    kind: Any = Annotated[type(setting.default), arg(help=setting.help)]
    return setting.name, kind, option(setting.default, FACTORS, no_variant)


if TYPE_CHECKING:
    VariantOptions = Variants
else:
    VariantOptions = dataclasses.make_dataclass(
        "VariantOptions", _variant_fields(), bases=(Variants,), frozen=True, kw_only=True
    )


_REMAT |= {name: name for name in ("products", "projections", "attention", "offload")}
_REMAT |= {name: name for name in ("dots_saveable", "dots_with_no_batch_dims_saveable")}
AUTO = "auto"  # a policy that compilers decide
# A policy for a number of layers: the others have the next leaner policy.
_COUNTED_REMAT = re.compile(rf"({'|'.join(COUNTED)}):[1-9]\d*")
_REMAT_CHOICES = ", ".join((AUTO, *_REMAT)) + ", or products:N with a number of layers"

# The numbers that the options of all scripts take.
_NUMBERS = arguments.NUMBERS | {
    **dict.fromkeys(("eval_every", "score_every"), numbers_from(0)),
    "num_processes": numbers_from(1),
    "heartbeat_timeout": numbers_from(10),
    "warmup_ratio": NumberRange(lambda x: 0 <= x < 1, "a share of the steps, from 0 to below 1"),
    "min_lr": NumberRange(lambda x: 0 <= x <= 1, "a share of the peak learning rate, from 0 to 1"),
    "decay": NumberRange(lambda x: 0 < x <= 1, "a share of the steps, above 0 and at most 1"),
    "neftune": arguments.NOT_NEGATIVE,
}


def _remat(words: list[str]) -> str:
    """Returns the rematerialization policy that the words after --remat name."""
    if len(words) > 1:
        raise ValueError(f"--remat takes one policy, but got {' '.join(words)}. Pass only one.")
    remat = words[0] if words else "full"
    if remat not in (AUTO, *_REMAT) and not _COUNTED_REMAT.fullmatch(remat):
        raise ValueError(f"Write one of {_REMAT_CHOICES}, instead of {remat}")
    return remat


def check_remat(remat: str | None, platform: str, config: Any) -> None:
    """Raises a UserError for a policy of --remat that has no effect, or that a model cannot have.

    Args:
      remat: the value of --remat.
      platform: the platform of the devices.
      config: the model's configuration.
    """
    if remat == "offload" and platform == "cpu":
        raise UserError(
            "--remat offload moves the layers' inputs from a device to its host, but here the "
            "device is the host's CPU. Pass --remat full instead."
        )
    policy, _, number = (remat or "").partition(":")
    if number and int(number) >= countable_layers(config):
        raise UserError(
            f"--remat {remat} is a policy for {number} of the layers. It needs a decoder with more "
            "layers, which are all of one kind and without experts, or a GPT-2. Pass a smaller "
            f"number, or a policy without one, such as {policy}."
        )


MeshAxis = Literal["data", "fsdp", "expert", "sequence", "tensor"]

# One of the names; --remat without a name means "full".
Remat = Annotated[
    str | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=f"[{{{','.join((AUTO, *_REMAT, 'products:N'))}}}]",
        instance_from_str=_remat,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    ),
]

CollectiveMatmul = Literal["auto", "windowed", "whole"]
Attention = Literal["auto", "dense", "blockwise", "splash", "flash", "cudnn"]
Experts = Literal["auto", "blocks", "ragged"]
FewRows = Literal["auto", "kernel", "xla"]
Quantize = Literal["none", "int8", "int4", "nf4", "nf4-double", "stored"]
ReportTo = Literal["none", *TRACKERS]  # type: ignore[valid-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FactorOptions:
    """The kernels that are adapted, and their A and B."""

    targets: tuple[str, ...] = option(("all-linear",), field.TARGETS, compared_by="target_sets")
    """The modules to adapt: names (q_proj v_proj), presets (attention, mlp, experts, all-linear),
    one regular expression that matches whole paths, or none. With none, only --train, --bias and
    --train-tokens select parameters."""
    layers: tuple[int, ...] = option((), field.FACTORS)
    """Adapt only the layers with these indices, counted from 0. By default all layers are
    adapted."""
    rank: int = option(16, field.FACTORS, compared_by="ranks")
    """The rank r of the adapter."""
    alpha: float | None = option(None, field.FACTORS, compared_by="alphas")
    """The alpha of the adapter's scale (see --scaling). By default twice the rank. A variant may
    have another default."""
    dropout: float = option(0.0, field.FACTORS)
    """Dropout probability of the adapter's input during training, from 0 to below 1."""
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)"] = option(
        "alpha/rank", field.FACTORS, compared_by="methods"
    )
    """The factor that multiplies the adapter's product AB. alpha/sqrt(rank) is rsLoRA."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "fast-pissa", "olora"] = option(
        "kaiming", field.PLAIN, compared_by="methods"
    )
    """Initialisation of A and B. kaiming and gaussian draw A at random, and B starts at zero.
    orthogonal draws both, with AB = 0. pissa, fast-pissa and olora compute A and B from the base's
    kernels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(VariantOptions, _FactorOptions):
    """Parameters that train."""

    bias: Literal["none", "adapted", "all"] = option("none", field.RULES)
    """The biases of the model to train: none of them, the biases of adapted layers, or all."""
    train: tuple[str, ...] = option((), field.RULES)
    """Modules to train in full besides the adapter, such as lm_head and norm."""
    train_tokens: tuple[int, ...] = option((), field.RULES)
    """Token ids whose rows of the embedding are trained."""
    divide_rank: bool = option(False, field.FACTORS)
    """Divide the rank of each expert by the number of active experts (mixtures of experts)."""
    peft_config: str | None = option(
        None,
        field.HIDDEN,
        NoEffect.FULL,
        NoEffect.INIT_ADAPTER,
        of_inputs=False,
        uncompared=Uncompared.ADAPTER,
    )
    """Take all options above from a PEFT configuration: the path of an adapter_config.json, or of
    its folder."""
    full: bool = option(False, field.TRAINED, compared_by="methods")
    """Train every parameter, without an adapter."""
    init_adapter: Place | None = option(None, field.START)
    """Start from this adapter, with its own targets, rank and alpha: a run's folder, a folder with
    an adapter of this library or of PEFT, or the hub name of a PEFT adapter."""
    allow_base_mismatch: bool = option(
        False, field.START, NoEffect.NO_INIT_ADAPTER, changeable=True
    )
    """Accept an adapter of --init-adapter that was trained on a different base model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation."""

    steps: int | None = option(None, field.COURSE, excludes="epochs")
    """Number of optimiser steps."""
    epochs: float | None = option(None, field.COURSE, NoEffect.STREAM)
    """Number of passes over the data. It is an alternative to --steps."""
    batch_size: int = option(8, field.OPTIMISATION, compared_by="batch_sizes")
    """Number of sequences in memory at once, on all devices together."""
    grad_accum: int = option(1, field.OPTIMISATION)
    """Number of batches to accumulate per step. The gradient equals that of one large batch."""
    optimizer: Name = option("adamw", field.OPTIMISATION)
    """The optimiser. muon orthogonalises the updates of matrices, including A and B, and adamw
    updates the other parameters. schedule-free is AdamW with averaging instead of a schedule. The
    average is evaluated and saved."""
    lr: float | None = option(None, field.HIDDEN, of_inputs=False, compared_by="lrs")
    """The peak learning rate. The default is meant for AdamW: lion uses a third of it, and sgd has
    no default. A variant of the adapter may have another default."""
    lr_rule: Literal["llama", "qwen"] | None = option(
        None, field.OPTIMISATION, NoEffect.ALONE, excludes="lr", uncompared=Uncompared.RATES
    )
    """Compute the learning rate from the model's width and the number of steps, by the formula that
    *LoRA Without Regret* fitted to this model family. It is an alternative to --lr."""
    lora_plus: float | None = option(None, field.LORA_PLUS, compared_by="methods")
    """Ratio of B's learning rate to A's learning rate (LoRA+; the paper uses 16). By default 1."""
    beta1: float | None = option(None, field.OPTIMISATION)
    """Decay rate of the mean gradient (adamw, lion). For schedule-free, the share of the average in
    the point at which gradients are computed. By default 0.9."""
    beta2: float | None = option(None, field.OPTIMISATION)
    """Decay rate of the squared gradients (adamw, schedule-free): by default 0.999. For lion, the
    decay rate of the mean gradient: by default 0.99."""
    eps: float | None = option(None, field.OPTIMISATION)
    """The number that is added to the root of the mean squared gradient (adamw, schedule-free). By
    default 1e-8."""
    momentum: float | None = option(None, field.OPTIMISATION)
    """Momentum of sgd (by default 0.9) and of muon (by default 0.95)."""
    schedule: ScheduleKind = option("cosine", field.OPTIMISATION, NoEffect.AVERAGES)
    """Schedule of the learning rate after the warmup. linear and cosine fall to --min-lr over all
    steps. wsd stays constant and falls over the last steps (see --decay). inverse-sqrt falls as
    1 / sqrt(step)."""
    warmup: int = option(3, field.OPTIMISATION, NoEffect.WARMUP_RATIO, excludes="warmup_ratio")
    """Number of steps over which the learning rate rises linearly to its peak."""
    warmup_ratio: float | None = option(None, field.OPTIMISATION)
    """Steps of the warmup as a share of all steps. It is an alternative to --warmup."""
    min_lr: float = option(0.0, field.OPTIMISATION, NoEffect.AVERAGES, NoEffect.FLAT)
    """The final learning rate of linear, cosine and wsd, as a share of the peak."""
    decay: float = option(DECAY, field.OPTIMISATION, NoEffect.AVERAGES, NoEffect.NEVER_STABLE)
    """The share of the steps over which the learning rate of --schedule wsd falls at the end."""
    weight_decay: float = option(0.0, field.OPTIMISATION)
    """Weight decay of A, B, kernels and embeddings. Norms and biases have no weight decay."""
    grad_clip: float = option(1.0, field.OPTIMISATION)
    """Maximum norm of the whole gradient. 0 turns clipping off."""
    neftune: float = option(0.0, field.OPTIMISATION, NoEffect.IMAGES)
    """The alpha of NEFTune, which adds noise of at most alpha / sqrt(length * width) to embeddings
    during training. The paper uses 5 to 15. 0 adds no noise."""
    seed: int = option(0, field.OPTIMISATION, compared_by="seeds")
    """Seed of the adapter's initialisation, the order of the data, dropout and noise."""
    remat: Remat = option(None, field.OF_BASE, older="none")
    """The activations to recompute in the backward pass, which saves memory and takes time. auto:
    the first of none, products, projections, attention, full and offload whose compiled step fits
    into memory. The run logs its choice and keeps it when it is resumed. full, or --remat without a
    name: recompute all activations of each layer except xA of small ranks. offload: as full, and
    the layers' inputs move to the host's memory until they are needed (GPUs and TPUs), for very
    long rows. attention: as full, but keep the outputs of attention kernels (splash, flash). They
    take about as much memory as the layers' inputs, and save much time in long rows. projections:
    as attention, and keep the outputs of attention's projections, in decoders and GPT-2. products:
    as projections, and keep the outputs of the MLP's products. products:7: products for the last 7
    layers, and projections for the others, in decoders with layers of one kind and in GPT-2.
    projections:N and attention:N are alike. Except with --full, auto tries such a policy where
    memory is left for N layers. Two policies of JAX also keep the factors' products and scores.
    dots_saveable keeps the results of all matrix products. dots_with_no_batch_dims_saveable keeps
    the results of products with weights. By default auto on GPUs and TPUs, and none on CPUs."""
    attention: Attention = option("auto", field.OF_BASE)
    """The implementation of attention. dense: computes all scores of a layer at once, in memory
    quadratic in the length. blockwise: computes a block of queries at a time, in memory linear in
    the length. splash: a kernel for TPUs. flash: a kernel for GPUs from Ampere on, on Python 3.12
    and newer. cudnn: a kernel for GPUs from Hopper on, in half precision, up to 4,096 tokens. auto:
    dense below 512 tokens. From 512 tokens on, auto is splash on a TPU, flash on a GPU that
    supports it, and blockwise elsewhere."""
    experts: Experts = option("auto", field.OF_BASE)
    """The implementation of a mixture of experts. blocks: a loop over blocks of tokens of one
    expert. ragged: all tokens of a device, sorted by expert, in a kernel that only the TPU's
    compiler has. auto: ragged on a TPU, and blocks elsewhere. On a TPU, auto is blocks for
    --dropout on several chips. It is also blocks for quantized experts that few rows choose, that
    have more than a thousand rows each, or whose kernel of a layer exceeds a GiB."""
    few_rows: FewRows = option("auto", field.OF_BASE)
    """The products of quantized kernels with few rows, as in generation. kernel: a kernel for one
    TPU. xla: a form that XLA compiles. auto: the kernel on one TPU, and xla elsewhere. The
    kernel of quantized experts follows this option, too."""
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", field.OF_BASE, card=CardSection.OPTIMISATION
    )
    """The dtype of the base and its activations. Adapters are always float32. With --full, the
    weights are float32, too."""

    quantize: Quantize | None = option(
        None, field.OF_BASE, NoEffect.FULL, NoEffect.INTRINSIC, card=CardSection.CODES
    )
    """Quantize the base's kernels below a float32 adapter (QLoRA). nf4, int4 and int8 use blocks of
    64 numbers with a scale each. nf4-double also quantizes its scales to 8 bits. stored keeps the
    quantization of the files. Each kernel is quantized when it is read. Embeddings, norms, routers
    and the output head stay in --dtype. By default the quantization that --init-adapter was trained
    with. Without one, the default is stored for quantized safetensors files (FP8, MXFP4, NF4, ...),
    and none for other files."""

    @property
    def remat_policy(self) -> bool | str:
        """Returns the value of --remat that models take.

        Until a compiler has chosen a policy for "auto", this is "full", which needs least memory.
        """
        remat = "full" if self.remat == AUTO else self.remat or "none"
        return _REMAT.get(remat, remat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Evaluation and output."""

    config: str | None = option(None, field.OF_CALL)
    """A YAML file of options under their names on this page. The command line overrides the file. A
    run writes its options to config.yaml in its folder, and that file repeats the run."""
    output: Place = option(field.REQUIRED, field.COURSE, shared=SharedOption.TABLE)
    """The output folder of the run."""
    mesh: str | None = option(None, field.CHANGEABLE, shared=SharedOption.PROCESS)
    """The device mesh, such as data=2,fsdp=4,tensor=2 (also expert= and sequence=; -1 takes the
    remaining devices). The batch is sharded over data, fsdp and expert. Each row's tokens are
    sharded over sequence, and the base over all axes except data. By default fsdp gets as many
    devices as can share the batch, and tensor gets the rest. With several slices, fsdp and tensor
    share the devices of one slice, and data has one part per slice."""
    slice_axis: MeshAxis | None = option(
        None, field.CHANGEABLE, shared=SharedOption.PROCESS, uncompared=Uncompared.PROCESS
    )
    """The axis of the mesh that spans the slices, if the devices belong to several TPU slices or
    GPU hosts. All other axes stay within a slice. By default data, so that only the gradients of
    trained parameters cross the slow network between slices."""
    collective_matmul: CollectiveMatmul = option(
        "auto", field.CHANGEABLE, shared=SharedOption.PROCESS, uncompared=Uncompared.MANY_RUNS
    )
    """The way in which TPUs multiply by kernels that they share. windowed: multiply by each part of
    a kernel when it arrives from a neighbour. whole: gather the whole kernel during other work.
    auto: whole, which the TPU's compiler estimated to be faster at all sizes that were tried."""
    distributed: bool = option(False, field.OF_PROCESSES, single=True)
    """Run as one of several processes. SLURM, a TPU pod, GKE or Open MPI tells each process its
    number."""
    coordinator: Words | None = option(None, field.OF_PROCESSES, single=True, of="process")
    """Address of process 0, as host:port. Pass the same address to all processes."""
    num_processes: int | None = option(None, field.OF_PROCESSES)
    """Number of processes. Pass it together with --coordinator."""
    process_id: int | None = option(None, field.OF_PROCESSES, of="process")
    """Number of this process, counted from 0. Pass it together with --coordinator."""
    heartbeat_timeout: int = option(100, field.OF_PROCESSES, NoEffect.ONE_PROCESS)
    """Seconds without a heartbeat after which a process counts as frozen. The other processes then
    end, and print how to resume the run. If the host of the frozen process is unreachable, they end
    up to about 35 seconds later."""
    dry_run: bool = option(False, field.OF_CALL, single=True, uncompared=Uncompared.MANY_RUNS)
    """Train nothing and write nothing. Show the first rows as the model sees them, the lengths of
    all rows, probably misspelled roles and fields of turns, and the steps, memory and time of the
    run."""
    resume: bool = option(False, field.OF_CALL, NoEffect.DRY_RUN, of_inputs=False)
    """Resume from the last checkpoint in the output folder. A finished run stays unchanged, unless
    you pass more --steps, --epochs or --patience."""
    overwrite: bool = option(False, field.OF_CALL, excludes="resume", of_inputs=False)
    """Delete the run in the output folder and start a new one."""
    log_every: int = option(1, field.COURSE)
    """Number of steps between lines of metrics. Each checkpoint also has a line before it."""
    save_every: int = option(10, field.COURSE)
    """Number of steps between checkpoints. The last step always has a checkpoint."""
    keep: int = option(2, field.COURSE)
    """Number of checkpoints to keep."""
    eval_every: int = option(0, field.CHANGEABLE)
    """Number of steps between evaluations of the loss on held-out data. 0 turns evaluations off."""
    score_every: int = option(0, field.COURSE)
    """Number of steps between the task's own scores; 0 for none. The score is the execution
    accuracy on the questions of the SQL task, or a classifier's accuracy on its test rows. Each
    score uses all of these questions or rows."""
    keep_best: Literal["loss", "score"] | None = option(None, field.BEST)
    """Keep the adapter with the lowest loss of --eval-every, or with the highest score of
    --score-every. The best adapter becomes the run's adapter at the end, instead of the last
    one."""
    patience: int | None = option(
        None, field.BEST, changeable=True, uncompared=Uncompared.EARLY_STOPPING
    )
    """End the run after this many measurements of --keep-best in a row without an improvement. By
    default the run trains to its last step."""
    report_to: tuple[ReportTo, ...] = option(("tensorboard",), field.COURSE)
    """Services that receive the metrics besides metrics.jsonl, or none. tensorboard writes files to
    the output folder. Each other service needs the extra of its name (pip install
    'lora_jax[NAME]'). A resumed run continues its records in the services."""
    report_project: Words | None = option(None, field.COURSE, NoEffect.NO_PROJECT)
    """The run's project in the service (MLflow calls it an experiment). By default the project in
    the service's own environment variable, or lora_jax."""
    compilation_cache: Words | None = option(None, field.CHANGEABLE, shared=SharedOption.PROCESS)
    """The folder where JAX keeps compiled programs for later runs, or off. By default
    lora_jax/jax in the user's cache folder, or JAX_COMPILATION_CACHE_DIR. Several processes have no
    default: name a folder that all of them can read and write."""
    max_skipped: int = option(3, field.COURSE, card=CardSection.SKIPPED)
    """Stop the run after this many skipped steps in a row. A step is skipped if its loss or its
    gradient is not finite. A step whose batch has no token that counts is also skipped, but is not
    counted here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """All options of a script: the shared ones, and the ones about its data."""

    data: Any
    adapter: AdapterConfig
    optim: OptimConfig
    run: RunConfig


def check_shared(options: Options, **numbers: NumberRange) -> None:
    """Raises a UserError if options, with their defaults, make no sense for any data.

    Args:
      options: the options.
      **numbers: the numbers that the script's own options take.
    """
    adapter, optim, run = options.adapter, options.optim, options.run
    # Numbers and pairs of options, as `finetune` checks them.
    values: dict[str, Any] = {}
    for group in vars(options).values():
        values |= vars(group)
    with as_user_errors(TrainingError):
        arguments.check_numbers(values, _NUMBERS | numbers)
        arguments.check_options_agree(values)
    measuring_option = {"loss": "eval_every", "score": "score_every"}.get(run.keep_best or "")
    if measuring_option and not getattr(run, measuring_option):
        raise UserError(
            f"--keep-best {run.keep_best} compares the measurements of {flag(measuring_option)}, "
            f"which is 0. Pass {flag(measuring_option)} with a number of steps, too."
        )
    has_none_beside_others = len(run.report_to) > 1 and "none" in run.report_to
    if has_none_beside_others or not run.report_to:
        raise UserError(
            f"--report-to {' '.join(run.report_to)} must be one or more names of reporters, or "
            "none alone. Pass one of the two forms."
        )
    check_optim(optim)
    if optim.lora_plus is not None and adapter.freeze_a:
        raise UserError(
            "--lora-plus sets the learning rates of A and B, but --freeze-a trains B alone. Remove "
            "one of the two options."
        )
    if adapter.full and adapter.init_adapter:
        raise UserError(
            "--full trains without an adapter, but --init-adapter starts from one. Remove one of "
            "the two options."
        )
    coordinator_options = (run.coordinator, run.num_processes, run.process_id)
    n_given = sum(value is not None for value in coordinator_options)
    if n_given not in (0, len(coordinator_options)):
        raise UserError(
            "--coordinator, --num-processes and --process-id must be passed together. Pass all "
            "three, or none of them."
        )


def as_json(options: Options) -> dict[str, Any]:
    """Returns the options as one flat JSON object, by their field names."""
    values: dict[str, Any] = {}
    for group in dataclasses.asdict(options).values():
        values |= group
    return json.loads(json.dumps(values))  # tuples become lists, as when read from a file
