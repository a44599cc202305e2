"""The options that all training scripts share: frozen dataclasses, checked as early as can be."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import lora_jax as lj
from train.run.errors import UserError, as_user_errors, flag

_REMAT: dict[str, bool | str] = {"none": False, "full": True}
_REMAT |= {name: name for name in ("dots_saveable", "dots_with_no_batch_dims_saveable")}


def _remat(given: list[str]) -> str:
    if len(given) > 1:
        raise ValueError(f"one policy is wanted, not {' '.join(given)}")
    return given[0] if given else "full"


# One of the names; the option alone is "full".
Remat = Annotated[
    str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar=f"[{{{','.join(_REMAT)}}}]",
        instance_from_str=_remat,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
        choices=tuple(_REMAT),
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What trains."""

    targets: tuple[str, ...] = ("all-linear",)
    """Names of modules (q_proj v_proj), one regular expression for whole paths, all-linear, or none
    for no adapter: what --train, --bias and --train-tokens name then trains alone."""
    layers: tuple[int, ...] = ()
    """Adapt these layers only."""
    rank: int = 16
    """r."""
    alpha: float | None = None
    """The adapter's product is scaled by alpha / rank. By default twice the rank."""
    dropout: float = 0.0
    """Of the adapter's input."""
    scaling: Literal["alpha/rank", "alpha/sqrt(rank)"] = "alpha/rank"
    """What alpha is divided by; the root of the rank is rsLoRA."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "fast-pissa", "olora"] = "kaiming"
    """How A and B begin."""
    dora: bool = False
    """Rescale each column to a trained magnitude (DoRA)."""
    freeze_a: bool = False
    """Train B alone, its gradient projected (LoRA-FA): A's inputs are not kept."""
    bias: Literal["none", "adapted", "all"] = "none"
    """Which biases of the model train as well: none, those of adapted layers, or all."""
    bias_on_b: bool = False
    """Train a bias on B."""
    train: tuple[str, ...] = ()
    """Names of modules that train in full beside the adapter, such as lm_head and norm."""
    train_tokens: tuple[int, ...] = ()
    """Tokens whose rows of the embedding train."""
    divide_rank: bool = False
    """Of a mixture of experts: give each expert the rank divided by the number that are active."""
    peft_config: str | None = None
    """Take all of the above from a PEFT configuration: an adapter_config.json, or its folder."""
    full: bool = False
    """Train every parameter, without an adapter."""
    init_adapter: str | None = None
    """Go on from the adapter in this folder; its own targets, rank and alpha apply."""
    allow_base_mismatch: bool = False
    """Accept an adapter that was trained on another base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisation."""

    steps: int | None = None
    """Optimiser steps."""
    epochs: float | None = None
    """Passes over the data, instead of --steps."""
    batch_size: int = 8
    """Sequences that are in memory at once."""
    grad_accum: int = 1
    """Batches a step; equal to one batch so many times as large."""
    lr: float | None = None
    """The highest learning rate (AdamW)."""
    lr_rule: Literal["llama", "qwen"] | None = None
    """In place of --lr: the rate that *LoRA Without Regret* fitted for models of that family, from
    the model's width and the number of steps."""
    lora_plus: float | None = None
    """B learns so many times as fast as A (LoRA+; 16 in its paper)."""
    beta2: float | None = None
    """Adam's memory of squared gradients. By default 0.999."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warmup; linear and cosine end at zero."""
    warmup: int = 3
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Of A, B and kernels; never of norms and biases."""
    grad_clip: float = 1.0
    """The largest norm of the gradient; 0 for no limit."""
    seed: int = 0
    """Of the adapter's start, the order of the data, and dropout."""
    remat: Remat = "none"
    """What is recomputed in the backward pass. full, or --remat alone: all of each layer: much less
    memory for some more time. dots_saveable and dots_with_no_batch_dims_saveable, policies
    of JAX, keep the results of products, or of those with weights."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base and its activations. Adapters are always float32."""

    @property
    def remat_policy(self) -> bool | str:
        """--remat as the models take it."""
        return _REMAT[self.remat]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Evaluation and output."""

    output: str
    """The folder of this run."""
    mesh: str | None = None
    """The devices, such as data=2,fsdp=4,tensor=2 (also expert= and sequence=; -1 takes all that
    are left). The batch is shared out over data, fsdp and expert, the base over all but data and
    sequence. By default as many are on fsdp as can share the batch, the others on tensor."""
    distributed: bool = False
    """This is one of many processes, and SLURM, a TPU pod, GKE or Open MPI says which."""
    coordinator: str | None = None
    """Many processes: the address of the first one, host:port; the same for all of them."""
    num_processes: int | None = None
    """Many processes: how many there are, for --coordinator."""
    process_id: int | None = None
    """Many processes: which one this is, from 0, for --coordinator."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder."""
    overwrite: bool = False
    """Delete the run that the output folder holds."""
    log_every: int = 1
    """Steps between lines of metrics."""
    save_every: int = 10
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """How many checkpoints are kept."""
    eval_every: int = 0
    """Steps between measurements of the loss on held-out data; 0 for none."""
    max_skipped: int = 3
    """A step whose loss or gradient is not finite is skipped; after so many in a row the run
    stops."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """All options of a script: the shared ones, and those on its data."""

    data: Any
    adapter: AdapterConfig
    optim: OptimConfig
    run: RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """Holds a task's defaults of options that were not given.

    Attributes:
      model: the base.
      alpha: times the rank.
      lr, full_lr: the highest learning rate with an adapter, and of full fine-tuning.
      beta2: Adam's memory of squared gradients.
      steps, epochs: the length of a run; one epoch where both are None.
    """

    model: str
    alpha: float
    lr: float
    full_lr: float
    beta2: float = 0.999
    steps: int | None = None
    epochs: float | None = None


def with_defaults(options: Any, defaults: Defaults) -> Any:
    """Returns the options with the task's defaults for those that were not given."""
    adapter, optim = options.adapter, options.optim
    if adapter.alpha is None and adapter.peft_config is None:
        adapter = dataclasses.replace(adapter, alpha=defaults.alpha * adapter.rank)
    if optim.lr is None and optim.lr_rule is None:
        rate = defaults.full_lr if adapter.full else defaults.lr
        optim = dataclasses.replace(optim, lr=rate)
    if optim.epochs is None and optim.steps is None:
        optim = dataclasses.replace(optim, epochs=defaults.epochs)
    if optim.beta2 is None:
        optim = dataclasses.replace(optim, beta2=defaults.beta2)
    data = options.data
    if data.model is None:
        data = dataclasses.replace(data, model=_base_of(adapter.init_adapter) or defaults.model)
    return dataclasses.replace(options, adapter=adapter, optim=optim, data=data)


