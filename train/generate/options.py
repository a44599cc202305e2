"""The options of `train.generate`, and which of them make no sense together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.training.arguments import NOT_NEGATIVE, SEED, NumberRange, check_numbers, minimum
from lora_jax.training.errors import TrainingError
from train.console.errors import UserError, as_user_errors, flag
from train.console.help import HelpPage
from train.console.output import check_other
from train.options.command import parse_options
from train.options.common import Attention
from train.options.paths import Place, Words
from train.options.tokenizer import ModelCode, TemplateOption, TokenizerOption
from train.run.sampling import GenerationOption

BASE = "base"  # the name of the base alone among the adapters
_NUMBERS = {
    "seed": SEED,
    **dict.fromkeys(("max_new_tokens", "batch_size", "num_samples", "top_k"), minimum(1)),
    "temperature": NOT_NEGATIVE,
    "top_p": NumberRange(lambda x: 0 < x <= 1, "a probability above 0 and at most 1"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(TokenizerOption, TemplateOption, GenerationOption):
    """Generate text with a base model and adapters, or chat with them."""

    HELP = HelpPage(
        "adapter model prompt prompts interactive system max_new_tokens temperature output",
        "--adapter runs/mine --prompt 'How do I start?'",
    )

    adapter: tuple[Place, ...] = ()
    """Adapters: folders of runs, of this library or of PEFT, or hub names of PEFT adapters; also
    name=folder. `base` is the base alone (./base a folder of that name). Answers of several stand
    side by side. Without any, the base answers alone."""
    model: Place | None = None
    """The base: a hub name, a folder or a GGUF file. By default the base that the adapters name, or
    else SmolLM2-135M-Instruct."""
    model_code: ModelCode = "auto"
    """The code that the model runs by; see train.sft. By default that of the adapters."""
    prompt: tuple[Words, ...] = ()
    """Prompts to answer. Without any, they come from --prompts, or from standard input, one per
    line."""
    prompts: str | None = None
    """A file of prompts: rows with `prompt` or `messages` (JSONL, JSON, CSV, TSV, also gzipped, or
    Parquet) or, with any other ending, one prompt per line."""
    image: tuple[str, ...] = ()
    """Images that every --prompt shows, ahead of its text, for a model that reads images. Rows of
    --prompts have their own, as for training."""
    interactive: bool = False
    """Chat in the terminal; /help lists the commands."""
    system: Words | None = None
    """A system prompt, for models with a chat template."""
    max_new_tokens: int = 128
    """The maximum number of tokens to generate."""
    temperature: float = 0.0
    """The temperature of the sampler. 0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this (nucleus sampling)."""
    top_k: int | None = None
    """Sample from this many of the most likely tokens, before --top-p."""
    seed: int = 0
    """Seed of the sampler. What it draws depends on the prompt's number alone, not on batches."""
    num_samples: int = 1
    """Answers to each prompt."""
    stop: tuple[Words, ...] = ()
    """Texts that end an answer; they are no part of it. (In a shell, $'\\n' is a line break.)"""
    schema: str | None = None
    """A file with a JSON schema: each answer is JSON that it describes, unless --max-new-tokens
    cuts it short."""
    output: str | None = None
    """A file of JSON lines to write, one an answer; it appears once all are there, or at Ctrl-C."""
    overwrite: bool = False
    """Replace the file of --output."""
    batch_size: int = 8
    """Answers that are generated at once."""
    merge: bool = False
    """Run with merged weights. The default for a single adapter, except in a chat and over a base
    in codes."""
    no_merge: bool = False
    """Run the adapter beside the base. The default for several, and in a chat."""
    attention: Attention = "auto"
    """Computation of attention to the prompt. dense: all scores of a layer at once, in memory
    quadratic in the length. blockwise: a block of queries at a time, in memory linear in the
    length. auto: dense below 512 tokens, blockwise from there on. splash, flash and cudnn are
    refused: these kernels read no KV cache."""
    allow_base_mismatch: bool = False
    """Accept an adapter that was trained on another base."""
    compilation_cache: Words | None = None
    """The folder where JAX keeps compiled programs for later runs, or off. By default
    lora_jax/jax in the user's cache folder, or JAX_COMPILATION_CACHE_DIR."""


