"""The options of `train.generate`, and checks of their combinations."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.training.arguments import NOT_NEGATIVE, SEED, NumberRange, check_numbers, numbers_from
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
    **dict.fromkeys(("max_new_tokens", "batch_size", "num_samples", "top_k"), numbers_from(1)),
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
    """The adapters that answer. Each is the folder of a run, of this library or of PEFT, the hub
    name of a PEFT adapter, or name=folder. `base` is the base model alone, and ./base is a folder
    of that name. Answers of several adapters are shown side by side. By default only the base
    answers."""
    model: Place | None = None
    """The base: a hub name, a folder or a GGUF file. By default the base that the adapters name, or
    else SmolLM2-135M-Instruct."""
    model_code: ModelCode = "auto"
    """The implementation of the model; see train.sft. By default the one that the adapters were
    trained with."""
    prompt: tuple[Words, ...] = ()
    """Prompts to answer. Without any, they come from --prompts, or from standard input, one per
    line."""
    prompts: str | None = None
    """A file of prompts: rows with `prompt` or `messages` (JSONL, JSON, CSV, TSV, also gzipped, or
    Parquet) or, with any other ending, one prompt per line."""
    image: tuple[str, ...] = ()
    """Images to put before the text of every --prompt, for a model that reads images. Rows of
    --prompts name their images themselves, as for training."""
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
    """The seed of the sampler. Sampled tokens depend on the prompt's number, and not on batches."""
    num_samples: int = 1
    """The number of answers to each prompt."""
    stop: tuple[Words, ...] = ()
    """Texts that end an answer. The answer does not contain them. (In a shell, $'\\n' is a line
    break.)"""
    schema: str | None = None
    """The path of a JSON schema. Each answer is JSON that follows the schema, unless
    --max-new-tokens cuts the answer off."""
    output: str | None = None
    """The path of a file of JSON lines to write, one per answer. The file appears after the last
    answer, or after Ctrl-C."""
    overwrite: bool = False
    """Replace the file of --output."""
    batch_size: int = 8
    """The number of answers that are generated at the same time."""
    merge: bool = False
    """Merge the adapter into the base's weights. This is the default for a single adapter, except
    in a chat and over a quantized base."""
    no_merge: bool = False
    """Run the adapter beside the base. This is the default for several adapters and in a chat."""
    attention: Attention = "auto"
    """Computation of attention to the prompt. dense: all scores of a layer at once, so memory
    grows with the square of the length. blockwise: a block of queries at a time, so memory grows
    with the length. auto: dense below 512 tokens, and blockwise from there on. splash, flash and
    cudnn are refused, because these kernels do not read a KV cache."""
    allow_base_mismatch: bool = False
    """Accept an adapter that was trained on another base."""
    compilation_cache: Words | None = None
    """The folder where JAX keeps compiled programs for later runs, or off. By default
    lora_jax/jax in the user's cache folder, or JAX_COMPILATION_CACHE_DIR."""


def parse(args: Sequence[str]) -> GenerateOptions:
    """Returns the options of a command line; raises a UserError for a path with a scheme."""
    return parse_options(GenerateOptions, args, "train.generate")


def check(options: GenerateOptions, named_options: frozenset[str] = frozenset()) -> None:
    """Raises a UserError for invalid options, and for options that would have no effect.

    Args:
      options: the options.
      named_options: the names of those on the command line.
    """
    for name in ("adapter", "prompt", "image", "stop"):
        if name in named_options and not getattr(options, name):
            raise UserError(f"{flag(name)} has no value. Pass a value, or remove {flag(name)}.")
    with as_user_errors(TrainingError):
        check_numbers(vars(options), _NUMBERS)
    if "" in options.stop:
        raise UserError(
            "--stop '' would end every answer before its first token. Pass a text with at least "
            "one character."
        )
    if any(not prompt.strip() for prompt in options.prompt):
        raise UserError("--prompt: One of the prompts is empty. Remove it.")
    check_other(options.output, options.prompts, "--output", "--prompts")
    if options.attention in ("splash", "flash", "cudnn"):
        raise UserError(
            f"--attention {options.attention} cannot be used here, because its kernel does not "
            "read the KV cache of generation. Pass blockwise, dense or auto."
        )
    for case in _cases_without_effect(options, named_options):
        useless_options = [name for name in case.names if name in named_options]
        if case.holds and useless_options:
            raise UserError(f"{flag(useless_options[0])} {case.reason}")


def apply_sampling(
    options: GenerateOptions, sampling: Mapping[str, Any], named_options: frozenset[str]
) -> GenerateOptions:
    """Returns the options with a generation config's values for options not on the command line.

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


def _cases_without_effect(
    options: GenerateOptions, named_options: frozenset[str]
) -> list[_CaseWithoutEffect]:
    """Returns the cases in which options have no effect."""
    cases = [
        (
            options.temperature == 0 and options.generation_config is None,
            ("num_samples", "seed", "top_k", "top_p"),
            "has no effect, because --temperature 0 (the default) always takes the most likely "
            "token. Pass a temperature above 0, or remove the option.",
        ),
        (
            options.temperature == 0 and "temperature" in named_options,
            ("generation_config",),
            "has no effect, because --temperature 0 always takes the most likely token. Remove one "
            "of these options.",
        ),
        (
            not {*options.adapter} - {BASE},
            ("allow_base_mismatch", "merge", "no_merge"),
            "has no effect without an adapter. Pass --adapter.",
        ),
        (options.no_merge, ("merge",), "contradicts --no-merge. Pass only one of the two."),
        (
            options.interactive,
            ("prompt", "prompts", "output", "overwrite", "batch_size", "num_samples"),
            "has no effect in a chat. Remove the option, or remove --interactive.",
        ),
        (
            not options.prompt,
            ("image",),
            "adds images to each --prompt, but there is no --prompt. Pass one.",
        ),
        (
            bool(options.prompt),
            ("prompts",),
            "and --prompt both name prompts. Pass only one of the two.",
        ),
        (
            options.output is None,
            ("overwrite",),
            "replaces the file of --output, but --output is not set. Pass --output, or remove the "
            "option.",
        ),
        (
            len(options.prompt) * options.num_samples == 1,
            ("batch_size",),
            "has no effect, because only one answer is generated. Remove the option.",
        ),
    ]
    return [_CaseWithoutEffect(*case) for case in cases]
