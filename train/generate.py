"""Ask a fine-tuned model: `python -m train.generate --adapter runs/sql/adapter --prompt "…"`.

Without --prompt, each line of standard input is a prompt.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lora_jax.models import generate
from train.adapters.source import find_adapter, runnable
from train.run.cache import keep_compiled
from train.run.complete import left_padded, tokenized
from train.run.errors import UserError, flag, reported
from train.run.options.common import Attention, check_seed
from train.run.options.ignored import given_options
from train.run.options.sft import DEFAULT_MODEL
from train.run.pretrained import Outline, end_tokens, read_model, read_outline

_MULTIPLE = 64  # prompts are padded to a multiple of this, so that few lengths are compiled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Generate text with a base model and an adapter."""

    adapter: str | None = None
    """An adapter: the folder of a run, of this library or of PEFT, or the hub name of a PEFT
    adapter. Without it, the base answers alone."""
    model: str | None = None
    """The base: a hub name, a folder or a GGUF file. By default the base that the adapter names, or
    else SmolLM2-135M-Instruct."""
    prompt: str | None = None
    """The prompt to answer. Without it, each line of standard input is a prompt."""
    system: str | None = None
    """A system prompt, for models with a chat template."""
    max_new_tokens: int = 128
    """The maximum number of tokens to generate."""
    temperature: float = 0.0
    """The temperature of the sampler. 0 always takes the most likely token."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this (nucleus sampling)."""
    seed: int = 0
    """Seed of the sampler."""
    attention: Attention = "auto"
    """Computation of attention to the prompt. dense: all scores of a layer at once, in memory
    quadratic in the length. blockwise: a block of queries at a time, in memory linear in the
    length. auto: dense below 512 tokens, blockwise from there on. splash and cudnn are refused:
    these kernels read no KV cache."""
    allow_base_mismatch: bool = False
    """Accept an adapter that was trained on another base."""
    compilation_cache: str | None = None
    """The folder where JAX keeps compiled programs for later runs, or off. By default
    lora_jax/jax in the user's cache folder, or JAX_COMPILATION_CACHE_DIR."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    options = tyro.cli(
        tyro.conf.FlagCreatePairsOff[Options], args=args, prog="python -m train.generate"
    )
    with reported():
        check(options, given_options(sys.argv[1:] if args is None else args))
        run(options)


def run(options: Options) -> None:
    """Loads the model and its adapter, and prints an answer to each prompt.

    Raises:
      UserError: something that was asked for cannot be done; of several prompts that are too long,
        once the others are answered.
    """
    if said := keep_compiled(options.compilation_cache):
        print(said, file=sys.stderr)
    adapter = find_adapter(options.adapter) if options.adapter else None
    name = options.model or (adapter.base() if adapter else DEFAULT_MODEL)
    outline = read_outline(name)
    if adapter:
        outline = outline.scaled(adapter.rope_scaling).quantized(adapter.quantize)
    if options.system is not None and outline.tokenizer.chat_template is None:
        raise UserError(
            f"--system: {name} has no chat template to put a system prompt into: leave it out, or "
            "write it into the prompt"
        )
    mismatch = options.allow_base_mismatch
    if adapter:
        adapter.check(outline, allow_base_mismatch=mismatch)
    how = {"attention": options.attention, **outline.head}
    model, params = read_model(name, dtype="float32", **how)
    apply = None
    if adapter:
        adapted = adapter.load(model, params, name, allow_base_mismatch=mismatch)
        apply, params = runnable(model, adapted)
        del adapted
    key = jax.random.key(options.seed)
    prompts = [options.prompt] if options.prompt is not None else lines()
    refused = 0
    for number, prompt in enumerate(prompts):
        try:
            at = jax.random.fold_in(key, number)
            answer = reply(model, params, outline, options, prompt, at, apply=apply)
        except UserError as error:
            if options.prompt is not None:
                raise
            refused += 1
            print(f"prompt {number + 1} is left out: {error}", file=sys.stderr, flush=True)
        else:
            print(answer, flush=True)
    if refused:
        raise UserError(f"{refused} prompts got no answer; the reasons are above")


def check(options: Options, given: frozenset[str] = frozenset()) -> None:
    """Raises a UserError for options that make no sense, or that were given to no effect."""
    check_seed(options.seed)
    if options.temperature == 0 and (named := sorted({"top_p", "seed"} & given)):
        raise UserError(
            f"{flag(named[0])} is about sampling, and --temperature 0 (the default) always takes "
            "the most likely token: give a temperature above 0, or leave it out"
        )
    if options.adapter is None and "allow_base_mismatch" in given:
        raise UserError("--allow-base-mismatch is about an adapter: name one with --adapter")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: at least 1 is needed")
    if not 0 <= options.temperature < math.inf:
        raise UserError(f"--temperature {options.temperature}: a number from 0 on is needed")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p {options.top_p}: a probability above 0 and at most 1")
    if options.attention in ("splash", "cudnn"):
        raise UserError(
            f"--attention {options.attention}: the kernel does not read keys from a cache, and "
            "generation has one: give blockwise, dense or auto"
        )


def lines() -> Any:
    """Yields the prompts of standard input, one per line."""
    if sys.stdin.isatty():
        print("One prompt per line; end with Ctrl-D.", file=sys.stderr)
    return (line.strip() for line in sys.stdin if line.strip())


def reply(
    model: Any,
    params: Any,
    outline: Outline,
    options: Options,
    prompt: str,
    key: jax.Array,
    *,
    apply: Callable[..., Any] | None = None,
) -> str:
    """Returns the answer to one prompt.

    Args:
      model, params, outline: the model.
      options: the options.
      prompt: the prompt.
      key: random key of the sampler.
      apply: runs the model in the place of ``model.apply``.

    Raises:
      UserError: prompt and answer together are longer than the model allows.
    """
    if outline.tokenizer.chat_template is None:
        tokens = outline.tokenizer(prompt)["input_ids"]
    else:
        turns = [{"role": "system", "content": options.system}] if options.system else []
        (tokens,) = tokenized(outline, [[*turns, {"role": "user", "content": prompt}]])
    outline.check_length(len(tokens) + options.max_new_tokens, "prompt and --max-new-tokens")
    ids, mask = left_padded([tokens], -(-len(tokens) // _MULTIPLE) * _MULTIPLE, 0)
    new = generate(
        model,
        params,
        jnp.asarray(ids),
        jnp.asarray(mask),
        max_new_tokens=options.max_new_tokens,
        eos_token_id=end_tokens(outline) or None,
        temperature=options.temperature,
        top_p=options.top_p,
        key=key,
        apply=apply,
    )
    return outline.tokenizer.decode(np.asarray(new)[0].tolist(), skip_special_tokens=True).strip()


if __name__ == "__main__":
    main()