def parse(args: Sequence[str]) -> GenerateOptions:
    """Returns the options of a command line; raises a UserError for a path with a scheme."""
    return parse_options(GenerateOptions, args, "train.generate")


def check(options: GenerateOptions, named_options: frozenset[str] = frozenset()) -> None:
    """Raises a UserError for options that make no sense, or that were given to no effect.

    Args:
      options: the options.
      named_options: the names of those on the command line.
    """
    for name in ("adapter", "prompt", "image", "stop"):
        if name in named_options and not getattr(options, name):
            raise UserError(f"{flag(name)} has no value: give one, or leave it out")
    with as_user_errors(TrainingError):
        check_numbers(vars(options), _NUMBERS)
    if "" in options.stop:
        raise UserError("--stop '': an empty text would end every answer before it begins")
    if any(not prompt.strip() for prompt in options.prompt):
        raise UserError("--prompt: one of the prompts is empty: leave it out")
    check_other(options.output, options.prompts, "--output", "--prompts")
    if options.attention in ("splash", "flash", "cudnn"):
        raise UserError(
            f"--attention {options.attention}: the kernel does not read keys from a cache, and "
            "generation has one: give blockwise, dense or auto"
        )
    for case in _without_effect(options, named_options):
        useless_options = [name for name in case.names if name in named_options]
        if case.holds and useless_options:
            raise UserError(f"{flag(useless_options[0])} {case.reason}")


def apply_sampling(
    options: GenerateOptions, sampling: Mapping[str, Any], named_options: frozenset[str]
) -> GenerateOptions:
    """Returns the options with those of a generation config that the command line does not name.

    Raises:
      UserError: an option has no effect beside them.
    """
    values_of_file = {name: value for name, value in sampling.items() if name not in named_options}
    options = dataclasses.replace(options, **values_of_file, generation_config=None)
    check(options, named_options)
    return options


class _CaseWithoutEffect(NamedTuple):
    """A case in which options have no effect.

    Attributes:
      holds: whether it is the case.
      names: the options.
      reason: what follows the option in a message.
    """

    holds: bool
    names: tuple[str, ...]
    reason: str


def _without_effect(
    options: GenerateOptions, named_options: frozenset[str]
) -> list[_CaseWithoutEffect]:
    """Returns the cases in which options have no effect."""
    cases = [
        (
            options.temperature == 0 and options.generation_config is None,
            ("num_samples", "seed", "top_k", "top_p"),
            "is about sampling, and --temperature 0 (the default) always takes the most likely "
            "token: give a temperature above 0, or leave it out",
        ),
        (
            options.temperature == 0 and "temperature" in named_options,
            ("generation_config",),
            "says how to sample, and --temperature 0 always takes the most likely token: leave out "
            "one of them",
        ),
        (
            not {*options.adapter} - {BASE},
            ("allow_base_mismatch", "merge", "no_merge"),
            "is about an adapter: name one with --adapter",
        ),
        (options.no_merge, ("merge",), "contradicts --no-merge: give one of them"),
        (
            options.interactive,
            ("prompt", "prompts", "output", "overwrite", "batch_size", "num_samples"),
            "has no effect on a chat: leave it out, or leave out --interactive",
        ),
        (not options.prompt, ("image",), "is what each --prompt shows: give one"),
        (bool(options.prompt), ("prompts",), "and --prompt both name prompts: give one"),
        (
            options.output is None,
            ("overwrite",),
            "replaces the file of --output: name one, or leave it out",
        ),
        (
            len(options.prompt) * options.num_samples == 1,
            ("batch_size",),
            "is about several answers, and one is asked for: leave it out",
        ),
    ]
    return [_CaseWithoutEffect(*case) for case in cases]
