"""The options of `train.serve`, and checks of their combinations."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lora_jax.training.arguments import NOT_NEGATIVE, NumberRange, check_numbers, numbers_from
from lora_jax.training.errors import TrainingError
from train.console.errors import UserError, as_user_errors
from train.console.help import HelpPage
from train.options.command import parse_options
from train.options.common import Quantize
from train.options.paths import Place, Words
from train.options.scripts.sft import DEFAULT_MODEL
from train.options.tokenizer import TemplateOption, TokenizerOption
from train.processes.mesh import parse_mesh
from train.run.pretrained import ModelInfo
from train.run.sampling import GenerationOption
from train.serve.routes.access import read_keys
from train.serve.routes.origins import is_loopback, read_origin

_LENGTH = 1024
_NUMBERS = {
    **dict.fromkeys(
        ("tenants", "tenants_per_key", "slots", "max_rank", "sequences", "tokens"), numbers_from(1)
    ),
    "max_length": numbers_from(2),
    "prefix_memory": NOT_NEGATIVE,
    **dict.fromkeys(
        ("session_idle", "missing_timeout"),
        NumberRange(lambda x: 60 <= x < float("inf"), "at least 60 seconds"),
    ),
    "port": NumberRange(
        lambda x: 0 <= x < 2**16, "a number from 0 to 65535 (0 chooses a free port)"
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(TokenizerOption, TemplateOption, GenerationOption):
    """Serve a base model and many adapters over HTTP: Tinker's API to train, and OpenAI's."""

    HELP = HelpPage(
        "model adapters output host port keys tenants max_rank quantize mesh",
        "--model Qwen/Qwen3-0.6B --adapters runs --port 8000",
    )

    model: Place = DEFAULT_MODEL
    """The base model: a hub name, a folder or a GGUF file. Clients use this name for it."""
    adapters: str | None = None
    """The path of a folder of adapters. Each folder in it (of a run, of this library or of PEFT) is
    served as a model with the folder's name, and is loaded when it is first used."""
    output: str = "runs/serve"
    """The path of the folder for tenants, their checkpoints and their commands. A server that
    starts again with this folder continues from them."""
    fresh: bool = False
    """Delete the contents of --output, and start again."""
    tenants: int = 64
    """Number of adapters that train in memory at the same time. The others stay on disk until their
    next command, as do those of a session that was silent for two minutes."""
    tenants_per_key: int | None = None
    """Number of adapters that one name of --keys may train in memory at the same time. By default
    --tenants."""
    session_idle: float | None = None
    """Seconds without a heartbeat, command or sample after which a session ends and its unsaved
    training is deleted. By default a session stays on disk until its client, or somebody on the
    server's page, ends it."""
    missing_timeout: float = 600.0
    """Seconds for which the commands of an adapter wait for an earlier command that is missing.
    Then they fail with an error that names the missing command, and the gradient before it is
    dropped."""
    slots: int = 8
    """Number of different adapters that the completions of one batch may use."""
    max_rank: int = 32
    """The largest rank of an adapter. Each adapter takes the memory and time of this rank."""
    sequences: int = 32
    """Number of completions that are generated at the same time. Others wait."""
    prefix_memory: float = 1.0
    """Maximum size in gigabytes of the cache of prompt prefixes on the device. Earlier turns of a
    chat, and beginnings that prompts share, are read from the cache and not computed again. 0
    turns the cache off. Owners of --keys do not share the cache, so that the time of an answer
    tells nothing about other owners' prompts."""
    fast_prompts: bool = False
    """Run pieces of several short prompts together, and also put generated tokens into the prefix
    cache. The last bits of an answer then depend on the other requests."""
    max_length: int | None = None
    """Maximum number of tokens of a sequence, prompt and completion together. By default 1,024, or
    the model's number of positions if it is smaller."""
    tokens: int | None = None
    """Number of tokens of a training batch, padding included. By default --max-length."""
    remat: bool = False
    """Recompute activations in the backward pass. This takes less memory and more time."""
    mesh: str | None = None
    """The device mesh, such as fsdp=4,tensor=2; see train.sft."""
    quantize: Quantize | None = None
    """The format in which the base's kernels are quantized; see train.sft."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the base and its activations. Adapters are always float32."""
    attention: Literal["auto", "dense", "blockwise"] = "auto"
    """Computation of attention; see train.generate."""
    keys: str | None = None
    """The path of a file of keys, one `name key` per line. Each request needs a key, and sees
    nothing of other names. Tinker's client only takes keys that begin with tml-."""
    host: Words = "127.0.0.1"
    """The address to listen at. An address that other machines reach needs --keys."""
    port: int = 8000
    """The port to listen at."""
    allow_origin: tuple[Words, ...] = ()
    """Origins of web pages that may use the server, such as http://localhost:3000, or * for all.
    Without --keys, a request is refused if another page than the server's own sent it, or if its
    Host is none of localhost, 127.0.0.1, [::1] and the hosts of these origins."""
    trust_request_chat_template: bool = False
    """Let requests bring a `chat_template`, as vLLM's option of this name does. A template runs as
    a program that may take unlimited time and memory. Use this option only if you trust all
    clients."""
    compilation_cache: Words | None = None
    """The folder where JAX keeps compiled programs for later runs, or off. By default
    lora_jax/jax in the user's cache folder, or JAX_COMPILATION_CACHE_DIR."""


def parse(args: Sequence[str]) -> ServeOptions:
    """Returns the options of a command line; raises a UserError for a path with a scheme."""
    return parse_options(ServeOptions, args, "train.serve")


def check(options: ServeOptions) -> dict[str, str] | None:
    """Checks the options, and returns the owners by their keys, or None without --keys.

    Raises:
      UserError: options make no sense.
    """
    with as_user_errors(TrainingError):
        check_numbers(vars(options), _NUMBERS)
    parse_mesh(options.mesh)
    for origin in options.allow_origin:
        read_origin(origin)
    if options.keys is None and not is_loopback(options.host):
        raise UserError(
            f"--host {options.host} can be reached by others, who could use the server as you can. "
            "Pass --keys with a file of `name key` lines, or remove --host."
        )
    tenants_per_key = options.tenants_per_key
    shares_nothing = options.keys is None or (tenants_per_key or 0) > options.tenants
    if tenants_per_key is not None and shares_nothing:
        raise UserError(
            f"--tenants-per-key {tenants_per_key} has no effect. It limits the adapters of each "
            f"name in --keys, and must be below --tenants, which is {options.tenants}. Pass --keys "
            "and a smaller --tenants-per-key."
        )
    if options.adapters is not None and not Path(options.adapters).expanduser().is_dir():
        raise UserError(
            f"--adapters {options.adapters}: This folder does not exist. Check the path."
        )
    output = Path(options.output).expanduser()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {options.output} is a file. Pass a folder.")
    return None if options.keys is None else read_keys(Path(options.keys))


def length_of(options: ServeOptions, outline: ModelInfo) -> int:
    """Returns the maximum length of a sequence, or raises a UserError if the model allows less."""
    if options.max_length is None:
        return min(_LENGTH, outline.max_tokens)
    outline.check_length(options.max_length, f"--max-length {options.max_length}")
    return options.max_length
