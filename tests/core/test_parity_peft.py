"""Training with the real PEFT as the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import models
from tests.support import array

pytestmark = [
    pytest.mark.parity,
    # PEFT and transformers deprecate each other's names.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, BATCH, SEQ, LR, DECAY = 20, 3, 11, 5e-3, 0.1


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """(a folder with a tiny random Llama, the model in transformers)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    return folder, model


def batches():
    generator = np.random.default_rng(0)
    return generator.integers(0, 61, (STEPS, BATCH, SEQ))


def factor_name(path, layer, factor):
    module = path.removesuffix("/kernel").replace("model/layers/", f"model/layers/{layer}/")
    return f"base_model.model.{module.replace('/', '.')}.lora_{factor}.default.weight"


def test_losses_of_twenty_adamw_steps(tiny_llama):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    folder, targets = tiny_llama[0], ALL_LINEAR
    config = LoraConfig(r=3, lora_alpha=7, lora_dropout=0.0, target_modules=targets, bias="none")
    theirs = get_peft_model(LlamaForCausalLM.from_pretrained(folder), config)
    model, params = models.from_pretrained(folder)
    tree = lj.lorafy(params, [lj.LoraRule(targets=targets, rank=3, alpha=7)])
    adapter, base = lj.split(tree)

    named = dict(theirs.named_parameters())
    assert sum(p.numel() for p in named.values() if p.requires_grad) == lj.count_params(tree)[0]
    with torch.no_grad():
        for path, parts in adapter.items():
            for layer, a in enumerate(np.asarray(parts["a"])):
                named[factor_name(path, layer, "A")].copy_(torch.from_numpy(np.array(a)))

    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=LR, weight_decay=DECAY
    )
    expected = []
    for ids in batches():
        ids = torch.from_numpy(ids)
        loss = theirs(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())

    forward = lj.adapt(model.apply, strict=True)
    ours = optax.adamw(LR, weight_decay=DECAY)

    @jax.jit
    def step(adapter, state, ids):
        def loss_of(adapter):
            logits = forward({"params": lj.join(adapter, base)}, ids)[:, :-1]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
            return losses.mean()

        loss, grads = jax.value_and_grad(loss_of)(adapter)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = ours.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    state, losses = ours.init(adapter), []
    for ids in batches():
        adapter, state, loss = step(adapter, state, array(ids, jnp.int32))
        losses.append(float(loss))
    assert expected[0] - expected[-1] > 0.05, "it must learn something"
    np.testing.assert_allclose(losses, expected, atol=1e-4 * max(1, max(expected)), rtol=0)
    trained = {n: p.detach().numpy() for n, p in named.items() if "lora_" in n}
    for path, parts in adapter.items():
        for layer in range(2):
            a, b = np.asarray(parts["a"][layer]), np.asarray(parts["b"][layer])
            delta = a.T @ b
            reference = (
                trained[factor_name(path, layer, "B")] @ trained[factor_name(path, layer, "A")]
            ).T
            assert np.abs(delta - reference).max() <= 1e-3 * max(1, np.abs(reference).max())
