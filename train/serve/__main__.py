"""Serve one base and many adapters over HTTP: `python -m train.serve --model … --adapters runs`.

Clients of Tinker's API train adapters, clients of OpenAI's talk to them.
"""

import logging
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from lora_jax import models
from lora_jax.models.layers.attend import choose_attention
from lora_jax.quantized import without_rows_kernel
from lora_jax.training.errors import TrainingError
from lora_jax.training.layout import Layout, layout_of_one_device
from lora_jax.training.run.lock import LOCK, FolderLock, RunLock
from train.adapters.source import find_adapter
from train.adapters.template import read_template
from train.console.errors import UserError, reported
from train.console.output import say
from train.processes.cache import keep_compiled
from train.processes.mesh import make_mesh
from train.run.costs import byte_size
from train.run.kernel_trials import AUTO, choose_replacements, find_trials
from train.run.log import doing
from train.run.pretrained import ModelInfo, check_weights, end_tokens, read_model, read_model_info
from train.run.sampling import apply_generation_config
from train.serve.app import make_app, make_starting_app
from train.serve.engine.engine import Engine
from train.serve.local import EngineLimits, make_engine
from train.serve.options import ServeOptions, check, length_of, parse
from train.serve.protocol.requests import RequestError
from train.serve.routes.access import Access, StartProgress, owner_of
from train.serve.routes.openai.models import AdapterLookup
from train.serve.routes.origins import Origins, read_origin
from train.serve.routes.status import TenantLookup
from train.serve.routes.tinker.api import Tinker, TinkerLimits
from train.serve.server import HttpServer

_logger = logging.getLogger(__name__)
_LEDGER = "ledger.sqlite"
_SWEPT, _LOOKED, _SILENT = 60.0, 5.0, 120.0  # seconds


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    with reported():
        run(parse(sys.argv[1:] if args is None else args))


def run(options: ServeOptions) -> None:
    """Reads the model, compiles, and serves until a signal.

    Raises:
      UserError: something that was asked for cannot be done: before weights are read.
    """
    keys = check(options)
    notice = keep_compiled(options.compilation_cache)
    if notice:
        say(notice)
    outline = read_model_info(options.model, options.tokenizer).quantized(options.quantize)
    outline = outline.with_template(options.chat_template)
    if isinstance(outline.config, models.EncoderConfig):
        raise UserError(
            f"--model {options.model} is an encoder, which cannot generate text. Pass a decoder."
        )
    if outline.is_torch:
        raise UserError(
            f"--model {options.model} ({outline.config.model_type}) runs as a torch module, and "
            "the server needs access to its KV cache. Use train.generate, or pass a model "
            "of a family that this library implements."
        )
    outline, sampling = apply_generation_config(outline, options.generation_config)
    length = length_of(options, outline)
    layout = _layout(options, outline)
    with ExitStack() as exits:
        folder = _output(options, exits)
        access = Access(keys, Origins(map(read_origin, options.allow_origin)))
        access.starting = StartProgress(outline.name)
        server = HttpServer(make_starting_app(access), options.host, options.port)
        exits.enter_context(server)
        say(f"starts at {server.address}, where a page shows the progress")
        engine = _engine(options, outline, layout, length, access.starting.see)
        limits = TinkerLimits(
            room=options.tenants,
            own_room=options.tenants_per_key,
            idle=options.session_idle,
            missing=options.missing_timeout,
        )
        tinker = Tinker(engine, folder, owner_of, limits=limits)
        engine.start()
        exits.callback(_every(_SWEPT, lambda: tinker.sweep(_SILENT), "the sweep"))
        exits.callback(
            _every(_LOOKED, tinker.sweep_samples, "the search for clients that are gone")
        )
        tinker.start(_SILENT)
        server.app = make_app(
            engine,
            outline.tokenizer,
            tinker.routes(),
            access=access,
            sampling=sampling,
            lookup=AdapterLookup(
                folder=Path(options.adapters).expanduser() if options.adapters else None,
                resolve=tinker.find_checkpoint,
                owns=tinker.owns,
                template_of=_template_of,
            ),
            tenants=TenantLookup(tinker.log.parking.status, tinker.rows.display_name),
            trusts_templates=options.trust_request_chat_template,
        )

        def stop() -> None:
            engine.close()
            tinker.close()

        access.starting = None
        server.serve(access, stop)


