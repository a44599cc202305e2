"""Layers of torch modules: what is one scan, what is recomputed, and what is no stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from tests.torch.checks import VOCAB, distance, random_model
from tests.torch.small import IDS, adapted, loss_of

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import from_torch  # noqa: E402


def test_a_scan_and_recomputed_layers_change_no_gradient(llama, tmp_path):
    folder, _ = llama
    fn, params = from_torch(folder)
    scanned = adapted(params)
    lp.save(tmp_path / "adapter", fn, scanned)
    apart, params = from_torch(folder, scan=False)
    trees = {True: scanned, False: lp.load(tmp_path / "adapter", apart, params)}
    results = []
    for scan, remat in ((s, r) for s in (True, False) for r in (False, True, "offload")):
        step, adapter = loss_of((fn if scan else apart).clone(remat=remat), trees[scan])
        text = str(jax.make_jaxpr(step)(adapter))
        assert ("scan" in text) == scan
        assert ("remat" in text or "checkpoint" in text) == bool(remat)
        # Outside of a scan, XLA would merge what is computed again with the forward pass.
        assert ("prevent_cse=True" in text) == (not scan and bool(remat))
        # Each layer's input goes to the host.
        assert text.count("Host") == (remat == "offload") * (1 if scan else 4)
        if remat != "offload":
            loss, gradients = step(adapter)
            squares = sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(gradients))
            results.append((float(loss), squares))
    np.testing.assert_allclose(results, [results[0]] * 4, rtol=1e-5)
    assert results[0][1] > 1e-3


def test_our_own_llama_has_the_same_tree_and_the_same_logits(llama):
    folder, module = llama
    fn, params = from_torch(folder)
    model, own = models.from_pretrained(folder)
    for other in (own, from_torch(module)[1]):
        jax.tree.map(np.testing.assert_array_equal, params, other)
    assert next(module.parameters()).device.type == "cpu"
    tree = adapted(own)
    logits = jax.jit(lj.adapt(lambda p: model.apply({"params": p}, IDS)))(tree)
    assert distance(jax.jit(lj.adapt(fn))(tree, IDS), logits) <= 1e-5
    assert distance(jax.jit(fn)(lj.strip(tree), IDS), logits) > 1e-2


def test_roles_are_read_from_the_program(llama):
    fn, params = from_torch(llama[0])
    rule = lj.LoraRule(targets="all-linear", rank=2)
    named, traced = (lj.lorafy(params, [rule], **how) for how in ({}, {"trace": (fn, params, IDS)}))
    assert jax.tree.structure(named) == jax.tree.structure(traced)


@pytest.mark.parametrize("how", ["in turn", "constants", "side by side"])
def test_modules_of_a_list_that_are_no_stack(how):
    """A plain tensor of a layer is no parameter, and one scan has it once; nor does a scan run
    modules that all take the same input.
    """

    differs = how == "constants"

    class Layer(torch.nn.Module):
        def __init__(self, i):
            super().__init__()
            self.dense, self.gain = torch.nn.Linear(6, 6), torch.full((6,), 1 + i * differs)

        def forward(self, hidden):
            return hidden + self.dense(hidden) * self.gain

    class LlamaForCausalLM(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = torch.nn.Embedding(VOCAB, 6), torch.nn.Linear(6, VOCAB)
            self.layers = torch.nn.ModuleList(Layer(i) for i in range(3))

        def forward(self, input_ids, use_cache=False):
            first = hidden = self.table(input_ids)
            for layer in self.layers:
                hidden = hidden + layer(first) if how == "side by side" else layer(hidden)
            return (self.head(hidden),)

    module = LlamaForCausalLM()
    fn, params = from_torch(module)
    assert len(fn.built.stacks) == (how == "in turn")
    with torch.no_grad():
        assert distance(fn(params, IDS), module(torch.tensor(IDS))[0].numpy()) <= 1e-5


def test_experts_of_a_module_and_the_layer_before_its_stack():
    module = random_model("deepseek_v3")
    fn, params = from_torch(module, remat=True)
    (stack,) = fn.built.stacks
    assert (stack.start, stack.repeats) == (1, 3)
    with torch.no_grad():
        want = module(torch.tensor(IDS, dtype=torch.long), use_cache=False).logits.numpy()
    assert distance(jax.jit(fn)(params, IDS), want) <= 1e-4
    gradient = jax.make_jaxpr(jax.grad(lambda p: fn(p, IDS).sum()))(params)
    assert str(gradient).count("prevent_cse=True") == 1  # that layer, computed again
