"""Exports of adapters of image models, as diffusers reads them."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
import lora_jax.peft as lp
from tests.support import with_random_factors
from tests.torch.checks import distance
from train.export.__main__ import main

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import from_torch  # noqa: E402
from tests.torch import images  # noqa: E402

RULE = lj.LoraRule(targets=["to_q", "to_out/0"], rank=3, alpha=7)


def _arguments(module):
    arguments = images.inputs_of(module, 4, 6)
    return {
        name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()
    }


def _run_in_torch(module):
    with torch.no_grad():
        return module(**_arguments(module))[0].numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pipeline's folder, the folder of an adapter that a loop saved, and the adapted output."""
    folder = tmp_path_factory.mktemp("images")
    module = images.flux().eval()
    module.save_pretrained(folder / "pipeline" / "transformer")
    (folder / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline"}))
    base = str(folder / "pipeline")
    fn, params = from_torch(base, subfolder="transformer")
    tree = with_random_factors(lj.lorafy(params, [RULE]))
    about = {"model": base, "subfolder": "transformer"}
    lj.save_adapter(folder / "adapter", tree, about=about)
    arguments = images.inputs_of(module, 4, 6)
    others = {name: x for name, x in arguments.items() if not isinstance(x, np.ndarray)}
    arrays = {name: x for name, x in arguments.items() if name not in others}
    run = jax.jit(lambda tree, arrays: lj.adapt(fn)(tree, **arrays, **others)[0])
    expected = np.asarray(run(tree, arrays))
    assert np.abs(expected - _run_in_torch(module)).max() > 1e-2
    return folder, fn, params, tree, expected


def _export(*options):
    main([str(option) for option in options])


def test_a_pipeline_loads_the_exported_file(trained, tmp_path):
    import diffusers

    folder, *_, expected = trained
    file = tmp_path / "style.safetensors"
    _export("--adapter", folder / "adapter", "--diffusers", file)
    module = images.flux().eval()
    pipeline_class = diffusers.FluxPipeline
    parts = dict.fromkeys(pipeline_class._get_signature_keys(pipeline_class)[0])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = pipeline_class(**parts | {"transformer": module, "scheduler": scheduler})
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    assert distance(_run_in_torch(module), expected) <= 1e-5


@pytest.mark.parametrize("shard", ["5GB", "0.1MB"])
def test_diffusers_loads_the_merged_folder(trained, tmp_path, shard):
    import diffusers

    folder, *_, expected = trained
    options = ["--adapter", folder / "adapter", "--merged", "--max-shard-size", shard]
    _export(*options, "--output", tmp_path / "merged")
    n_files = len(list((tmp_path / "merged").glob("diffusion_pytorch_model*.safetensors")))
    assert (n_files == 1) == (shard == "5GB")
    module, report = diffusers.FluxTransformer2DModel.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(report.values())
    assert distance(_run_in_torch(module.eval()), expected) <= 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--diffusers {out}.bin", "Choose a name that ends in .safetensors"),
        ("--diffusers {out}.safetensors --merged", "run the command with --merged --output"),
        ("--diffusers {out}.safetensors --for-serving", "selects vLLM's layout"),
        ("--output {out}", "is an image model of diffusers"),
        ("--merged --output {out} --quantize none", "--quantize has no effect on an image"),
        ("--diffusers {out}.safetensors --subfolder vae", "no vae/config.json"),
    ],
)
def test_a_wrong_option_is_an_error_of_one_line(trained, tmp_path, capsys, options, message):
    words = options.format(out=tmp_path / "out").split()
    with pytest.raises(SystemExit) as raised:
        _export("--adapter", trained[0] / "adapter", *words)
    assert raised.value.code == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed and "\n" not in printed
    assert not list(tmp_path.iterdir())


def test_dora_is_refused_by_name(trained, tmp_path, capsys):
    folder, _, params, *_ = trained
    rule = lj.LoraRule(targets=["to_q"], rank=2, dora=True)
    about = {"model": str(folder / "pipeline"), "subfolder": "transformer"}
    lj.save_adapter(tmp_path / "dora", lj.lorafy(params, [rule]), about=about)
    with pytest.raises(SystemExit):
        _export("--adapter", tmp_path / "dora", "--diffusers", tmp_path / "dora.safetensors")
    printed = capsys.readouterr().err.strip()
    assert "lora_magnitude_vector" in printed and "\n" not in printed


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("text_encoder.layers.0.q_proj.lora_A.weight", "belongs to a text encoder"),
        ("transformer.blocks.9.to_q.lora_A.weight", "transformer.blocks.9.to_q"),
    ],
)
def test_keys_that_do_not_fit_are_named_in_one_line(trained, tmp_path, key, message):
    _, fn, params, tree, _ = trained
    file = tmp_path / "style.safetensors"
    lp.save_diffusers(file, fn, tree)
    others = {key: np.zeros((2, 4), np.float32)}
    others[key.replace("lora_A", "lora_B")] = np.zeros((4, 2), np.float32)
    save_file(load_file(file) | others, file)
    with pytest.raises(lp.PeftError, match=message):
        lp.load_diffusers(file, fn, params)
    with pytest.raises(lp.PeftError, match="A pickle") as raised:
        lp.load_diffusers(tmp_path / "style.bin", fn, params)
    assert "\n" not in str(raised.value)
