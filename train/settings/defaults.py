"""The defaults of options that depend on others or on an adapter's files, and checks of files."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from lora_jax.buckets.copies import glimpse, shown
from train.adapters.source import find_adapter
from train.adapters.template import read_template
from train.console.errors import UserError
from train.options.defaults import Defaults
from train.options.optim import fill_optimizer_defaults
from train.options.rope import rope_scaling_text
from train.settings.files import CONFIG, read_options_file


def fill_defaults(options: Any, defaults: Defaults) -> Any:
    """Fills in the task's defaults for options that were not given."""
    adapter, optim = options.adapter, options.optim
    if adapter.alpha is None and adapter.peft_config is None:
        is_rank = any(variant.alpha_is_rank for variant in adapter.variants)
        times = 1.0 if is_rank else defaults.alpha
        adapter = dataclasses.replace(adapter, alpha=times * adapter.rank)
    of_variants = [variant.rate(defaults.lr) for variant in adapter.variants if variant.rate]
    rate = defaults.full_lr if adapter.full else [*of_variants, defaults.lr][0]
    optim = fill_optimizer_defaults(optim, lr=rate, beta2=defaults.beta2)
    if optim.epochs is None and optim.steps is None:
        epochs = defaults.epochs or (1.0 if defaults.steps is None else None)
        optim = dataclasses.replace(optim, steps=defaults.steps, epochs=epochs)
    data, source = options.data, None
    if adapter.init_adapter is not None and not adapter.full:  # both together are an error later
        source = find_adapter(adapter.init_adapter, "--init-adapter")
    if data.model is None:
        stated = source.base() if source and source.about.get("model") else None
        data = dataclasses.replace(data, model=stated or defaults.model)
    if source and source.rope_scaling and getattr(data, "rope_scaling", "") is None:
        data = dataclasses.replace(data, rope_scaling=rope_scaling_text(source.rope_scaling))
    if source and source.model_code and getattr(data, "model_code", "") == "auto":
        data = dataclasses.replace(data, model_code=source.model_code)
    if data.tokenizer is None and source:
        data = dataclasses.replace(data, tokenizer=source.tokenizer)
    template = source.chat_template if source else None
    is_new = not _began_without(options, "chat_template")
    if template and getattr(data, "chat_template", "") is None and is_new:
        data = dataclasses.replace(data, chat_template=shown(template))
    for name in ("share_prompt", "replay_routing"):
        if getattr(data, name, False) and _began_without(options, name):
            data = dataclasses.replace(data, **{name: False})
    for name in ("model", "tokenizer", "chat_template"):
        if given := getattr(data, name, None):
            data = dataclasses.replace(data, **{name: absolute_path(given)})
    if optim.quantize is None and source:
        codes: Any = source.quantize
        optim = dataclasses.replace(optim, quantize=codes)
    run = options.run
    if getattr(run, "eval_questions", 0) is None:
        run = dataclasses.replace(run, eval_questions=defaults.eval_questions)
    return dataclasses.replace(options, adapter=adapter, optim=optim, data=data, run=run)


def _began_without(options: Any, name: str) -> bool:
    """Returns True if --resume goes on with a run that began without an option.

    In runs that are older than these defaults, the base's own template renders chats, and each
    completion has a prompt of its own.
    """
    if not options.run.resume:
        return False
    file = glimpse(options.run.output, (CONFIG,)) / CONFIG
    if not file.is_file():
        return False
    with contextlib.suppress(UserError):  # the check of the folder tells of a damaged file
        return name not in read_options_file(file, options)
    return False


def check_files(options: Any) -> None:
    """Raises a UserError if --init-adapter or --chat-template name files that cannot be used."""
    if (name := options.adapter.init_adapter) is not None:
        source = find_adapter(name, "--init-adapter")
        source.check_files()
        if source.is_subspace:
            raise UserError(
                f"--init-adapter {name} is a subspace (--intrinsic), not an adapter: "
                "`train.export --merged` writes a model to go on from"
            )
    if (template := getattr(options.data, "chat_template", None)) is not None:
        read_template(template)


def absolute_path(name: str | None) -> str | None:
    """Returns an existing path as absolute; other names unchanged."""
    path = Path(name or "").expanduser()
    return str(path.absolute()) if name and path.exists() else name
