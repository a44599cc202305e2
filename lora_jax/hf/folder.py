"""Finds the weight files of a model's folder, and describes problems with such a folder."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from lora_jax.hf.fields import ConfigError, read_json_fields
from lora_jax.hf.hub import name_on_other_machines
from lora_jax.hf.keys import WeightsError

_PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_PEFT_CONFIG = "adapter_config.json"
_ADAPTER_METADATA = "lora/metadata"  # of `lora_jax.save_adapter`
_ADAPTER_OF_RUN = "adapter"  # the adapter's folder in that of a run
_VARIANT_FILE_NAME = re.compile(
    r"(model\.safetensors\.index|model)(\.[^.-]+)(\.json|\.safetensors)"
)
_LFS_POINTER_START = b"version https://git-lfs.github.com/spec/"


def describe_damage(path: Path, error: object) -> str:
    """Returns the error message for a file that cannot be parsed."""
    if path.is_dir():
        return f"{path} is a folder, but must be a file. Download or copy the file again."
    pointer_problem = describe_lfs_pointer(path)
    if pointer_problem is not None:
        return pointer_problem
    return f"{path} is damaged or cut short: {error}. Download or copy the file again."


def describe_lfs_pointer(path: Path) -> str | None:
    """Returns the message for a file that is only a git-lfs pointer; None for other files."""
    if path.is_dir():  # nothing to read
        return None
    with path.open("rb") as file:
        beginning = file.read(len(_LFS_POINTER_START))
    if beginning != _LFS_POINTER_START:
        return None
    return (
        f"{path} is only a git-lfs pointer to the file. Run `git lfs install` and `git lfs pull` "
        f"in {path.parent}, or download the file by itself."
    )


def describe_folder_without_config(folder: Path) -> str | None:
    """Returns the message for an adapter's or a GGUF folder; None for others."""
    for adapter_folder in (folder, folder / _ADAPTER_OF_RUN):
        is_peft = (adapter_folder / _PEFT_CONFIG).is_file()
        if is_peft or (adapter_folder / _ADAPTER_METADATA).is_file():
            return _describe_adapter_folder(adapter_folder, is_peft)
    gguf_files = sorted(folder.glob("*.gguf"))
    if gguf_files:
        return (
            f"The folder holds {len(gguf_files)} GGUF files. Name one of them, such as "
            f"{gguf_files[0]}."
        )
    return None


def _describe_adapter_folder(folder: Path, is_peft: bool) -> str:
    """Returns the message for an adapter's folder: how to load it over its base."""
    base = None
    try:
        if is_peft:
            fields = read_json_fields(folder / _PEFT_CONFIG, "a PEFT adapter", ConfigError)
            base = fields.get("base_model_name_or_path")
        else:
            metadata = read_json_fields(folder / _ADAPTER_METADATA, "an adapter", ConfigError)
            about = metadata.get("about")
            base = about.get("model") if isinstance(about, dict) else None
    except ConfigError:
        pass  # loading the adapter raises this error, too
    kind = "an adapter of PEFT" if is_peft else "an adapter"
    call = "peft.load(folder, model, params)" if is_peft else "load_adapter(folder, params)"
    base_phrase = f"its base, {base}," if base else "its base, which it does not state,"
    return (
        f"{folder} is {kind}, not a model. Name {base_phrase} as the model. Name the adapter with "
        f"--adapter {folder}, or with --init-adapter {folder} to continue its training. In Python, "
        f"call lora_jax.{call}."
    )


def read_weight_map(folder: Path, stem: str = "model") -> dict[str, str]:
    """Returns the file of each tensor by the index; {"": the single file} without an index.

    Args:
      folder: the folder.
      stem: the beginning of the names of the weights and of the index.

    Raises:
      WeightsError: there are no weights, or the index is damaged; says what the folder holds.
    """
    weights_file, index_file = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    index = folder / index_file
    if not index.exists():
        if not (folder / weights_file).exists():
            alternative = _describe_other_files(folder, weights_file, index_file)
            raise WeightsError(
                f"{folder} holds neither {weights_file} nor {index_file}{alternative}"
            )
        return {"": weights_file}
    file_of_tensor = _read_index(index)
    shards = sorted(set(file_of_tensor.values()))
    missing_shards = [shard for shard in shards if not (folder / shard).exists()]
    if missing_shards:
        raise WeightsError(
            f"{folder} lacks shards that {index_file} lists: {', '.join(missing_shards)}. "
            "Download or copy these files."
        )
    return file_of_tensor