def _base_of(adapter: str | None) -> str | None:
    """Returns the base that an adapter's folder names; None where there is none to ask."""
    if adapter is None or not Path(adapter).is_dir():
        return None  # a missing folder is refused once the options are checked
    with as_user_errors(ValueError, prefix="--init-adapter: "):
        return lj.adapter_info(adapter).get("model")


# What a resumed run may change: how long, how it reports, and what it keeps. Nothing else, or it
# would not be the run that it claims to be.
CHANGEABLE = frozenset(
    {"steps", "epochs", "output", "resume", "overwrite", "allow_base_mismatch", "log_every"}
    | {"save_every", "keep", "eval_every", "eval_questions", "max_skipped"}
    | {"mesh", "distributed", "coordinator", "num_processes", "process_id"}
)


def check_shared(options: Options) -> None:
    """Raises UserError where options with their defaults make no sense, whatever the data are."""
    adapter, optim, run = options.adapter, options.optim, options.run
    at_least(1, optim, "batch_size", "grad_accum", "steps")
    at_least(1, run, "log_every", "save_every", "keep", "max_skipped")
    at_least(0, optim, "warmup", "weight_decay", "grad_clip", "seed")
    at_least(0, run, "eval_every")
    if optim.lr is not None and not (math.isfinite(optim.lr) and optim.lr > 0):
        raise UserError(f"--lr {optim.lr}: a learning rate is a positive number")
    if (optim.lr is None) == (optim.lr_rule is None):
        raise UserError("--lr and --lr-rule both give a learning rate: give one of them")
    if optim.lora_plus is not None and not (math.isfinite(optim.lora_plus) and optim.lora_plus > 0):
        raise UserError(f"--lora-plus {optim.lora_plus}: a positive number")
    if optim.lora_plus is not None and adapter.freeze_a:
        raise UserError("--lora-plus is about the rates of A and B, and --freeze-a trains B alone")
    if optim.beta2 is None or not 0 <= optim.beta2 < 1:
        raise UserError(f"--beta2 {optim.beta2}: a number from 0 to below 1")
    if optim.steps is not None and optim.epochs is not None:
        raise UserError("--steps and --epochs both say how long to train: give one of them")
    if optim.epochs is not None and not (math.isfinite(optim.epochs) and optim.epochs > 0):
        raise UserError(f"--epochs {optim.epochs}: a positive number of passes over the data")
    if adapter.full and adapter.init_adapter:
        raise UserError("--full trains without an adapter, and --init-adapter goes on from one")
    if adapter.full and adapter.peft_config:
        raise UserError("--full trains without an adapter, and --peft-config describes one")
    if adapter.init_adapter and adapter.peft_config:
        raise UserError("--init-adapter brings its own rules: leave --peft-config out")
    if adapter.peft_config and (given := _of_adapters(adapter)):
        raise UserError(f"--peft-config says all of the adapter, {given} too: leave that out")
    if adapter.full and (given := _of_adapters(adapter, *_IGNORED_BY_FULL)):
        raise UserError(f"--full trains without an adapter, and {given} is about one")
    if adapter.full and optim.lora_plus is not None:
        raise UserError("--full trains without an adapter, and --lora-plus is about one")
    of_coordinator = (run.coordinator, run.num_processes, run.process_id)
    if len({value is None for value in of_coordinator}) > 1:
        raise UserError("--coordinator, --num-processes and --process-id go together")
    at_least(1, run, "num_processes")
    if run.resume and run.overwrite:
        raise UserError("--resume goes on with a run and --overwrite deletes it: give one of them")


