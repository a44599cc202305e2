"""The files of a model's folder: its weights, and what may lie there in their place."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from lora_jax.hf.fields import ConfigError, read_file
from lora_jax.hf.hub import name_for_others
from lora_jax.hf.keys import WeightsError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_PEFT = "adapter_config.json"
_OURS = "lora/metadata"  # of `lora_jax.save_adapter`
_OF_RUN = "adapter"  # the adapter's folder in that of a run
_VARIANT = re.compile(r"(model\.safetensors\.index|model)(\.[^.-]+)(\.json|\.safetensors)")
_POINTER = b"version https://git-lfs.github.com/spec/"


def damage_message(path: Path, error: object) -> str:
    """Returns the error message for a file that its reader refuses."""
    return pointer_problem(path) or f"{path} is damaged or cut short: {error}"


def pointer_problem(path: Path) -> str | None:
    """Returns the remedy for a file that git-lfs left a pointer for; None for other files."""
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
    if start != _POINTER:
        return None
    return (
        f"{path} is a git-lfs pointer, and not the file that it stands for: run `git lfs install` "
        f"and `git lfs pull` in {path.parent}, or download the file by itself"
    )


def not_a_model(folder: Path) -> str | None:
    """Returns the kind of a folder without config.json, and its use; None if unknown."""
    for place in (folder, folder / _OF_RUN):
        is_peft = (place / _PEFT).is_file()
        if is_peft or (place / _OURS).is_file():
            return _not_an_adapter(place, is_peft)
    if files := sorted(folder.glob("*.gguf")):
        return f"the folder holds {len(files)} GGUF files: name one of them, such as {files[0]}"
    return None


def _not_an_adapter(folder: Path, is_peft: bool) -> str:
    base = None
    try:
        if is_peft:
            fields = read_file(folder / _PEFT, "a PEFT adapter", ConfigError)
            base = fields.get("base_model_name_or_path")
        else:
            about = read_file(folder / _OURS, "an adapter", ConfigError).get("about")
            base = about.get("model") if isinstance(about, dict) else None
    except ConfigError:
        pass  # whoever loads the adapter says what is wrong with it
    kind = "an adapter of PEFT" if is_peft else "an adapter"
    call = "peft.load(folder, model, params)" if is_peft else "load_adapter(folder, params)"
    over = f"its base, {base}," if base else "its base, which it does not state,"
    return (
        f"{folder} is {kind}, and no model. Name {over} as the model, and the adapter beside it: "
        f"--adapter {folder}, or --init-adapter {folder} to train on; in Python, lora_jax.{call}"
    )


def weight_map(folder: Path) -> dict[str, str]:
    """Returns the index, tensor -> file; without one, the single file under the name "".

    Raises:
      WeightsError: there are no weights, or the index is damaged; says what else there is.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            instead = _instead_of_weights(folder)
            raise WeightsError(f"{folder} holds neither {SINGLE} nor {INDEX}{instead}")
        return {"": SINGLE}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        times = Counter(name for name, _ in pairs)
        if twice := sorted(name for name, n in times.items() if n > 1):
            raise WeightsError(f"{index} lists more than once: {', '.join(twice)}")
        return dict(pairs)

    try:
        text = index.read_text(encoding="utf-8")
        listed: dict[str, str] = json.loads(text, object_pairs_hook=unique)["weight_map"]
        strange = [n for n, shard in listed.items() if Path(shard).name != shard or not shard]
    except WeightsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} cannot be read: {error!r}") from None
    if strange:
        raise WeightsError(f"{index} names no file of its folder for {', '.join(strange)}")
    shards = sorted(set(listed.values()))
    if missing := [shard for shard in shards if not (folder / shard).exists()]:
        raise WeightsError(f"{folder} lacks shards that {INDEX} lists: {', '.join(missing)}")
    return listed


def _instead_of_weights(folder: Path) -> str:
    """Returns the files in the place of weights, and the remedy; "" for nothing known."""
    if why := not_a_model(folder):
        return f": {why}"
    others = sorted(path.name for path in folder.glob("*.safetensors*"))
    for name in others:
        if (match := _VARIANT.fullmatch(name)) and match[1] + match[3] in (SINGLE, INDEX):
            to = folder / (match[1] + match[3])
            return f", but a variant of them, {name}: rename it (mv {folder / name} {to})"
    if len(others) == 1:
        only, to = folder / others[0], folder / SINGLE
        return f", but {others[0]}: if it holds all of the weights, rename it (mv {only} {to})"
    if others:
        return f", which lists the tensors of {', '.join(others)}: copy it, too"
    on_hub = name_for_others(folder)
    pickles = [file for file in _PICKLES if (folder / file).exists()]
    if not pickles and on_hub is None:
        return ""
    have = f", but {pickles[0]}" if pickles else "; if the hub has pytorch_model.bin alone"
    return (
        f"{have}: a pickle can run any code when it is loaded, and none is read here. transformers "
        f"converts it, where torch is installed: {_conversion(folder, on_hub)}"
    )


def _conversion(folder: Path, name: str | None) -> str:
    """Returns the command that writes a model again as safetensors.

    Args:
      folder: the model's folder.
      name: its name on the hub, if the folder lies in the hub's cache, which is left as it is.
    """
    fields = read_file(folder / "config.json", "a model", ConfigError)
    architecture = next(iter(fields.get("architectures") or ()), "AutoModelForCausalLM")
    kind = architecture if str(architecture).isidentifier() else "AutoModelForCausalLM"
    start, to = (folder, folder) if name is None else (name, name.rpartition("/")[2])
    kinds = [kind] if name is None else [kind, "AutoTokenizer"]
    calls = (f"t.{k}.from_pretrained({str(start)!r}).save_pretrained({str(to)!r})" for k in kinds)
    code = "; ".join(calls)
    then = "" if name is None else f", and then name the folder {to}"
    return f'python -c "import transformers as t; {code}"{then}'