def _read_index(index: Path) -> dict[str, str]:
    """Returns the file of each tensor from an index of shards.

    Raises:
      WeightsError: the index is damaged, lists a tensor twice, or names files of other folders.
    """

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Returns pairs as a dict; raises a WeightsError for duplicate names."""
        counts = Counter(name for name, _ in pairs)
        duplicates = sorted(name for name, count in counts.items() if count > 1)
        if duplicates:
            raise WeightsError(
                f"{index} lists more than once: {', '.join(duplicates)}. Download or copy the file "
                "again."
            )
        return dict(pairs)

    try:
        text = index.read_text(encoding="utf-8")
        file_of_tensor: dict[str, str] = json.loads(text, object_pairs_hook=to_dict)["weight_map"]
        misplaced_tensors = [
            tensor
            for tensor, file in file_of_tensor.items()
            if Path(file).name != file or file in ("", "..")
        ]
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{index} cannot be read: {error!r}. Download or copy the file again."
        ) from None
    if misplaced_tensors:
        raise WeightsError(
            f"{index} names no file of its folder for {', '.join(misplaced_tensors)}. Download or "
            "copy the file again."
        )
    return file_of_tensor


def _describe_other_files(folder: Path, weights_file: str, index_file: str) -> str:
    """Returns the end of a message on missing weights: other contents, and a remedy."""
    problem = describe_folder_without_config(folder)
    if problem is not None:
        return f". {problem}"
    # Weights under another name, such as model.fp16.safetensors.
    names = sorted(path.name for path in folder.glob("*.safetensors*"))
    for name in names:
        match = _VARIANT_FILE_NAME.fullmatch(name)
        common_name = match[1] + match[3] if match else None
        if common_name in (weights_file, index_file):
            command = f"mv {folder / name} {folder / common_name}"
            return f", but a variant of them, {name}. Rename it ({command})."
    if len(names) == 1:
        command = f"mv {folder / names[0]} {folder / weights_file}"
        return f", but {names[0]}. If it holds all of the weights, rename it ({command})."
    if names:
        return f", which lists the tensors of {', '.join(names)}. Copy the index, too."
    # Weights as a pickle, which transformers can convert.
    hub_name = name_on_other_machines(folder)
    pickles = [file for file in _PICKLE_FILES if (folder / file).exists()]
    if not pickles and hub_name is None:
        return ". Check the path."
    pickle_phrase = ". The hub may only have pytorch_model.bin"
    if pickles:
        pickle_phrase = f", but only {pickles[0]}"
    return (
        f"{pickle_phrase}, which is a pickle. A pickle can run any code when it is loaded, so "
        "lora_jax does not read it. Convert it with transformers on a machine that has torch: "
        f"{_conversion_command(folder, hub_name)}"
    )


def _conversion_command(folder: Path, hub_name: str | None) -> str:
    """Returns the command that converts a model to safetensors.

    Args:
      folder: the model's folder.
      hub_name: its name on the hub, if the folder lies in the hub's cache, which is left as it is.
    """
    fields = read_json_fields(folder / "config.json", "a model", ConfigError)
    architectures = fields.get("architectures") or ["AutoModelForCausalLM"]
    model_class = next(iter(architectures))
    if not str(model_class).isidentifier():
        model_class = "AutoModelForCausalLM"
    if hub_name is None:
        source = output = str(folder)
        classes = [model_class]
        next_step = ""
    else:
        source, output = hub_name, hub_name.rpartition("/")[2]
        classes = [model_class, "AutoTokenizer"]
        next_step = f", and then name the folder {output}"
    calls = [
        f"t.{name}.from_pretrained({source!r}).save_pretrained({output!r})" for name in classes
    ]
    return f'python -c "import transformers as t; {"; ".join(calls)}"{next_step}'
