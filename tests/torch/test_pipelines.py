"""Parts of diffusers' pipelines in folders."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.hf.fields import ConfigError  # noqa: E402
from lora_jax.hf.keys import WeightsError  # noqa: E402
from lora_jax.torch import TorchModelError, from_torch  # noqa: E402
from tests.torch import images  # noqa: E402

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline with a transformer in shards, and with another part."""
    folder = tmp_path_factory.mktemp("pipeline")
    images.sd3().save_pretrained(folder / "transformer", max_shard_size="300KB")
    images.flux().save_pretrained(folder / "refiner")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline"}))
    return folder


@pytest.mark.parametrize(("part", "make"), [("transformer", "sd3"), ("refiner", "flux")])
def test_a_part_has_the_weights_of_its_module(pipeline, part, make):
    assert (pipeline / part / f"{WEIGHTS}.safetensors").exists() == (part == "refiner")
    fn, params = from_torch(pipeline, subfolder=part)
    other, expected = from_torch(images.MODELS[make]())
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert fn.built.stacks == other.built.stacks
    again, _ = from_torch(pipeline / part)
    assert again.config.model_type == fn.config.model_type


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TorchModelError, "is a pipeline of diffusers. .* refiner, transformer"),
        ({"subfolder": "vae"}, TorchModelError, "no vae/config.json. .* refiner, transformer"),
        ({"subfolder": "refiner", "auto": "AutoModel"}, TorchModelError, "auto='AutoModel' has no"),
    ],
)
def test_other_arguments_are_errors(pipeline, options, error, message):
    with pytest.raises(error, match=message) as raised:
        from_torch(pipeline, **options)
    assert "\n" not in str(raised.value)


def test_a_module_has_no_parts():
    with pytest.raises(TorchModelError, match="subfolder has no effect"):
        from_torch(images.flux(), subfolder="transformer")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{WEIGHTS}.bin", "is a pickle"),
        (f"{WEIGHTS}.fp16.safetensors", f"mv .* .*{WEIGHTS}.safetensors"),
    ],
)
def test_other_files_are_errors_of_one_line(pipeline, tmp_path, name, message):
    folder = tmp_path / "part"
    shutil.copytree(pipeline / "refiner", folder)
    (folder / f"{WEIGHTS}.safetensors").rename(folder / name)
    with pytest.raises(WeightsError, match=message) as raised:
        from_torch(folder)
    assert "\n" not in str(raised.value)


def test_an_unknown_class_is_an_error(pipeline, tmp_path):
    config = json.loads((pipeline / "refiner" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "Foo"}))
    with pytest.raises(ConfigError, match=r"diffusers .* has no class Foo"):
        from_torch(tmp_path)


def test_a_machine_without_diffusers_is_told(pipeline, monkeypatch):
    from lora_jax.torch import diffusion

    monkeypatch.setattr(diffusion.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'lora_jax[diffusion]'")):
        from_torch(pipeline, subfolder="transformer")


def test_of_a_hub_name_the_index_is_read_first(tmp_path, monkeypatch):
    index = {"_class_name": "Pipeline", "vae": ["diffusers", "V"], "encoder": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    downloads = []

    def download(name, *, local_only, patterns=None):
        if local_only:
            return "not in the cache"
        downloads.append(patterns)
        return tmp_path

    monkeypatch.setattr("lora_jax.hf.hub._download_snapshot", download)
    monkeypatch.setattr("lora_jax.hf.hub.probe_hub", lambda name: None)
    with pytest.raises(TorchModelError, match="owner/name is a pipeline .* subfolder: vae\\.$"):
        from_torch("owner/name")
    assert downloads == [["model_index.json"]]
    (tmp_path / "model_index.json").unlink()  # not a pipeline: everything is downloaded
    with pytest.raises(ConfigError):
        from_torch("owner/name")
    assert downloads[1:] == [["model_index.json"], None]  # None: all files of a model
