"""Options shared by all training scripts: frozen dataclasses, checked before anything is read."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import arg

from lora_jax.training import arguments
from lora_jax.training.arguments import NumberRange, minimum
from lora_jax.training.errors import TrainingError
from lora_jax.training.optimizers.named import Name
from lora_jax.training.optimizers.schedules import DECAY, ScheduleKind
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
    """Returns the name, type and field of each option."""
    fields: list[tuple[str, Any, Any]] = []
    for variant in VARIANTS:
        kind = Annotated[bool, arg(help=variant.help)]
        fields.append((variant.option, kind, _switch(variant)))
        for setting in variant.settings:
            fields.append(_variant_number(variant, setting))
    return fields


def _variant_number(variant: Variant, setting: Setting) -> tuple[str, Any, Any]:
    """Returns the name, type and field of an option that a variant alone reads."""
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

# The numbers that the options of all scripts take.
_NUMBERS = arguments.NUMBERS | {
    **dict.fromkeys(("eval_every", "score_every"), minimum(0)),
    "num_processes": minimum(1),
    "heartbeat_timeout": minimum(10),
    "warmup_ratio": NumberRange(lambda x: 0 <= x < 1, "a share of the steps, from 0 to below 1"),
    "min_lr": NumberRange(lambda x: 0 <= x <= 1, "a share of the peak learning rate, from 0 to 1"),
    "decay": NumberRange(lambda x: 0 < x <= 1, "a share of the steps, above 0 and at most 1"),
    "neftune": arguments.NOT_NEGATIVE,
}


def _remat(words: list[str]) -> str:
    """Returns the policy that the words after --remat name."""
    if len(words) > 1:
        raise ValueError(f"one policy is needed, not {' '.join(words)}")
    return words[0] if words else "full"


def check_offload(remat: str | None, platform: str) -> None:
    """Raises a UserError for --remat offload on a CPU, where it would have no effect."""
    if remat == "offload" and platform == "cpu":
        raise UserError(
            "--remat offload moves the layers' inputs from a device to its host, and here the "
            "device is the host's CPU: give --remat full"
        )


MeshAxis = Literal["data", "fsdp", "expert", "sequence", "tensor"]

# One of the names; --remat without a name means "full".
Remat = Annotated[
    str | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=f"[{{{','.join((AUTO, *_REMAT))}}}]",
        instance_from_str=_remat,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
        choices=(AUTO, *_REMAT),
    ),
]

CollectiveMatmul = Literal["auto", "windowed", "whole"]
Attention = Literal["auto", "dense", "blockwise", "splash", "flash", "cudnn"]
Experts = Literal["auto", "blocks", "ragged"]
Quantize = Literal["none", "int8", "int4", "nf4", "nf4-double", "stored"]
ReportTo = Literal["none", *TRACKERS]  # type: ignore[valid-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _FactorOptions:
    """The kernels that are adapted, and their A and B."""

    targets: tuple[str, ...] = option(("all-linear",), field.TARGETS, compared_by="target_sets")
    """Modules to adapt: names (q_proj v_proj), presets (attention, mlp, experts, all-linear), one
    regular expression that matches whole paths, or none. With none, only --train, --bias and
    --train-tokens select parameters."""
    layers: tuple[int, ...] = option((), field.FACTORS)
    """Adapt only these layers, counted from 0."""
    rank: int = option(16, field.FACTORS, compared_by="ranks")
    """The rank r of the adapter."""
    alpha: float | None = option(None, field.FACTORS, compared_by="alphas")
    """The alpha of the adapter's scale; see --scaling. By default twice the rank; a variant may
    have another default."""
    dropout: float = option(0.0, field.FACTORS)
    """Dropout probability of the adapter's input."""
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)"] = option(
        "alpha/rank", field.FACTORS, compared_by="methods"
    )
    """The scale of the adapter's product. alpha/sqrt(rank) is rsLoRA."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "fast-pissa", "olora"] = option(
        "kaiming", field.PLAIN, compared_by="methods"
    )
    """Initialisation of A and B."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(VariantOptions, _FactorOptions):
    """Parameters that train."""

    bias: Literal["none", "adapted", "all"] = option("none", field.RULES)
    """Biases of the model to train: none, those of adapted layers, or all."""
    train: tuple[str, ...] = option((), field.RULES)
    """Modules that train in full besides the adapter, such as lm_head and norm."""
    train_tokens: tuple[int, ...] = option((), field.RULES)
    """Token ids whose embedding rows train."""
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
    """Take all options above from a PEFT configuration: an adapter_config.json or its folder."""
    full: bool = option(False, field.TRAINED, compared_by="methods")
    """Train every parameter, without an adapter."""
    init_adapter: Place | None = option(None, field.START)
    """Start from this adapter, with its own targets, rank and alpha: the folder of a run, of this
    library or of PEFT, or the hub name of a PEFT adapter."""
    allow_base_mismatch: bool = option(
        False, field.START, NoEffect.NO_INIT_ADAPTER, changeable=True
    )
    """Accept an adapter that was trained on another base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation."""

    steps: int | None = option(None, field.COURSE, excludes="epochs")
    """Optimiser steps."""
    epochs: float | None = option(None, field.COURSE, NoEffect.STREAM)
    """Passes over the data, as an alternative to --steps."""
    batch_size: int = option(8, field.OPTIMISATION, compared_by="batch_sizes")
    """Sequences in memory at once, on all devices together."""
    grad_accum: int = option(1, field.OPTIMISATION)
    """Batches to accumulate per step. The gradient equals that of one large batch."""
    optimizer: Name = option("adamw", field.OPTIMISATION)
    """The optimiser. muon orthogonalises the updates of matrices, A and B among them, and leaves
    the rest to adamw. schedule-free is AdamW with averaging instead of a schedule; the average is
    evaluated and saved."""
    lr: float | None = option(None, field.HIDDEN, of_inputs=False, compared_by="lrs")
    """The peak learning rate. Its default is AdamW's; a third of that for lion, and none for
    sgd. A variant of the adapter may have another default."""
    lr_rule: Literal["llama", "qwen"] | None = option(
        None, field.OPTIMISATION, NoEffect.ALONE, excludes="lr", uncompared=Uncompared.RATES
    )
    """Compute the learning rate from the model's width and the number of steps, as fitted for this
    model family in *LoRA Without Regret*; an alternative to --lr."""
    lora_plus: float | None = option(None, field.LORA_PLUS, compared_by="methods")
    """Ratio of B's learning rate to A's (LoRA+; the paper uses 16). By default 1."""
    beta1: float | None = option(None, field.OPTIMISATION)
    """Decay rate of the mean gradient (adamw, lion). schedule-free takes its gradients at a point
    in which the average has this share. By default 0.9."""
    beta2: float | None = option(None, field.OPTIMISATION)
    """Decay rate of the squared gradients (adamw, schedule-free): by default 0.999. For lion, the
    decay rate of the mean gradient: by default 0.99."""
    eps: float | None = option(None, field.OPTIMISATION)
    """Added to the root of the mean squared gradient (adamw, schedule-free). By default 1e-8."""
    momentum: float | None = option(None, field.OPTIMISATION)
    """Momentum of sgd (by default 0.9) and of muon (by default 0.95)."""
    schedule: ScheduleKind = option("cosine", field.OPTIMISATION, NoEffect.AVERAGES)
    """Schedule of the learning rate after the warmup. linear and cosine fall to --min-lr over all
    steps, wsd over the last ones (see --decay); inverse-sqrt falls as 1 / sqrt(step)."""
    warmup: int = option(3, field.OPTIMISATION, NoEffect.WARMUP_RATIO, excludes="warmup_ratio")
    """Steps of linear warmup of the learning rate."""
    warmup_ratio: float | None = option(None, field.OPTIMISATION)
    """Steps of warmup as a share of all steps; an alternative to --warmup."""
    min_lr: float = option(0.0, field.OPTIMISATION, NoEffect.AVERAGES, NoEffect.FLAT)
    """The final learning rate of linear, cosine and wsd, as a share of the peak."""
    decay: float = option(DECAY, field.OPTIMISATION, NoEffect.AVERAGES, NoEffect.NEVER_STABLE)
    """The share of the steps over which --schedule wsd falls."""
    weight_decay: float = option(0.0, field.OPTIMISATION)
    """Weight decay of A, B, kernels and embeddings. Norms and biases never decay."""
    grad_clip: float = option(1.0, field.OPTIMISATION)
    """Maximum norm of the whole gradient; 0 for no clipping."""
    neftune: float = option(0.0, field.OPTIMISATION, NoEffect.IMAGES)
    """NEFTune's alpha: adds noise of at most alpha / sqrt(length * width) to the embeddings of
    training tokens (the paper uses 5 to 15); 0 for none."""
    seed: int = option(0, field.OPTIMISATION, compared_by="seeds")
    """Seed of the adapter's initialisation, data order, dropout, and noise."""
    remat: Remat = option(None, field.OF_BASE, older="none")
    """Activations to recompute in the backward pass. auto: the first of none, products,
    projections, attention, full and offload that fits, by the memory of the compiled step; the run
    says which, and keeps it when it is resumed. full, or --remat without a name: all those of each
    layer but xA of small ranks, for much less memory and some more time. offload: so, and the
    layers' inputs go to the host's memory until they are needed (GPUs and TPUs), for very long
    rows. attention: as full, but what a kernel of attention returns (splash, flash) is kept too: it
    takes about as much memory as the layers' inputs, and saves much time in long rows. projections:
    so, and what attention's projections return is kept, in decoders and GPT-2. products: so, and
    what an MLP's products return is. Two policies of JAX keep the factors' products and scores as
    well: dots_saveable the results of all matrix products, dots_with_no_batch_dims_saveable of
    those with weights. By default auto on GPUs and TPUs, and none on CPUs."""
    attention: Attention = option("auto", field.OF_BASE)
    """Computation of attention. dense: all scores of a layer at once, in memory quadratic in the
    length. blockwise: a block of queries at a time, in memory linear in the length. splash: a
    kernel for TPUs. flash: a kernel for GPUs from Ampere on, on Python 3.12 and newer. cudnn: a
    kernel for GPUs from Hopper on, in half precision, up to 4,096 tokens. auto: dense below 512
    tokens; from there on splash on a TPU, flash on a GPU that has it, and blockwise elsewhere."""
    experts: Experts = option("auto", field.OF_BASE)
    """Computation of a mixture of experts. blocks: a loop over blocks of tokens of one expert.
    ragged: all tokens of a device, sorted by expert, in a kernel that only the TPU's compiler has.
    auto: ragged on a TPU (but blocks for --dropout on several chips, and for experts in codes that
    few rows choose, or more than a thousand an expert, or of which a kernel of a layer takes more
    than a GiB), and blocks elsewhere."""
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", field.OF_BASE, card=CardSection.OPTIMISATION
    )
    """The dtype of the base and its activations. Adapters are always float32, and so are the
    weights with --full."""

    quantize: Quantize | None = option(
        None, field.OF_BASE, NoEffect.FULL, NoEffect.INTRINSIC, card=CardSection.CODES
    )
    """Codes to keep the base's kernels in, under a float32 adapter (QLoRA): nf4, int4 or int8, in
    blocks of 64 with a scale each; nf4-double has its scales in 8 bits too; stored keeps the codes
    that the files hold. Each kernel is encoded as it is read. Embeddings, norms, routers and the
    output head stay in --dtype. By default the codes that --init-adapter was trained over; else
    stored where safetensors files hold codes (FP8, MXFP4, NF4, ...), and none elsewhere."""

    @property
    def remat_policy(self) -> bool | str:
        """The value of --remat, as models take it.

        Until a compiler has decided what "auto" is, all is computed again, which takes least.
        """
        return _REMAT["full" if self.remat == AUTO else self.remat or "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Evaluation and output."""

    config: str | None = option(None, field.OF_CALL)
    """A YAML file of options, by their names here; the command line overrides it. A run writes its
    own options to its folder as config.yaml, and that file repeats the run."""
    output: Place = option(field.REQUIRED, field.COURSE, shared=SharedOption.TABLE)
    """The output folder of the run."""
    mesh: str | None = option(None, field.CHANGEABLE, shared=SharedOption.PROCESS)
    """The device mesh, such as data=2,fsdp=4,tensor=2 (also expert= and sequence=; -1 takes the
    remaining devices). The batch is sharded over data, fsdp and expert, each row's tokens over
    sequence, and the base over all axes but data. By default fsdp gets as many devices as can share
    the batch, and tensor gets the rest; over several slices, they get those of one, and data has a
    part for each."""
    slice_axis: MeshAxis | None = option(
        None, field.CHANGEABLE, shared=SharedOption.PROCESS, uncompared=Uncompared.PROCESS
    )
    """The axis of the mesh that goes from slice to slice, where the devices are of several TPU
    slices, or of several hosts of GPUs; all others stay within one. By default data, so that only
    the gradients of what trains go over the slow network between them."""
    collective_matmul: CollectiveMatmul = option(
        "auto", field.CHANGEABLE, shared=SharedOption.PROCESS, uncompared=Uncompared.MANY_RUNS
    )
    """Products with kernels that several TPUs share. windowed: in parts, each as it arrives from a
    neighbour. whole: of each kernel, which is gathered beside other work. auto: whole, which the
    TPU's compiler estimated faster at the sizes that were tried."""
    distributed: bool = option(False, field.OF_PROCESSES, single=True)
    """Run as one process of many; SLURM, a TPU pod, GKE or Open MPI tells which one."""
    coordinator: Words | None = option(None, field.OF_PROCESSES, single=True, of="process")
    """Address of process 0, as host:port; the same in all processes."""
    num_processes: int | None = option(None, field.OF_PROCESSES)
    """Number of processes, with --coordinator."""
    process_id: int | None = option(None, field.OF_PROCESSES, of="process")
    """Number of this process, from 0, with --coordinator."""
    heartbeat_timeout: int = option(100, field.OF_PROCESSES, NoEffect.ONE_PROCESS)
    """Seconds without a sign of life after which a process of many counts as frozen: the others
    then end, and say how to go on. If its host cannot be reached, they end some 35 seconds later at
    most."""
    dry_run: bool = option(False, field.OF_CALL, single=True, uncompared=Uncompared.MANY_RUNS)
    """Train nothing and write nothing: show the first rows as the model sees them, the lengths of
    all, roles and fields of turns that are probably misspelled, and the steps, memory and time of
    the run."""
    resume: bool = option(False, field.OF_CALL, NoEffect.DRY_RUN, of_inputs=False)
    """Resume from the last checkpoint in the output folder. A finished run stays as it is, unless
    more steps or patience are asked for."""
    overwrite: bool = option(False, field.OF_CALL, excludes="resume", of_inputs=False)
    """Delete the run in the output folder and start a new one."""
    log_every: int = option(1, field.COURSE)
    """Steps between lines of metrics. A checkpoint has a line before it, too."""
    save_every: int = option(10, field.COURSE)
    """Steps between checkpoints; the last step always has one."""
    keep: int = option(2, field.COURSE)
    """Number of checkpoints to keep."""
    eval_every: int = option(0, field.CHANGEABLE)
    """Steps between evaluations of the loss on held-out data; 0 for none."""
    score_every: int = option(0, field.COURSE)
    """Steps between the task's own scores: execution accuracy on the questions of the SQL task,
    accuracy on the test rows of a classifier; 0 for none. Each score answers or classifies all
    of them."""
    keep_best: Literal["loss", "score"] | None = option(None, field.BEST)
    """Keep the adapter with the lowest loss of --eval-every, or with the highest score of
    --score-every. At the end it is the run's adapter, instead of the last one."""
    patience: int | None = option(
        None, field.BEST, changeable=True, uncompared=Uncompared.EARLY_STOPPING
    )
    """End the run after this many measurements of --keep-best in a row without improvement."""
    report_to: tuple[ReportTo, ...] = option(("tensorboard",), field.COURSE)
    """Services that get the metrics, beside metrics.jsonl; or none. tensorboard writes files to the
    output folder; each of the others needs the extra of its name. A resumed run continues its runs
    there."""
    report_project: Words | None = option(None, field.COURSE, NoEffect.NO_PROJECT)
    """The run's project in the service (MLflow calls it an experiment). By default the one that the
    service's own environment variable names, or lora_jax."""
    compilation_cache: Words | None = option(None, field.CHANGEABLE, shared=SharedOption.PROCESS)
    """The folder where JAX keeps compiled programs for later runs, or off. By default
    lora_jax/jax in the user's cache folder, or JAX_COMPILATION_CACHE_DIR. Many processes have no
    default: name a folder that all of them reach."""
    max_skipped: int = option(3, field.COURSE, card=CardSection.SKIPPED)
    """Stop the run after this many skipped steps in a row. A step is skipped if its loss or its
    gradient is not finite. A step whose batch has no token that counts is skipped, too, but does
    not count here."""


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
    values: dict[str, Any] = {}
    for group in vars(options).values():
        values |= vars(group)
    with as_user_errors(TrainingError):
        arguments.check_numbers(values, _NUMBERS | numbers)
        arguments.check_together(values)
    measuring_option = {"loss": "eval_every", "score": "score_every"}.get(run.keep_best or "")
    if measuring_option and not getattr(run, measuring_option):
        raise UserError(
            f"--keep-best {run.keep_best} goes by what {flag(measuring_option)} measures: give it, "
            "too"
        )
    has_none_beside_others = len(run.report_to) > 1 and "none" in run.report_to
    if has_none_beside_others or not run.report_to:
        raise UserError(
            f"--report-to {' '.join(run.report_to)}: names of reporters are needed, or none alone"
        )
    check_optim(optim)
    if optim.lora_plus is not None and adapter.freeze_a:
        raise UserError(
            "--lora-plus sets the rates of A and B, but --freeze-a trains B alone: give one"
        )
    if adapter.full and adapter.init_adapter:
        raise UserError("--full trains without an adapter, and --init-adapter starts from one")
    coordinator_options = (run.coordinator, run.num_processes, run.process_id)
    n_given = sum(value is not None for value in coordinator_options)
    if n_given not in (0, len(coordinator_options)):
        raise UserError("--coordinator, --num-processes and --process-id go together")


def as_json(options: Options) -> dict[str, Any]:
    """Returns the options as one flat JSON object, by their field names."""
    values: dict[str, Any] = {}
    for group in dataclasses.asdict(options).values():
        values |= group
    return json.loads(json.dumps(values))  # tuples become lists, as when read from a file
