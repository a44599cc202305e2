"""The options of `python -m train.plan`."""

import dataclasses
from typing import Literal

from lora_jax.training.arguments import POSITIVE, check_numbers, numbers_from
from lora_jax.training.errors import TrainingError
from lora_jax.training.optimizers.named import Name
from train.console.errors import UserError, as_user_errors, flag
from train.console.help import HelpPage
from train.options.common import (
    AUTO,
    AdapterConfig,
    Attention,
    CollectiveMatmul,
    Experts,
    MeshAxis,
    Remat,
)
from train.options.defaults import Defaults
from train.options.paths import Place
from train.options.scripts.rollouts import RolloutDataConfig, check_group
from train.options.tokenizer import ModelCode
from train.plan.tasks import DRAWING, PLAIN, TASKS, Task
from train.run.rules import rules

# No weights are read, so the codes of a file are not known.
PlannedCodes = Literal["none", "int8", "int4", "nf4", "nf4-double"]

DEFAULT_UTILISATION = 0.4  # of the peak, that a step is assumed to reach without an estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The model, the machine, and the amount of data."""

    model: Place
    """A config.json, a folder with one, a GGUF file, or a name on the hub. No weights are read."""
    model_code: ModelCode = "auto"
    """The code that the model runs by; see train.sft."""
    rope_scaling: str | None = None
    """Scale the model's RoPE; see train.sft."""
    topology: str = "cpu:1"
    """A TPU slice, such as v5e:4x4, v5p:2x2x2, v6e:8x8 or tpu7x:2x2x1, or several, such as
    2xv5e:4x4; GPUs, such as rtx4090:1, h100:8, or h100:2x8 for two hosts; or cpu:8 for eight
    virtual devices of this CPU."""
    mesh: str | None = None
    """The mesh, as in train.sft: fsdp=4,tensor=4. By default fsdp gets as many devices as can share
    the batch, and tensor gets the rest; over several slices, as in train.sft."""
    slice_axis: MeshAxis | None = None
    """The axis of the mesh that goes from slice to slice, or from host to host of GPUs, by default
    data; see train.sft."""
    collective_matmul: CollectiveMatmul = "auto"
    """Products with kernels that several TPUs share; see train.sft. Without --alone, the plan shows
    both forms."""
    task: Task = PLAIN
    """The script whose run to plan. dpo: pairs, and the pass of the reference over them. grpo:
    completions, their scorer, and their sampler with its cache of keys and values."""
    batch_size: int = 8
    """Sequences in memory at once, on all devices together; for dpo, pairs."""
    grad_accum: int = 1
    """Batches per step."""
    seq_len: int = 1024
    """Tokens per sequence; for grpo, tokens of a prompt with its completion. The plan assumes that
    the loss counts all of them, or all tokens of a completion."""
    group: int | None = None
    """Completions of each prompt, for grpo; by default 8."""
    max_new_tokens: int | None = None
    """Tokens of a completion, for grpo; by default 128."""
    prompt_len: int | None = None
    """Tokens of the prompt that the completions of a pair share, for dpo. The loss does not count
    them. By default 0."""
    share_prompt: bool = True
    """Plan a prompt for each completion. By default the plan has each prompt once where a run would
    compute it once; dpo needs --prompt-len for that. See train.dpo."""
    images: int = 0
    """Images of each sequence, counted as the model sees them (in tiles), for models that read
    images in chats; by default the plan is of texts alone."""
    loss_chunk: int | None = None
    """Predictions whose logits are in memory at once, for each part of the batch on the mesh; see
    train.sft."""
    dtype: str = "bfloat16"
    """The dtype of the base and its activations (float32 or bfloat16). Adapters are always float32,
    and so are the weights in full fine-tuning."""
    quantize: PlannedCodes | None = None
    """The format of the base's quantized kernels; see train.sft. By default the format that
    config.json names."""
    remat: Remat = "full"
    """Activations to recompute in the backward pass; see train.sft. auto: plan the policy that a
    run takes, and, without --alone, the others of the ladder that it chooses from."""
    attention: Attention = "auto"
    """Computation of attention; see train.sft."""
    experts: Experts = "auto"
    """Computation of a mixture of experts; see train.sft."""
    adapters: tuple[int, ...] = ()
    """Numbers of adapters to plan for, such as 1 8 64: adapters that train side by side in one step
    over one base, sharing the --batch-size sequences evenly."""
    longest: bool = False
    """Find the longest row that fits, up to the model's limit. The search starts at --seq-len."""
    largest_batch: bool = False
    """Find the largest --batch-size that fits. The search starts at --batch-size."""
    decode_rows: int | None = None
    """Plan a token of decoding, too, of so many rows at once, whose caches hold --seq-len tokens:
    the time that reading codes, adapter and cache takes at the memory's rate, and the compiler's
    estimate."""
    decode_adapters: int | None = None
    """Number of adapters of the rows of --decode-rows, by default 1. Pass 0 for the base alone, or
    several for one batch with rows of different adapters, as in train.serve."""
    optimizer: Name = "adamw"
    """The optimiser, whose state takes memory; see train.sft."""
    tokens: float | None = None
    """Tokens to train on in total, to compute the chip-hours."""
    utilisation: float | None = None
    """The share of the peak FLOP/s that a step is assumed to reach, by default 0.4, to compute its
    time where the compiler estimates none: on GPUs and CPUs."""
    kernel_share: float | None = None
    """The share of the peak FLOP/s that kernels are assumed to reach on a TPU, by default 0.5: its
    compiler estimates the time of all else."""
    link_gbytes: float | None = None
    """GB/s that the links of a TPU are assumed to move along an axis of the mesh, both ways
    together; by default those published, 90 on v5e and 180 on v5p, v6e and tpu7x."""
    price: float | None = None
    """The price of one chip-hour, in any currency, to compute the cost."""
    capacity_gib: float | None = None
    """The memory of a device in GiB, to override the topology's."""
    mem_fraction: float | None = None
    """The share of a GPU's memory that JAX reserves (XLA_PYTHON_CLIENT_MEM_FRACTION), by default
    0.75: a plan fits if it needs no more."""
    peak_tflops: float | None = None
    """The peak TFLOP/s of a device, to override the topology's."""
    alone: bool = False
    """Plan only what the options ask for; without this option, LoRA with three --remat policies and
    full fine-tuning are planned for comparison."""
    json: bool = False
    """Print JSON instead of tables."""

    @property
    def drawn(self) -> tuple[int, int]:
        """Returns the number of completions per prompt, and the maximum tokens of one."""
        return self.group or RolloutDataConfig.group, self.max_new_tokens or Defaults.max_new_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Plan a run of train.sft, train.dpo or train.grpo: memory, FLOPs, time and cost, for LoRA and
    full fine-tuning."""

    HELP = HelpPage(
        "model topology mesh task batch_size seq_len rank quantize remat largest_batch",
        "--model Qwen/Qwen3-8B --topology v5e:4x4 --batch-size 16 --seq-len 4096",
    )

    plan: PlanConfig
    adapter: AdapterConfig


def check_options(options: PlanOptions) -> None:
    """Raises a UserError for options that are invalid for any model and machine."""
    _check_numbers(options.plan)
    _check_task(options.plan)
    _check_dtype_and_shares(options.plan)
    _check_adapter(options.plan, options.adapter)
    _check_several_adapters(options.plan, options.adapter)
    rules(options.adapter)


def _check_numbers(config: PlanConfig) -> None:
    """Raises a UserError for a number that is out of its range."""
    counts = ("batch_size", "grad_accum", "seq_len", "max_new_tokens", "prompt_len", "decode_rows")
    counts_or_zero = ("loss_chunk", "images", "decode_adapters")
    amounts = ("tokens", "price", "capacity_gib", "peak_tflops", "link_gbytes")
    ranges = {
        **dict.fromkeys(counts, numbers_from(1)),
        **dict.fromkeys(counts_or_zero, numbers_from(0)),
        **dict.fromkeys(amounts, POSITIVE),
        "group": numbers_from(2),
    }
    with as_user_errors(TrainingError):
        check_numbers(vars(config), ranges)


def _check_task(config: PlanConfig) -> None:
    """Raises a UserError for options that have no meaning for the task."""
    task = TASKS[config.task]
    for name in ("group", "max_new_tokens"):
        if not task.draws and getattr(config, name) is not None:
            raise UserError(
                f"{flag(name)} only applies to completions, which train.{DRAWING} draws. Remove "
                f"{flag(name)}, or use --task {DRAWING}."
            )
    if config.prompt_len is not None:
        if task.sequences == 1:
            raise UserError(
                "--prompt-len only applies to pairs, whose completions share a prompt. Remove "
                "--prompt-len, or use --task dpo."
            )
        if config.prompt_len >= config.seq_len:
            raise UserError(
                f"--prompt-len {config.prompt_len} leaves no room for completions in --seq-len "
                f"{config.seq_len}. Increase --seq-len, or reduce --prompt-len."
            )
    if config.decode_adapters is not None and config.decode_rows is None:
        raise UserError(
            "--decode-adapters only applies to the rows of --decode-rows. Pass --decode-rows, or "
            "remove --decode-adapters."
        )
    if task.draws:
        group, max_new_tokens = config.drawn
        check_group(config.batch_size, group, max_new_tokens, config.seq_len)
        if config.longest:
            raise UserError(
                f"--longest does not work with --task {DRAWING}, because --seq-len covers a "
                "prompt and a "
                "completion. Try several values of --seq-len, or use --largest-batch."
            )
    if config.adapters and config.remat == AUTO:
        raise UserError(
            "--remat auto chooses a policy for one adapter, but --adapters plans several. Pass a "
            "policy, such as --remat full."
        )
    if task.texts_alone and config.images:
        raise UserError(
            f"--images does not apply to train.{config.task}, which reads only text. Remove "
            "--images."
        )
    if task.texts_alone and config.adapters:
        raise UserError(
            f"--adapters only plans adapters of train.{PLAIN}. Remove --task {config.task}."
        )


def _check_dtype_and_shares(config: PlanConfig) -> None:
    """Raises a UserError for an unknown dtype, or for a share outside of (0, 1]."""
    if config.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {config.dtype} is unknown. Use float32 or bfloat16.")
    shares = {
        "utilisation": (config.utilisation, "the peak"),
        "kernel_share": (config.kernel_share, "the peak"),
        "mem_fraction": (config.mem_fraction, "a GPU's memory"),
    }
    for name, (share, total) in shares.items():
        if share is not None and not 0 < share <= 1:
            raise UserError(
                f"{flag(name)} {share} is no share of {total}. Pass a number above 0 and at most 1."
            )


def _check_adapter(config: PlanConfig, adapter: AdapterConfig) -> None:
    """Raises a UserError for parameters that a plan cannot train."""
    if adapter.init_adapter:
        raise UserError(
            "A plan reads no adapter from a folder, so --init-adapter has no effect. Describe the "
            "adapter by options such as --rank and --targets, and remove --init-adapter."
        )
    if adapter.full and config.quantize not in (None, "none"):
        raise UserError(
            f"--quantize {config.quantize} does not work with --full, because quantized weights "
            "cannot "
            "train. Remove one of the two options."
        )
    if adapter.full and adapter.peft_config:
        raise UserError(
            "--full trains without an adapter, but --peft-config describes an adapter. Remove one "
            "of the two options."
        )


def _check_several_adapters(config: PlanConfig, adapter: AdapterConfig) -> None:
    """Raises a UserError for --adapters with options of a single run, and for two searches."""
    if config.longest and config.largest_batch:
        raise UserError(
            "--longest and --largest-batch do not work together. Use one of the two options."
        )
    if config.adapters and (config.longest or config.largest_batch):
        raise UserError(
            "--longest and --largest-batch plan one run, but --adapters plans several. Remove "
            "--adapters, or the search."
        )
    if config.adapters and (adapter.full or config.alone):
        other_option = "--full" if adapter.full else "--alone"
        raise UserError(
            f"--adapters and {other_option} do not go together, because --adapters only plans "
            f"adapters. Remove one of the two options."
        )
    for n_adapters in config.adapters:
        if n_adapters < 1 or config.batch_size % n_adapters:
            raise UserError(
                f"--adapters {n_adapters} does not divide --batch-size {config.batch_size}, so the "
                "adapters cannot have equally many sequences. Change one of the two numbers."
            )
