"""From a name or a path to local files: the hub, its cache, or a model that a package carries."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.hf.bundled import BUNDLES

_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "merges.txt", "vocab.*"]
_PROBE_SECONDS = 10.0


class ModelNotFound(OSError):
    """There is no such model on this machine, and it cannot be fetched."""


class Found(NamedTuple):
    """A local folder or GGUF file, and a line for the user where it is not what was asked for."""

    path: Path
    note: str | None = None


def resolve(name_or_path: str | Path) -> Found:
    """Finds a model's files, and downloads them from the hub if need be.

    A hub name that is complete in the local Hugging Face cache is used as it is. Otherwise the hub
    is asked, unless HF_HUB_OFFLINE is set; a hub that does not answer within ten seconds counts as
    absent. Of the models in ``bundled.BUNDLES``, a package's copy in the cache comes before the
    hub, so that runs agree. No package is downloaded here: ``fetch.fetch`` does that.

    Args:
      name_or_path: a folder, a GGUF file, or a hub name such as "owner/model".

    Returns:
      The folder or the GGUF file.

    Raises:
      ModelNotFound: says what was tried, and what to do.
    """
    found = look_up(name_or_path)
    if isinstance(found, Found):
        return found
    name = str(name_or_path)
    if bundle := BUNDLES.get(name):
        raise ModelNotFound(
            f"{name} cannot be downloaded from the hub ({found}). Fetch {bundle.what}, once, from "
            f"the package {bundle.package.requirement} ({bundle.package.size}):\n"
            f'  - in Python: lora_jax.models.fetch("{name}")\n'
            f"  - in a shell: python -m lora_jax.hf.fetch {name}\n"
            "or give the path of a folder that holds config.json, the tokenizer's files and "
            "model.safetensors"
        )
    raise not_on_hub(name, found)


def look_up(name_or_path: str | Path) -> Found | str:
    """Finds a model's files as ``resolve`` does; where there are none, returns why, in one line.

    Raises:
      ModelNotFound: for what is neither a path here nor a hub name.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return Found(path)
    name = _hub_name(name_or_path)
    if (cached := _complete(_download(name, local_only=True))) is not None:
        return Found(cached)
    bundle = BUNDLES.get(name)
    if bundle and bundle.package.cached():
        return Found(bundle.path, bundle.note)
    if problem := probe(name):
        return problem
    got = _download(name, local_only=False)
    return got if isinstance(got, str) else Found(got)


def not_on_hub(name: str, problem: str) -> ModelNotFound:
    """Returns the error for a name that only the hub could have, with what to do instead."""
    return ModelNotFound(
        f"{name} cannot be fetched from the hub ({problem}). Without it, give the path of a "
        "folder that holds config.json, the tokenizer's files and model.safetensors (or its "
        "shards and their index), or of a GGUF file."
    )


def resolve_config(name_or_path: str | Path) -> Path:
    """Finds what holds a model's configuration; of a hub name's files, fetches that one alone.

    Args:
      name_or_path: a config.json, a folder with one, a GGUF file, or a hub name.

    Returns:
      A config.json, or a GGUF file.

    Raises:
      ModelNotFound: where neither the hub nor its cache has it, nor a package.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path / "config.json" if path.is_dir() else path
    name = _hub_name(name_or_path)
    if name in BUNDLES:  # small, and perhaps a package's copy
        return resolve_config(resolve(name).path)
    return snapshot(name, ["config.json"], needed="config.json") / "config.json"


def _hub_name(name_or_path: str | Path) -> str:
    """A name of the form owner/model; ModelNotFound otherwise."""
    name = str(name_or_path)
    is_path = name.startswith((".", "/", "~")) or name.endswith((".gguf", ".json"))
    if name.count("/") != 1 or is_path:
        raise ModelNotFound(f"{name} is neither a file or folder here nor a hub name (owner/model)")
    return name


def snapshot(name: str, patterns: list[str], needed: str = "*.safetensors") -> Path:
    """The files of a hub name that match the patterns, from the local cache or from the hub.

    The cache is enough where a file that is `needed`, a pattern too, is in it.

    Raises ModelNotFound where they can be had from neither.
    """
    cached = _download(name, local_only=True, patterns=patterns)
    if isinstance(cached, Path) and any(cached.rglob(needed)):
        return cached
    problem = probe(name)
    if problem is None:
        got = _download(name, local_only=False, patterns=patterns)
        if isinstance(got, Path):
            return got
        problem = got
    raise ModelNotFound(f"{name} cannot be fetched from the hub ({problem}); give a folder instead")


def probe(name: str, seconds: float = _PROBE_SECONDS) -> str | None:
    """Whether the hub answers for this model in time.

    The question is asked in a thread of its own, since a name look-up may hang for longer than
    any timeout that HTTP knows.

    Returns:
      None if it does; else why not, in one line.
    """
    hub = _huggingface_hub()
    if hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answers: list[str | None] = []

    def ask() -> None:
        try:
            hub.HfApi().model_info(name, timeout=seconds)
            answers.append(None)
        except Exception as error:
            answers.append(_first_line(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"no answer within {seconds:g} seconds"


def _download(name: str, *, local_only: bool, patterns: list[str] | None = None) -> Path | str:
    """The snapshot's folder, or why there is none."""
    hub = _huggingface_hub()
    try:
        return Path(
            hub.snapshot_download(
                name, allow_patterns=patterns or _FILES, local_files_only=local_only
            )
        )
    except Exception as error:
        return _first_line(error)


def _complete(folder: Path | str) -> Path | None:
    """The folder, if it has a configuration and all weights: a cache may hold half a model."""
    if isinstance(folder, str) or not (folder / "config.json").exists():
        return None
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return folder if (folder / "model.safetensors").exists() else None
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return folder if all((folder / shard).exists() for shard in shards) else None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError:
        raise ImportError(
            "a hub name needs the package huggingface_hub: pip install huggingface_hub"
        ) from None
    return huggingface_hub