_IGNORED_BY_FULL = ("targets", "rank", "alpha", "dropout")


def _of_adapters(adapter: AdapterConfig, *besides: str) -> str | None:
    """The first option that was given, describes the adapter, and is none of `besides`."""
    default = AdapterConfig()
    other = {"peft_config", "full", "init_adapter", "allow_base_mismatch", *besides}
    for name in (field.name for field in dataclasses.fields(AdapterConfig)):
        if name not in other and getattr(adapter, name) != getattr(default, name):
            return flag(name)
    return None


def at_least(least: int, part: Any, *names: str) -> None:
    """Raises UserError where one of the part's options is given and smaller."""
    for name in names:
        value = getattr(part, name)
        if value is not None and not value >= least:
            raise UserError(f"{flag(name)} {value}: at least {least} is needed")


def as_json(options: Options) -> dict[str, Any]:
    """The options as flat JSON, by their names on the command line."""
    parts = dataclasses.asdict(options).values()
    flat = {name: value for part in parts for name, value in part.items()}
    return json.loads(json.dumps(flat))  # tuples become lists, as when read from a file


def check_same_run(options: Options, saved: dict[str, Any], folder: Path) -> None:
    """Raises UserError where a resumed run's options differ from those that it began with."""
    now = as_json(options)
    differing = [
        f"{flag(name)} was {_option(saved.get(name))} and is now {_option(value)}"
        for name, value in now.items()
        if name not in CHANGEABLE and saved.get(name) != value
    ]
    if differing:
        raise UserError(
            f"--resume: the run in {folder} began with other options: {'; '.join(differing)}. "
            "Give the same, or begin another run in another --output"
        )


def _option(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
