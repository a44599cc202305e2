"""Exports on a stand-in for the hub: what arrives, what stays, and what is refused beforehand."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.support import assert_identical, with_random_factors
from tests.train.export.stand_in import Hub
from tests.train.tiny import write_model
from train.adapters.source import find_adapter
from train.console.errors import UserError
from train.export import hub as publishing
from train.export.__main__ import main
from train.run import pretrained

# Orbax leaves coroutines behind where a file cannot be read.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub
]
ROOT = Path(__file__).parents[3]
NAMES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folders of an adapter and its base."""
    folder = tmp_path_factory.mktemp("adapter")
    base = write_model(folder / "base")
    _, params = models.from_pretrained(base)
    tree = with_random_factors(lj.lorafy(params, [lj.LoraRule(targets=["q_proj"], rank=2)]))
    lj.save_adapter(folder / "adapter", tree, about={"model": str(base)})
    return folder / "adapter", base


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in that `huggingface_hub` asks in the place of the hub."""
    made = Hub()
    settings = {
        "ENDPOINT": made.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": made.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub cache"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "good")
    yield made
    made.close()


def export(adapter, *args):
    options = ["--adapter", adapter[0], "--base-name", "owner/base"]
    main([str(arg) for arg in [*options, *args]])


def fails(capsys, adapter, *args, base_name=("--base-name", "owner/base")):
    """Returns the one paragraph before the end with the code for bad input."""
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in ["--adapter", adapter[0], *base_name, *args]])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and said.startswith("error: --push-to-hub ")
    return said.removeprefix("error: ")


@pytest.mark.slow
def test_an_adapter_arrives_whole(hub, adapter, tmp_path, capsys):
    export(adapter, "--push-to-hub", "name", "--output", tmp_path / "out", "--private")
    assert capsys.readouterr().out.strip().endswith(f"uploaded to {hub.url}/me/name")
    repo = hub.repos["me/name"]
    assert repo["private"] and set(repo["files"]) == NAMES
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == repo["files"]
    front = ModelCard(repo["files"]["README.md"].decode()).data
    assert front.base_model == "owner/base" and front.library_name == "peft"
    for path, content in repo["files"].items():
        (tmp_path / path).write_bytes(content)
    model, params = models.from_pretrained(adapter[1])
    tree = lj.load_adapter(adapter[0], params)
    assert_identical(lp.load(tmp_path, model, params), tree)
    found = find_adapter("me/name")  # on the hub
    assert found.base() == "owner/base"
    assert_identical(found.load(model, params, "owner/base"), tree)
    with pytest.raises(UserError, match="--adapter me/nam: There is no such folder, and me/nam "):
        find_adapter("me/nam")


@pytest.mark.slow
def test_a_merged_model_arrives_without_an_output(hub, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--adapter", str(adapter[0]), "--push-to-hub", "lab/merged", "--merged"])
    repo = hub.repos["lab/merged"]
    assert not repo["private"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(repo["files"])
    assert [path for path in tmp_path.iterdir() if path.name != "hub cache"] == []


@pytest.mark.slow
def test_an_export_is_replaced_only_when_asked(hub, adapter, tmp_path, capsys):
    hub.add("me/name", **{"model-00001.safetensors": b"old", "notes.txt": b"mine"})
    said = fails(capsys, adapter, "--push-to-hub", "me/name")
    assert "The hub has me/name already. Choose another name, or replace its weights" in said
    assert "me/name is public, and --private works for new" in fails(
        capsys, adapter, "--push-to-hub", "me/name", "--overwrite", "--private"
    )
    export(adapter, "--push-to-hub", "me/name", "--overwrite")
    files = hub.repos["me/name"]["files"]
    assert set(files) == NAMES | {"notes.txt"}
    first = files["README.md"]
    export(adapter, "--push-to-hub", "me/name", "--overwrite", "--base-name", "owner/other")
    assert b"owner/other" in files["README.md"] and files["README.md"] != first
    files["README.md"] += b"My own words."
    changed = files["README.md"]
    export(adapter, "--push-to-hub", "me/name", "--overwrite")
    assert files["README.md"] == changed
    assert "me/name keeps its README.md" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "token", "words"),
    [
        ("a/b/c", "good", "Use a name such as owner/name"),
        ("me/name", None, "There is no token for the hub. Log in with `hf auth login`"),
        ("me/name", "stale", "The hub does not accept the token"),
        ("me/name", "reader", "The token has read access only. Log in"),
        (
            "other/name",
            "good",
            "The token of me cannot write to other. It can write to me, lab.",
        ),
        ("watch/name", "good", "cannot write to watch"),
    ],
)
def test_what_the_hub_would_refuse(hub, adapter, tmp_path, capsys, monkeypatch, name, token, words):
    """Before weights are read, and without a trace."""
    monkeypatch.setattr(pretrained, "from_pretrained", None)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    said = fails(capsys, adapter, "--push-to-hub", name, "--output", tmp_path / "out")
    assert said.startswith(f"--push-to-hub {name}: ") and words in said, said
    assert hub.repos == {} and not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached(hub, adapter, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "from_pretrained", None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in fails(capsys, adapter, "--push-to-hub", "name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(publishing, "_TIMEOUT_SECONDS", 5.0)
    hub.broken = ("whoami",)
    said = fails(capsys, adapter, "--push-to-hub", "name")
    assert f"The hub, {hub.url}, cannot be reached" in said and "`hf upload`" in said
    hub.close()
    said = fails(capsys, adapter, "--push-to-hub", "name")
    assert "cannot be reached" in said


def test_a_base_without_a_name_is_asked_for_first(hub, adapter, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "from_pretrained", None)
    said = fails(capsys, adapter, "--push-to-hub", "name", base_name=())
    assert "Nobody else could load the adapter" in said and "with --base-name" in said
    assert hub.asked == []


def test_an_upload_that_fails_leaves_the_export(hub, adapter, tmp_path, capsys):
    hub.broken = ("/commit/",)
    said = fails(capsys, adapter, "--push-to-hub", "name", "--output", tmp_path / "out")
    assert "The upload failed" in said and f"`hf upload me/name {tmp_path / 'out'}`" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == NAMES


@pytest.mark.slow
def test_the_command_as_it_is_typed(adapter, tmp_path):
    made = Hub()
    env = os.environ | {"HF_ENDPOINT": made.url, "HF_TOKEN": "good", "HF_HUB_DISABLE_XET": "1"}
    args = ["--adapter", adapter[0], "--base-name", "owner/base", "--push-to-hub", "lab/name"]
    command = [sys.executable, "-m", "train.export", *map(str, args)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    finally:
        made.close()
    assert done.returncode == 0, done.stderr
    assert set(made.repos["lab/name"]["files"]) == NAMES and "Traceback" not in done.stderr
