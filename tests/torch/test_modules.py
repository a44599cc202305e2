"""Torch modules of no library and of transformers run as they are; adapters are PEFT's."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from tests.torch.checks import distance
from tests.torch.small import X, adapted, by_jax, by_torch

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import TorchModelError, from_torch  # noqa: E402


def test_modules_that_are_named_by_numbers_are_saved_for_peft(tmp_path):
    """Their last names alone would select the blocks that hold them, which PEFT refuses."""
    import peft

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            wide, narrow = torch.nn.Linear(5, 9), torch.nn.Linear(9, 5)
            block = torch.nn.Sequential(wide, torch.nn.LayerNorm(9), torch.nn.GELU(), narrow)
            self.blocks = torch.nn.ModuleList([block, copy.deepcopy(block)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    network = Network()
    fn, params = from_torch(network)
    tree = adapted(params)
    with torch.no_grad():
        plain = network(torch.tensor(X)).numpy()
    assert distance(fn(params, X), plain) <= 1e-5
    lp.save(tmp_path / "adapter", fn, tree)
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(Network(), peft.LoraConfig(target_modules=["0", "3"]))
    theirs = peft.PeftModel.from_pretrained(network, tmp_path / "adapter")
    out = lj.adapt(fn, strict=True)(tree, X)
    with torch.no_grad():
        assert distance(out, theirs(torch.tensor(X)).numpy()) <= 1e-5
    assert np.abs(out - plain).max() > 1e-2


@dataclasses.dataclass
class Settings:
    """A configuration of no library."""

    width: int = 3


@pytest.mark.parametrize("config", [{"width": 3}, Settings(), None])
def test_a_configuration_need_not_be_that_of_transformers(config):
    class Configured(torch.nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.config = config

    module = Configured()
    fn, params = from_torch(module)
    assert distance(fn(params, X), module(torch.tensor(X)).detach()) <= 1e-5
    assert fn.config.model_type == "Configured"


class Mixed(torch.nn.Module):
    """Makes tensors without naming a device, as many modules do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.table = torch.nn.Linear(5, 4), torch.nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        hidden = torch.cat([self.inner(x), torch.ones(2, 1)], 1) * torch.linspace(1, 2, 5)
        rows = self.table[torch.arange(4)[::2].flip(0)]
        order = torch.argsort(hidden[0])
        weights = torch.tensor([0.5, -1.0, 2.0, 3.0, 0.1])[order]
        copied = torch.tensor(hidden[:, 1:3], dtype=torch.float32)  # without a gradient, in torch
        shared = torch.as_tensor(hidden[:, :2])
        return (hidden * weights) @ hidden.T + copied @ copied.T + (shared @ rows) @ rows.T


def test_tensors_without_a_device_are_constants():
    (out, gradient), (want, by_own) = by_jax(Mixed()), by_torch(Mixed())
    assert distance(out, want) <= 1e-5
    assert distance(gradient, by_own) <= 1e-5


@pytest.mark.parametrize("how", ["item", "add"])
def test_what_is_written_into_a_tensor_without_a_device_is_named(how):
    class Writes(torch.nn.Linear):
        def forward(self, x):
            out = torch.zeros(2, 3)
            if how == "item":
                out[:, :2] = super().forward(x)
            else:
                out.add_(super().forward(x))
            return out

    fn, params = from_torch(Writes(5, 2 if how == "item" else 3))
    operator = "copy_" if how == "item" else "add_"
    with pytest.raises(TorchModelError, match=rf"Writes \(test_modules.py.*{operator}"):
        jax.jit(fn)(params, X)


def test_checks_of_values_do_nothing_while_a_module_runs():
    from transformers.utils import torch_compilable_check

    class Checks(torch.nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            torch_compilable_check(out.sum() > 1e9, "too small")
            return out

    module = Checks(5, 3)
    fn, params = from_torch(module)
    with torch.no_grad():
        assert (
            distance(jax.jit(fn)(params, X), torch.nn.Linear.forward(module, torch.tensor(X)))
            <= 1e-5
        )
        with pytest.raises(ValueError, match="too small"):
            module(torch.tensor(X))


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llava():
    import transformers

    images = {**SIZES, "hidden_size": 8, "image_size": 16, "patch_size": 8, "projection_dim": 8}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**images),
        text_config=transformers.LlamaConfig(**SIZES, num_key_value_heads=1, vocab_size=61),
        image_token_index=60,
    )
    ids = np.array([[1, 60, 60, 60, 60, 3, 4, 5]] * 2, np.int32)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    module = transformers.LlavaForConditionalGeneration(config)
    return module, {"input_ids": ids, "pixel_values": pixels}, ["logits"]


def sam():
    import transformers

    vision = {
        **{"hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 32, "patch_size": 8, "output_channels": 16, "num_pos_feats": 8},
        **{"global_attn_indexes": [1], "window_size": 2},
    }
    prompts = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    masks = {"hidden_size": 16, "mlp_dim": 24, "num_attention_heads": 2, "iou_head_hidden_dim": 12}
    config = transformers.SamConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks
    )
    pixels = np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)
    points = np.array([[[[5.0, 6.0]]]], np.float32)
    inputs = {"pixel_values": pixels, "input_points": points}
    return transformers.SamModel(config), inputs, ["iou_scores", "pred_masks"]


def timesfm():
    import transformers

    sizes = {**SIZES, "head_dim": 8, "patch_length": 8, "horizon_length": 8, "context_length": 32}
    config = transformers.TimesFmConfig(**sizes, quantiles=[0.1, 0.5, 0.9])
    module = transformers.TimesFmModelForPrediction(config)
    rows = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    inputs = {"past_values": list(rows), "freq": np.array([0, 1], np.int32)}
    return module, inputs, ["mean_predictions", "full_predictions"]


@pytest.mark.parametrize("make", [llava, sam, timesfm])
def test_modules_that_check_values_or_name_no_device_run(make):
    torch.manual_seed(0)
    module, inputs, names = make()
    module = module.eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        tensors = jax.tree.map(torch.tensor, inputs)
        wanted = module(**tensors)
    fn, params = from_torch(module)
    out = jax.jit(lambda params, inputs: fn(params, **inputs))(params, inputs)
    for name in names:
        assert distance(out[name], wanted[name]) <= 1e-5, name
        assert np.abs(wanted[name]).max() > 0.05, name
