"""Finds a model's files by name or path: locally, on the hub, in its cache or in a package."""

import json
import re
import threading
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

from lora_jax.buckets.copies import path_to_read
from lora_jax.buckets.store import BucketError, bucket_path
from lora_jax.folders import remote_problem
from lora_jax.hf.packaged import BUNDLES

_MODEL_FILE_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "merges.txt", "vocab.*"]
_BUCKET_FILE_PATTERNS = [*_MODEL_FILE_PATTERNS, "*.gguf"]
_PROBE_SECONDS = 10.0


class ModelNotFound(OSError):
    """A model is not on this machine, and the hub cannot provide it."""


class LocalModel(NamedTuple):
    """A local folder or GGUF file, with a note to the user if it replaces the requested files."""

    path: Path
    note: str | None = None


def find_model(name_or_path: str | Path) -> LocalModel:
    """Finds a model's files, and downloads them from the hub if needed.

    A hub name that is complete in the local Hugging Face cache is used as it is. Otherwise the hub
    is asked, unless HF_HUB_OFFLINE is set; a hub that does not answer within ten seconds counts as
    absent. For the models in ``packaged.BUNDLES``, a package's copy in the cache comes before the
    hub, so that runs agree. No package is downloaded here: ``fetch.fetch`` does that.

    Args:
      name_or_path: a folder, a GGUF file, or a hub name such as "owner/model". Of a folder with
        one GGUF file and no safetensors, that file is the model. A folder or a file in a bucket
        (gs://) is copied to the cache first.

    Returns:
      The folder or the GGUF file.

    Raises:
      ModelNotFound: says what was tried, and what to do.
    """
    model_or_problem = look_up_model(name_or_path)
    if isinstance(model_or_problem, LocalModel):
        return model_or_problem
    problem = model_or_problem
    name = str(name_or_path)
    bundle = BUNDLES.get(name)
    if bundle is None:
        raise hub_error(name, problem)
    package = bundle.package
    raise ModelNotFound(
        f"{name} cannot be downloaded from the hub ({problem}). Fetch {bundle.what} once from the "
        f"package {package.requirement} ({package.size}):\n"
        f'  - in Python: lora_jax.models.fetch("{name}")\n'
        f"  - in a shell: python -m lora_jax.hf.fetch {name}\n"
        "Or give the path of a folder that holds config.json, the tokenizer's files and "
        "model.safetensors."
    )


def snapshot_revision(path: Path) -> str | None:
    """Returns the commit of a snapshot in the Hugging Face cache; None for other paths."""
    return path.name if path.parent.name == "snapshots" else None


