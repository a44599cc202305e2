"""Fills in defaults that depend on other options or an adapter's files, and checks these files."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from lora_jax.buckets.copies import folder_with_files, replace_copy_paths
from train.adapters.source import AdapterSource, find_adapter
from train.adapters.template import read_template
from train.console.errors import UserError
from train.options.defaults import Defaults
from train.options.optim import fill_optimizer_defaults
from train.options.rope import rope_scaling_text
from train.settings.files import CONFIG, read_options_file


def fill_defaults(options: Any, defaults: Defaults) -> Any:
    """Fills in the task's defaults for options that the user did not pass."""
    adapter = options.adapter
    source = None
    # --init-adapter with --full is an error later.
    if adapter.init_adapter is not None and not adapter.full:
        source = find_adapter(adapter.init_adapter, "--init-adapter")
    optim = _with_optim_defaults(options, defaults)
    if optim.quantize is None and source:
        quantization: Any = source.quantize
        optim = dataclasses.replace(optim, quantize=quantization)
    # Alpha is a multiple of the rank, which some variants set to 1.
    if adapter.alpha is None and adapter.peft_config is None:
        is_rank = any(variant.alpha_is_rank for variant in adapter.variants)
        alpha_by_rank = 1.0 if is_rank else defaults.alpha
        adapter = dataclasses.replace(adapter, alpha=alpha_by_rank * adapter.rank)
    run = options.run
    if getattr(run, "eval_questions", 0) is None:
        run = dataclasses.replace(run, eval_questions=defaults.eval_questions)
    data = _with_data_defaults(options, defaults, source)
    return dataclasses.replace(options, adapter=adapter, optim=optim, data=data, run=run)


def _with_optim_defaults(options: Any, defaults: Defaults) -> Any:
    """Returns the optimizer's options with defaults of its learning rate and the run's length."""
    adapter = options.adapter
    variant_rates = [variant.rate(defaults.lr) for variant in adapter.variants if variant.rate]
    if adapter.full:
        rate = defaults.full_lr
    elif variant_rates:
        rate = variant_rates[0]
    else:
        rate = defaults.lr
    optim = fill_optimizer_defaults(options.optim, lr=rate, beta2=defaults.beta2)
    if optim.epochs is not None or optim.steps is not None:
        return optim
    epochs = defaults.epochs
    if epochs is None and defaults.steps is None:
        epochs = 1.0
    return dataclasses.replace(optim, steps=defaults.steps, epochs=epochs)


def _with_data_defaults(options: Any, defaults: Defaults, source: AdapterSource | None) -> Any:
    """Returns the options about data with the defaults of the task and of --init-adapter."""
    data = options.data
    changes: dict[str, Any] = {}
    if data.model is None:
        stated_base = source.base() if source and source.base_info.get("model") else None
        changes["model"] = stated_base or defaults.model
    # The adapter of --init-adapter says how its base was run.
    if source:
        if source.rope_scaling and getattr(data, "rope_scaling", "") is None:
            changes["rope_scaling"] = rope_scaling_text(source.rope_scaling)
        if source.model_code and getattr(data, "model_code", "") == "auto":
            changes["model_code"] = source.model_code
        if data.tokenizer is None:
            changes["tokenizer"] = source.tokenizer
        template = source.chat_template
        began_with_template = not _began_without(options, "chat_template")
        if template and getattr(data, "chat_template", "") is None and began_with_template:
            changes["chat_template"] = replace_copy_paths(template)
    # A resumed run that is older than these options goes on without them.
    for name in ("share_prompt", "replay_routing"):
        if getattr(data, name, False) and _began_without(options, name):
            changes[name] = False
    data = dataclasses.replace(data, **changes)
    for name in ("model", "tokenizer", "chat_template"):
        path = getattr(data, name, None)
        if path:
            data = dataclasses.replace(data, **{name: absolute_path(path)})
    return data


def _began_without(options: Any, name: str) -> bool:
    """Returns True if --resume continues a run whose saved options lack an option.

    In runs that are older than these defaults, the base's own template renders chats, and the
    prompt is computed again for each completion.
    """
    if not options.run.resume:
        return False
    file = folder_with_files(options.run.output, (CONFIG,)) / CONFIG
    if not file.is_file():
        return False
    with contextlib.suppress(UserError):  # the check of the folder reports a damaged file
        return name not in read_options_file(file, options)
    return False


def check_files(options: Any) -> None:
    """Raises a UserError if the files of --init-adapter or --chat-template cannot be used."""
    name = options.adapter.init_adapter
    if name is not None:
        source = find_adapter(name, "--init-adapter")
        source.check_files()
        if source.is_subspace:
            raise UserError(
                f"--init-adapter {name} is a subspace (--intrinsic), not an adapter. Write a "
                "merged model with `train.export --merged`, and pass that model with --model."
            )
    template = getattr(options.data, "chat_template", None)
    if template is not None:
        read_template(template)


def absolute_path(name: str | None) -> str | None:
    """Returns the absolute path of an existing file or folder; other names stay unchanged."""
    if not name:
        return name
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