def _layout(options: ServeOptions, outline: ModelInfo) -> Layout:
    """Returns the layout of arrays: one device, or the mesh of --mesh."""
    if options.mesh is None:
        return layout_of_one_device()
    return Layout.of(make_mesh(options.mesh, options.sequences), outline.config)


def _output(options: ServeOptions, exits: ExitStack) -> Path:
    """Returns the folder of --output, after locking it against other servers.

    Raises:
      UserError: another one does, or the folder is none of a server's.
    """
    folder = Path(options.output).expanduser()
    paths = [*folder.iterdir()] if folder.exists() else []
    contents = [path for path in paths if path.name != LOCK]  # a killed server leaves its lock
    if contents and not (folder / _LEDGER).exists():
        raise UserError(
            f"--output {options.output} contains files, but no {_LEDGER} of a server. Name another "
            "folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        exits.enter_context(RunLock(FolderLock(folder), notice=say))
    except TrainingError as error:
        raise UserError(f"--output {options.output}: {error}") from None
    if options.fresh:
        for path in contents:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    elif contents:
        say(f"continues with the contents of {folder} (--fresh deletes them)")
    return folder


def choose_kernels(
    options: ServeOptions, outline: ModelInfo, layout: Layout, length: int, console: Console
) -> dict[str, str]:
    """Returns the options of a server's implementations, without kernels that fail.

    Args:
      options: the options.
      outline, layout: the model, and its placement.
      length: the longest row that trains.
      console: console to print to.
    """
    attention = choose_attention(
        outline.config,
        length,
        dtype=options.dtype,
        attention=options.attention,
        platform=layout.platform,
        split=layout.split(length),
    )
    requested = {"attention": options.attention, "experts": AUTO, "few_rows": AUTO}
    trials = find_trials(
        outline, layout, attention=attention.name, dtype=options.dtype, requested=requested
    )
    return {**requested, **choose_replacements(trials, layout.mesh.local_devices, console)}


def _engine(
    options: ServeOptions,
    outline: ModelInfo,
    layout: Layout,
    length: int,
    report: Callable[[int, int], None],
) -> Engine:
    """Returns a compiled engine, and calls `report` with the progress of the compilation."""
    console = Console(stderr=True)
    kernels = choose_kernels(options, outline, layout, length, console)
    with doing(console, f"reading the weights of {outline.name}"):
        model, params = read_model(
            outline.name,
            dtype=options.dtype,
            param_dtype=options.dtype,
            remat=options.remat,
            sharding=layout.of_parameter,
            attention=kernels["attention"],
            experts=kernels["experts"],
            **outline.head,
        )
    check_weights(outline, params)
    if kernels["few_rows"] == "xla":
        params = without_rows_kernel(params)
    tokenizer = outline.tokenizer

    def text_of(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    limits = EngineLimits(
        max_length=length,
        max_rank=options.max_rank,
        sequences=options.sequences,
        slots=options.slots,
        tenants=options.tenants,
        tokens=options.tokens,
        prefixes=int(options.prefix_memory * 1e9),
        fast_prompts=options.fast_prompts,
    )
    engine = make_engine(
        model,
        params,
        outline.name,
        eos=end_tokens(outline),
        text_of=text_of,
        limits=limits,
        layout=layout,
        tokenizer=options.tokenizer,
    )
    with doing(console, "compiling what requests will need"):
        engine.warm_up(report)
    lengths = ", ".join(map(str, engine.sizes.row_lengths))
    say(f"{outline.name}: {byte_size(engine.status().base_size)}; rows of {lengths} tokens")
    return engine


def _template_of(folder: Path) -> str | None:
    """Returns the chat template of an adapter; None for the base's own template.

    Raises:
      RequestError: the adapter or its template cannot be read.
    """
    try:
        source = find_adapter(str(folder))
        template_file = source.chat_template
        return None if template_file is None else read_template(str(template_file), source.option)
    except UserError as error:
        raise RequestError(f"{folder.name}: {error}") from None


def _every(seconds: float, function: Callable[[], object], task: str) -> Callable[[], None]:
    """Calls a function repeatedly in a thread, and returns a function that stops the calls.

    Args:
      seconds: the time between two calls.
      function: the function.
      task: what it does, for the log.
    """
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(seconds):
            try:
                function()
            except Exception:  # such as a full disk; the next time may be better
                _logger.exception("%s failed", task)

    threading.Thread(target=work, name="sweep", daemon=True).start()
    return ended.set


if __name__ == "__main__":
    main()