def name_on_other_machines(name_or_path: str | Path) -> str | None:
    """Returns a model's name that works on other machines; None for a local path.

    Args:
      name_or_path: a hub name, a snapshot in the Hugging Face cache, or another path.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists():
        return str(name_or_path)
    if snapshot_revision(path) is None:
        return None
    cache_entry = path.parent.parent.name  # models--owner--name
    owner, _, name = cache_entry.removeprefix("models--").partition("--")
    return f"{owner}/{name}" if name else None


def look_up_model(name_or_path: str | Path) -> LocalModel | str:
    """Finds a model's files as ``find_model`` does, or returns the reason why there are none.

    Args:
      name_or_path: a folder, a GGUF file, or a hub name.

    Returns:
      The folder or the GGUF file; else one line that says why the hub cannot give it.

    Raises:
      ModelNotFound: if the name is neither a path here nor a hub name.
    """
    path = _local_path(name_or_path)
    if path.exists():
        gguf_file = _single_gguf_file(path)
        if gguf_file is None:
            return LocalModel(path)
        return LocalModel(gguf_file, f"Reading {gguf_file.name} in {path}")
    # A complete snapshot in the cache comes first, then a package's copy, then the hub.
    name = check_hub_name(name_or_path)
    cached_snapshot = _download_snapshot(name, local_only=True)
    if isinstance(cached_snapshot, Path) and _has_all_weights(cached_snapshot):
        return LocalModel(cached_snapshot)
    bundle = BUNDLES.get(name)
    if bundle is not None and bundle.package.cached():
        return LocalModel(bundle.path, bundle.note)
    snapshot_or_problem = probe_hub(name) or _download_snapshot(name, local_only=False)
    if isinstance(snapshot_or_problem, str):
        return snapshot_or_problem
    return LocalModel(snapshot_or_problem)


def stand_in(name_or_path: str | Path) -> str | None:
    """Describes the package's weights that replace the hub's; None if none do.

    Args:
      name_or_path: a model whose files are on this machine.

    >>> from lora_jax import models
    >>> models.stand_in("owner/model") is None  # no package has it
    True
    """
    bundle = BUNDLES.get(str(name_or_path))
    if bundle is None or find_model(name_or_path).path != bundle.path:
        return None
    return bundle.what


def hub_error(name: str, problem: str) -> ModelNotFound:
    """Returns the error for a model that the hub cannot provide, with the alternatives."""
    return ModelNotFound(
        f"{name} cannot be fetched from the hub ({problem}). Give the path of a "
        "folder that holds config.json, the tokenizer's files and model.safetensors (or its "
        "shards and their index), or of a GGUF file."
    )


def find_config(name_or_path: str | Path) -> Path:
    """Finds a model's configuration; downloads only that file from the hub.

    Args:
      name_or_path: a config.json, a folder with one, a GGUF file, or a hub name.

    Returns:
      A config.json, or a GGUF file.

    Raises:
      ModelNotFound: if neither the hub nor its cache has it, nor a package's copy.
    """
    path = _local_path(name_or_path, ["config.json"])
    is_bucket_folder = bucket_path(name_or_path) is not None and path.is_dir()
    if is_bucket_folder and not (path / "config.json").is_file():
        path = _local_path(name_or_path)  # which may hold a GGUF file
    if path.exists():
        gguf_file = _single_gguf_file(path)
        if gguf_file is not None:
            return gguf_file
        return path / "config.json" if path.is_dir() else path
    name = check_hub_name(name_or_path)
    if name in BUNDLES:  # a small model, perhaps in a package's copy
        return find_config(find_model(name).path)
    return find_snapshot(name, ["config.json"], needed="config.json") / "config.json"


def _local_path(name_or_path: str | Path, patterns: list[str] = _BUCKET_FILE_PATTERNS) -> Path:
    """Returns the local path for a path or a bucket's address, whose needed files are copied.

    Raises:
      ModelNotFound: the bucket cannot be read, or the path has another scheme.
    """
    if bucket_path(name_or_path):

        def is_needed(file: str) -> bool:
            return any(fnmatch(file, pattern) for pattern in patterns)

        try:
            return path_to_read(name_or_path, is_needed)
        except BucketError as error:
            raise ModelNotFound(str(error)) from error
    problem = remote_problem(name_or_path)
    if problem:
        raise ModelNotFound(f"{name_or_path} {problem}")
    return Path(name_or_path).expanduser()


def _single_gguf_file(folder: Path) -> Path | None:
    """Returns the only GGUF file (or its first part) of a folder without safetensors, or None."""
    files = sorted(folder.glob("*.gguf"))
    model_names = {re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"\1", file.name) for file in files}
    has_safetensors = any(folder.glob("*.safetensors*"))
    return files[0] if len(model_names) == 1 and not has_safetensors else None


def check_hub_name(name_or_path: str | Path) -> str:
    """Returns a name of the form owner/model; raises ModelNotFound for others."""
    name = str(name_or_path)
    is_path = name.startswith((".", "/", "~")) or name.endswith((".gguf", ".json"))
    if name.count("/") != 1 or is_path:
        raise ModelNotFound(
            f"{name} is neither a file or folder on this machine nor a hub name (owner/model). "
            "Check the name or the path."
        )
    return name


def find_snapshot(name: str, patterns: list[str], needed: str = "*.safetensors") -> Path:
    """Finds files of a hub name in the local cache or on the hub, by patterns.

    Args:
      name: a hub name.
      patterns: glob patterns of the files to download.
      needed: the pattern of a file without which the cache does not count.

    Returns:
      The snapshot's folder.

    Raises:
      ModelNotFound: if neither has them.
    """
    cached_snapshot = _download_snapshot(name, local_only=True, patterns=patterns)
    if isinstance(cached_snapshot, Path) and any(cached_snapshot.rglob(needed)):
        return cached_snapshot
    snapshot_or_problem = probe_hub(name) or _download_snapshot(
        name, local_only=False, patterns=patterns
    )
    if isinstance(snapshot_or_problem, Path):
        return snapshot_or_problem
    raise ModelNotFound(
        f"{name} cannot be fetched from the hub ({snapshot_or_problem}). Give the path of a local "
        "folder instead."
    )


def find_file_first(name_or_path: str | Path, file: str) -> Path | None:
    """Downloads one file of a hub name, before others are downloaded.

    Args:
      name_or_path: a folder, a GGUF file, or a hub name.
      file: the name of the file.

    Returns:
      The file; None for a path, for a model whose files are here, and if the hub has no such file.
    """
    if _local_path(name_or_path).exists() or str(name_or_path) in BUNDLES:
        return None
    try:
        name = check_hub_name(name_or_path)
        cached_snapshot = _download_snapshot(name, local_only=True)
        if isinstance(cached_snapshot, Path) and _has_all_weights(cached_snapshot):
            return None
        path = find_snapshot(name, [file], needed=file) / file
    except ModelNotFound:  # `find_model` says what was tried
        return None
    return path if path.is_file() else None


def probe_hub(
    name: str, seconds: float = _PROBE_SECONDS, kind: Literal["model", "dataset"] = "model"
) -> str | None:
    """Asks the hub whether a model or a dataset can be downloaded.

    It asks in a separate thread, because a DNS look-up may take longer than any HTTP timeout.

    Args:
      name: a hub name.
      seconds: the time limit.
      kind: what the name is of.

    Returns:
      None if the hub answers in time; else the reason, in one line.
    """
    hub = _import_huggingface_hub()
    if hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    problems: list[str | None] = []  # of the one request; None if there was an answer

    def ask_hub() -> None:
        """Asks the hub, and appends the error or None."""
        try:
            request_info = getattr(hub.HfApi(), f"{kind}_info")
            request_info(name, timeout=seconds)
            problems.append(None)
        except Exception as error:
            problems.append(_first_line_of_error(error))

    thread = threading.Thread(target=ask_hub, daemon=True)
    thread.start()
    thread.join(seconds)
    return problems[0] if problems else f"no answer within {seconds:g} seconds"


def _download_snapshot(
    name: str, *, local_only: bool, patterns: list[str] | None = None
) -> Path | str:
    """Returns the snapshot's folder, or the reason why the download failed."""
    hub = _import_huggingface_hub()
    try:
        files = patterns or _MODEL_FILE_PATTERNS
        return Path(hub.snapshot_download(name, allow_patterns=files, local_files_only=local_only))
    except Exception as error:
        return _first_line_of_error(error)


def _has_all_weights(folder: Path) -> bool:
    """Returns True if a folder has its configuration and all weights."""
    if not (folder / "config.json").exists():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return (folder / "model.safetensors").exists()
    shard_of_tensor = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return all((folder / shard).exists() for shard in set(shard_of_tensor.values()))


def _first_line_of_error(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _import_huggingface_hub() -> ModuleType:
    """Returns the module huggingface_hub; an ImportError says how to install it."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError:
        raise ImportError(
            "A hub name needs the package huggingface_hub. Run pip install 'lora_jax[models]'."
        ) from None
    return huggingface_hub
