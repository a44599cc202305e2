"""Ask fine-tuned models: `python -m train.generate --adapter runs/sql --prompt "…"`.

Prompts are arguments, the rows or lines of a file (--prompts), or the lines of standard input.
--interactive chats. The answers of several adapters over one base stand side by side.
"""

import sys
from collections.abc import Sequence

import jax
from rich.console import Console

from lora_jax.quantized import without_rows_kernel
from lora_jax.training.layout import layout_of_one_device
from train.console.errors import UserError, reported
from train.console.output import check_free, say
from train.generate.answers import read_schema
from train.generate.batch import answer_all, stream_answers
from train.generate.chat import talk
from train.generate.options import GenerateOptions, apply_sampling, check, parse
from train.generate.prompts import (
    check_lengths,
    check_template,
    drop_long_prompts,
    read_prompts,
    read_standard_input,
    tokenize,
    typed_prompts,
)
from train.generate.shared_base import (
    LoadedAdapters,
    choose_base,
    choose_model_code,
    choose_tokenizer,
    find_adapters,
    outline_as_trained,
    outline_with_template,
)
from train.options.field import given_options
from train.processes.cache import keep_compiled
from train.run.kernel_trials import choose_replacements, find_trials
from train.run.pretrained import read_model, read_model_info
from train.run.sampling import apply_generation_config

_DTYPE = "float32"


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    command_line = sys.argv[1:] if args is None else args
    with reported():
        options = parse(command_line)
        named_options = given_options(command_line)
        check(options, named_options)
        run(options, named_options)


def run(options: GenerateOptions, named_options: frozenset[str] = frozenset()) -> None:
    """Loads the model and its adapters, and answers the prompts, or chats.

    Args:
      options: the options.
      named_options: the names of those on the command line.

    Raises:
      UserError: something that was asked for cannot be done: before weights are read; of prompts
        on standard input that are too long, once the others are answered.
    """
    problem = keep_compiled(options.compilation_cache)
    if problem:
        print(problem, file=sys.stderr)
    if options.output:
        check_free(options.output, options.overwrite, "--output")
    prompts = read_prompts(options)
    adapters = find_adapters(options.adapter)
    sources = [adapter.source for adapter in adapters if adapter.source is not None]
    tokenizer = choose_tokenizer(sources, options.tokenizer)
    base = choose_base(sources, options.model)
    code = choose_model_code(sources, options.model_code)
    outline = read_model_info(base, tokenizer, model_code=code)
    if any(prompt.chat.images for prompt in prompts or ()):
        outline = outline.with_images()
    outline = outline_as_trained(outline, sources)
    outline = outline_with_template(outline, sources, options.chat_template)
    for source in sources:
        source.check(outline, allow_base_mismatch=options.allow_base_mismatch)
    check_template(options, outline, prompts or [])
    named_values = {name: value for name, value in vars(options).items() if name in named_options}
    outline, sampling = apply_generation_config(outline, options.generation_config, named_values)
    options = apply_sampling(options, sampling, named_options)
    grammar = None if options.schema is None else read_schema(options.schema, outline)

    # Someone who types a line waits for its answer; the lines of a pipe are answered together.
    reads_lines = not (prompts or options.interactive or options.output)
    one_by_one = reads_lines and sys.stdin.isatty()
    n_refused = 0
    if prompts is not None:
        tokens = tokenize(prompts, outline, options.system)
        check_lengths(prompts, tokens, outline, options)
    elif not (options.interactive or one_by_one):
        prompts = read_standard_input()
        n_prompts = len(prompts)
        tokens = tokenize(prompts, outline, options.system)
        prompts, tokens = drop_long_prompts(prompts, tokens, outline, options)
        n_refused = n_prompts - len(prompts)

    model, params = read_model(
        outline.name, dtype=_DTYPE, attention=options.attention, **outline.head
    )
    # The kernels of attention do not read a cache, and experts are computed in blocks.
    trials = find_trials(
        outline,
        layout_of_one_device(),
        attention=options.attention,
        dtype=_DTYPE,
        requested={"attention": options.attention, "experts": "blocks"},
    )
    if choose_replacements(trials, jax.local_devices()[:1], Console(stderr=True)):
        params = without_rows_kernel(params)
    if outline.is_torch:
        say(model.config.cache_line())
    loaded = LoadedAdapters(model, params, adapters, outline, options, grammar)
    if options.interactive:
        talk(loaded)
    elif prompts is None:
        n_refused = stream_answers(loaded, typed_prompts())
    elif sys.stdout.isatty() and len(prompts) * options.num_samples == 1 and not options.output:
        stream_answers(loaded, prompts)
    elif prompts:
        answer_all(loaded, prompts, tokens)
    if n_refused:
        raise UserError(
            f"{n_refused} prompts got no answer. The lines above give the reasons. Correct these "
            "prompts, and ask them again."
        )


if __name__ == "__main__":
    main()
