"""A torch module of no library runs as it is, and its adapters are PEFT's."""

import copy

import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from tests.torch.checks import distance
from tests.torch.small import X, adapted

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import from_torch  # noqa: E402


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
