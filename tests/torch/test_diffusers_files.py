"""Adapter files in the form of diffusers, beside its own loaders."""

import json

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax.lorafy import map_parts
from tests.torch.checks import distance

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import from_torch  # noqa: E402
from tests.torch import images  # noqa: E402

RULES = [
    lj.LoraRule(targets=["to_q", "to_out/0"], rank=3, alpha=7),
    lj.LoraRule(targets=["add_v_proj"], rank=5, alpha=2, scaling="alpha/sqrt(rank)"),
]
ARGUMENTS = (4, 6)


def _random(tree):
    """Returns the tree with random B."""
    keys = iter(jax.random.split(jax.random.key(2), 99))
    return map_parts(
        lambda path, name, x: 0.2 * jax.random.normal(next(keys), x.shape) if name == "b" else x,
        tree,
    )


def _run(fn, tree, module):
    arguments = images.inputs_of(module, *ARGUMENTS)
    others = {name: x for name, x in arguments.items() if not isinstance(x, np.ndarray)}
    arrays = {name: x for name, x in arguments.items() if name not in others}
    return jax.jit(lambda tree, arrays: lj.adapt(fn)(tree, **arrays, **others)[0])(tree, arrays)


def _run_in_torch(module):
    arguments = {
        name: torch.tensor(x) if isinstance(x, np.ndarray) else x
        for name, x in images.inputs_of(module, *ARGUMENTS).items()
    }
    with torch.no_grad():
        return module(**arguments)[0].numpy()


def _pipeline_of(name, module):
    """Returns a pipeline of diffusers with a module and nothing else."""
    import diffusers

    class_name = {"flux": "Flux", "sd3": "StableDiffusion3", "qwen": "QwenImage"}[name]
    pipeline_class = getattr(diffusers, f"{class_name}Pipeline")
    parts = dict.fromkeys(pipeline_class._get_signature_keys(pipeline_class)[0])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return pipeline_class(**parts | {"transformer": module, "scheduler": scheduler})


@pytest.fixture(scope="module", params=images.MODELS)
def saved(request, tmp_path_factory):
    """A model, its module, its adapted tree, and the file of the adapter."""
    module = images.MODELS[request.param]().eval()
    fn, params = from_torch(module)
    tree = _random(lj.lorafy(params, RULES))
    file = tmp_path_factory.mktemp("adapter") / "style.safetensors"
    lp.save_diffusers(file, fn, tree)
    return request.param, module, fn, params, tree, file


def test_a_pipeline_reads_our_file(saved):
    name, module, fn, _, tree, file = saved
    plain = _run_in_torch(module)
    pipeline = _pipeline_of(name, module)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    adapted = _run_in_torch(module)
    pipeline.unload_lora_weights()
    assert distance(_run(fn, tree, module), adapted) <= 1e-5
    assert np.abs(adapted - plain).max() > 1e-2


def test_our_file_is_read_back(saved):
    _, module, fn, params, tree, file = saved
    loaded = lp.load_diffusers(file, fn, params)
    assert distance(_run(fn, loaded, module), _run(fn, tree, module)) <= 1e-6


def test_without_the_header_alpha_is_the_rank(saved, tmp_path):
    """As in diffusers, whose output we have then, too."""
    name, module, fn, params, tree, file = saved
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(file), bare)
    pipeline = _pipeline_of(name, module)
    pipeline.load_lora_weights(tmp_path, weight_name=bare.name)
    expected = _run_in_torch(module)
    pipeline.unload_lora_weights()
    ours = _run(fn, lp.load_diffusers(bare, fn, params), module)
    assert distance(ours, expected) <= 1e-5
    assert np.abs(ours - _run(fn, tree, module)).max() > 1e-2


def test_keys_of_kohya_are_converted(tmp_path):
    """Joined q, k and v with alphas, as diffusers converts them."""
    module = images.flux().eval()
    fn, params = from_torch(module)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return (rng.normal(size=shape) * 0.3).astype(np.float32)

    tensors = {}
    for block in range(3):
        for stream in ("img", "txt"):
            key = f"lora_unet_double_blocks_{block}_{stream}_attn_qkv"
            tensors[f"{key}.lora_down.weight"] = normal(4, 32)
            tensors[f"{key}.lora_up.weight"] = normal(96, 4)
            tensors[f"{key}.alpha"] = np.array(2, np.float32)
    file = tmp_path / "kohya.safetensors"
    save_file(tensors, file)
    pipeline = _pipeline_of("flux", module)
    pipeline.load_lora_weights(tmp_path, weight_name=file.name)
    expected = _run_in_torch(module)
    pipeline.unload_lora_weights()
    plain = _run_in_torch(module)
    assert np.abs(expected - plain).max() > 1e-2
    assert distance(_run(fn, lp.load_diffusers(file, fn, params), module), expected) <= 1e-5


def test_what_cannot_be_read_is_refused(saved, tmp_path):
    _, _, fn, params, _, file = saved
    tensors = load_file(file)
    other = {"text_encoder.layers.0.q_proj.lora_A.weight": np.zeros((2, 4), np.float32)}
    save_file(tensors | other, tmp_path / "encoder.safetensors")
    with pytest.raises(lp.PeftError, match="belongs to a text encoder"):
        lp.load_diffusers(tmp_path / "encoder.safetensors", fn, params)
    unknown = {
        "transformer.blocks.9.to_q.lora_A.weight": np.zeros((2, 4), np.float32),
        "transformer.blocks.9.to_q.lora_B.weight": np.zeros((4, 2), np.float32),
    }
    save_file(tensors | unknown, tmp_path / "unknown.safetensors")
    with pytest.raises(
        lp.PeftError, match=r"(?s)unknown.safetensors.*unexpected transformer\.blocks\.9\.to_q"
    ):
        lp.load_diffusers(tmp_path / "unknown.safetensors", fn, params)
    linear, weights = from_torch(torch.nn.Linear(2, 2))
    save_file({"lora_unet_x.alpha": np.ones(1, np.float32)}, tmp_path / "kohya.safetensors")
    with pytest.raises(lp.PeftError, match="converted only for FluxTransformer2DModel"):
        lp.load_diffusers(tmp_path / "kohya.safetensors", linear, weights)
    with pytest.raises(lp.PeftError, match="is no safetensors file"):
        lp.load_diffusers(tmp_path / "adapter.bin", fn, params)


def test_what_cannot_be_written_is_refused(saved, tmp_path):
    _, _, fn, params, tree, file = saved
    with pytest.raises(FileExistsError, match="already exists"):
        lp.save_diffusers(file, fn, tree)
    lp.save_diffusers(file, fn, tree, overwrite=True)
    dora = lj.lorafy(params, [lj.LoraRule(targets=["to_q"], rank=2, dora=True)])
    with pytest.raises(lp.PeftError, match=r"no form for .*to_q\.lora_magnitude_vector"):
        lp.save_diffusers(tmp_path / "dora.safetensors", fn, dora)
    assert not list(tmp_path.iterdir())


def test_the_header_has_the_configuration(saved):
    with safe_open(saved[-1], framework="np") as opened:
        fields = json.loads(opened.metadata()["lora_adapter_metadata"])
        assert all(name.startswith("transformer.") for name in opened.keys())  # noqa: SIM118
    assert fields["transformer.r"] in (3, 5)
