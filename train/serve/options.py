"""The options of `train.serve`, and which of them make no sense."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lora_jax.training.arguments import NOT_NEGATIVE, NumberRange, check_numbers, minimum
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
        ("tenants", "tenants_per_key", "slots", "max_rank", "sequences", "tokens"), minimum(1)
    ),
    "max_length": minimum(2),
    "prefix_memory": NOT_NEGATIVE,
    **dict.fromkeys(
        ("session_idle", "missing_timeout"),
        NumberRange(lambda x: 60 <= x < float("inf"), "a minute or more is needed"),
    ),
    "port": NumberRange(
        lambda x: 0 <= x < 2**16, "a number from 0 to 65535 is needed (0: a free one)"
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
    """The base: a hub name, a folder or a GGUF file. Clients name it as it is given here."""
    adapters: str | None = None
    """A folder of adapters: each folder in it, of a run, of this library or of PEFT, is a model of
    its name, and is read at its first use."""
    output: str = "runs/serve"
    """The folder of what lasts: tenants, their checkpoints, and the commands that they gave. A
    server that is started again goes on with it."""
    fresh: bool = False
    """Delete what lasts in --output, and begin anew."""
    tenants: int = 64
    """Adapters that train in memory at once. Others lie on disk until their next command; so do
    those of a session that was silent for two minutes."""
    tenants_per_key: int | None = None
    """Adapters that train in memory at once by one name of --keys, so that no one takes all. By
    default as many as --tenants."""
    session_idle: float | None = None
    """Seconds without a heartbeat, command or sample after which a session ends: what it trained
    and did not save is deleted. By default, it lies on disk until its client, or somebody on the
    server's page, ends it."""
    missing_timeout: float = 600.0
    """Seconds for which commands of an adapter that trains wait for an earlier one that did not
    come. Then they get an error that names it, and the gradient before it is dropped."""
    slots: int = 8
    """Adapters that completions drawn side by side may have."""
    max_rank: int = 32
    """The largest rank of an adapter. Memory and time of each adapter are those of this rank."""
    sequences: int = 32
    """Completions that are drawn side by side; others wait."""
    prefix_memory: float = 1.0
    """Gigabytes on the device, at most, for what was computed of prompts: a chat's earlier turns,
    and what prompts begin with alike, are found again and not run again. 0 for none. An owner of
    --keys finds nothing of others', so that times of answers tell nothing of their prompts."""
    fast_prompts: bool = False
    """Run pieces of several short prompts together, and find what completions drew again as well.
    Last bits of an answer then depend on what else was asked for."""
    max_length: int | None = None
    """Tokens of a sequence at most, prompt and completion together. By default 1,024, or the
    model's positions where they are fewer."""
    tokens: int | None = None
    """Tokens of a batch that is trained on at once, padding included. By default --max-length."""
    remat: bool = False
    """Recompute activations in the backward pass, which takes less memory and more time."""
    mesh: str | None = None
    """The device mesh, such as fsdp=4,tensor=2; see train.sft."""
    quantize: Quantize | None = None
    """Codes to keep the base's kernels in; see train.sft."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the base and its activations. Adapters are always float32."""
    attention: Literal["auto", "dense", "blockwise"] = "auto"
    """Computation of attention; see train.generate."""
    keys: str | None = None
    """A file of keys, a `name key` a line. A request needs one, and whoever has one sees nothing of
    the others. Tinker's client takes keys that begin with tml- only."""
    host: Words = "127.0.0.1"
    """The address to listen at. Any but this machine's own needs --keys."""
    port: int = 8000
    """The port to listen at."""
    allow_origin: tuple[Words, ...] = ()
    """Origins of web pages that may use the server, such as http://localhost:3000, or * for all.
    Without --keys, a request is refused if another page than the server's own sent it, or if its
    Host is none of localhost, 127.0.0.1, [::1] and the hosts of these origins."""
    trust_request_chat_template: bool = False
    """Let requests bring a `chat_template`, as vLLM's option of this name does. It runs as a
    program, which may take time and memory without end: for clients that you trust."""
    compilation_cache: Words | None = None
    """The folder where JAX keeps compiled programs for later runs, or off. By default
    lora_jax/jax in the user's cache folder, or JAX_COMPILATION_CACHE_DIR."""


def parse(args: Sequence[str]) -> ServeOptions:
    """Returns the options of a command line; raises a UserError for a path with a scheme."""
    return parse_options(ServeOptions, args, "train.serve")


def check(options: ServeOptions) -> dict[str, str] | None:
    """Returns the owners by their keys, or None without --keys.

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
            f"--host {options.host}: others reach this address, and could do all that you can: "
            "give --keys with a file of `name key` lines, or leave --host out"
        )
    tenants_per_key = options.tenants_per_key
    shares_nothing = options.keys is None or (tenants_per_key or 0) > options.tenants
    if tenants_per_key is not None and shares_nothing:
        raise UserError(
            f"--tenants-per-key {tenants_per_key} changes nothing: it shares out the "
            f"{options.tenants} of --tenants among the names of --keys: give fewer, and --keys"
        )
    if options.adapters is not None and not Path(options.adapters).expanduser().is_dir():
        raise UserError(f"--adapters {options.adapters}: there is no such folder")
    output = Path(options.output).expanduser()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {options.output} is a file: a folder is needed")
    return None if options.keys is None else read_keys(Path(options.keys))


def length_of(options: ServeOptions, outline: ModelInfo) -> int:
    """Returns the tokens of a sequence at most; raises a UserError if the model allows fewer."""
    if options.max_length is None:
        return min(_LENGTH, outline.max_tokens)
    outline.check_length(options.max_length, f"--max-length {options.max_length}")
    return options.max_length
