"""Variants with the real PEFT as the judge."""

import functools

import jax
import numpy as np
import optax
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import init, models
from tests.core.test_parity_peft import ALL_LINEAR, batches, tiny_llama  # noqa: F401
from tests.support import array, assert_close, lorafied, with_random_factors

pytestmark = [
    pytest.mark.parity,
    # PEFT and transformers deprecate each other's names.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    # Said where a bias on B could not be merged.
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
]
IDS = array(batches()[0], np.int32)


def theirs(folder, **options):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ALL_LINEAR} | options)
    return get_peft_model(LlamaForCausalLM.from_pretrained(folder), config)


@functools.cache
def loaded(folder):
    return models.from_pretrained(folder)


def ours(folder, **options):
    model, params = loaded(folder)
    rule = lj.LoraRule(**{"targets": ALL_LINEAR, "rank": 3, "alpha": 7} | options)
    return model, params, lorafied(params, [rule])


def their_arrays(path, layer):
    """Each of our arrays' name in PEFT, and how it comes from theirs."""
    module = path.removesuffix("/kernel").removesuffix("/embedding")
    module = module.replace("layers/", f"layers/{layer}/").replace("/", ".")
    prefix = f"base_model.model.{module}"
    if path.endswith("embedding"):
        return {
            "a": (f"{prefix}.lora_embedding_A.default", lambda v: v),
            "b": (f"{prefix}.lora_embedding_B.default", lambda v: v.T),
        }
    return {
        "a": (f"{prefix}.lora_A.default.weight", lambda v: v),
        "b": (f"{prefix}.lora_B.default.weight", lambda v: v.T),
        "magnitude": (f"{prefix}.lora_magnitude_vector.default.weight", lambda v: v),
        "bias": (f"{prefix}.lora_B.default.bias", lambda v: v),
    }


def give(model, adapter):
    """Puts our adapter's arrays into PEFT's model."""
    import torch

    named = dict(model.named_parameters())
    with torch.no_grad():
        for path, parts in adapter.items():
            for name, array in parts.items():
                stacked = "layers" in path
                for layer, value in enumerate(np.asarray(array) if stacked else [array]):
                    there, view = their_arrays(path, layer)[name]
                    named[there].copy_(torch.from_numpy(np.array(view(np.asarray(value)))))


def take(model, adapter, read):
    """PEFT's arrays (or, by `read`, their gradients) in the shape of our adapter."""
    named = dict(model.named_parameters())

    def part(path, name, array):
        def one(layer):
            there, view = their_arrays(path, layer)[name]
            return view(read(named[there]).detach().numpy())

        if "layers" not in path:
            return one(0)
        return np.stack([one(layer) for layer in range(array.shape[0])])

    return {p: {n: part(p, n, v) for n, v in parts.items()} for p, parts in adapter.items()}


def loss_of(model, base):
    forward = lj.adapt(model.apply, strict=True)

    def loss(adapter):
        logits = forward({"params": lj.join(adapter, base)}, IDS)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, IDS[:, 1:]).mean()

    return loss


def their_loss(model):
    import torch

    ids = torch.from_numpy(np.asarray(IDS, np.int64))
    return model(input_ids=ids, labels=ids)


@pytest.mark.parametrize("variant", ["dora", "dora with bf16 factors of rank 4", "bias on B"])
def test_forward_gradients_and_merge(tiny_llama, variant):  # noqa: F811
    import torch

    folder, _ = tiny_llama
    if variant == "bias on B":
        peft, (model, _, tree) = theirs(folder, lora_bias=True), ours(folder, bias_on_b=True)
    else:
        rank = 4 if "rank 4" in variant else 3
        peft = theirs(folder, use_dora=True, r=rank)
        model, _, tree = ours(folder, dora=True, rank=rank)
        fresh = take(peft, lj.split(tree)[0], lambda p: p)
        for path, parts in lj.split(tree)[0].items():
            assert_close(parts["magnitude"], fresh[path]["magnitude"], 1e-5)
    tree = with_random_factors(tree)
    adapter, base = lj.split(tree)
    give(peft, adapter)
    output = their_loss(peft)
    output.loss.backward()
    logits = jax.jit(lj.adapt(model.apply, strict=True))({"params": tree}, IDS)
    assert_close(logits, output.logits.detach().numpy(), 1e-5)
    loss, gradients = jax.jit(jax.value_and_grad(loss_of(model, base)))(adapter)
    assert abs(float(loss) - output.loss.item()) < 1e-5
    # In fp32, theirs and ours are up to 6e-6 and 1.2e-5 from the gradients in double precision.
    assert_close(gradients, take(peft, adapter, lambda p: p.grad), 3e-5)
    if variant == "bias on B":
        return
    with torch.no_grad():
        merged = peft.merge_and_unload()
        state = {name: v.numpy() for name, v in merged.state_dict().items()}
    for name, tensor in models.hf_tensors(lj.merge(tree), models.key_table(model.config)):
        assert_close(tensor, state[name], 1e-5)


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_initialisers_that_decompose(tiny_llama, name):  # noqa: F811
    """PEFT's factors up to their signs, and logits of the base."""
    folder, plain = tiny_llama
    peft = theirs(folder, init_lora_weights=name)
    model, params, tree = ours(folder, init=getattr(init, name))
    adapter, _ = lj.split(tree)
    expected = take(peft, adapter, lambda p: p)
    for path, parts in adapter.items():
        sign = np.sign((np.asarray(parts["a"]) * expected[path]["a"]).sum(-1, keepdims=True))
        # Two decompositions in fp32, whose singular vectors agree to some 1e-5.
        assert_close(parts["a"], expected[path]["a"] * sign, 5e-5)
        assert_close(parts["b"], expected[path]["b"] * sign, 5e-5)
    forward = jax.jit(lj.adapt(model.apply, strict=True))
    logits = forward({"params": tree}, IDS)
    assert_close(logits, jax.jit(model.apply)({"params": params}, IDS), 1e-5)
    # Trained away from the start, both stand for the same weights.
    moved = with_random_factors(tree)
    give(peft, {p: {n: v for n, v in parts.items()} for p, parts in lj.split(moved)[0].items()})
    for path, parts in lj.split(moved)[0].items():
        assert parts["a"].shape == adapter[path]["a"].shape
    logits = forward({"params": moved}, IDS)
    # (The starts that the two take out of W differ by the rounding of their decompositions.)
    assert_close(logits, their_loss(peft).logits.detach().numpy(), 1e-4)


def test_orthogonal_is_built_as_theirs(tiny_llama):  # noqa: F811
    """Random, so compared by what holds of both: AB = 0, and rows of one orthogonal matrix."""
    folder, _ = tiny_llama
    peft = theirs(folder, init_lora_weights="orthogonal", r=4)
    _, _, tree = ours(folder, init=init.orthogonal, rank=4)
    adapter, _ = lj.split(tree)
    for parts in (adapter, take(peft, adapter, lambda p: p)):
        for path, part in parts.items():
            a, b = (np.asarray(part[name], np.float64) for name in ("a", "b"))
            assert np.abs(np.einsum("lri,lro->lio", a, b)).max() < 1e-6
            assert np.linalg.matrix_rank(a[0], 1e-4) == np.linalg.matrix_rank(b[0], 1e-4) == 2, path
            assert 0.05 < a.std() < 0.12


def step_of(optimizer, adapter, gradients):
    @jax.jit
    def step(adapter, gradients):
        updates, _ = optimizer.update(gradients, optimizer.init(adapter), adapter)
        return optax.apply_updates(adapter, updates)

    with jax.numpy_dtype_promotion("standard"):
        return jax.device_get(step(adapter, gradients))


def test_one_step_of_lora_plus(tiny_llama):  # noqa: F811
    import torch
    from peft.optimizers import create_loraplus_optimizer

    folder, _ = tiny_llama
    targets = [*ALL_LINEAR, "embed_tokens"]
    peft = theirs(folder, target_modules=targets)
    model, _, tree = ours(folder, targets=targets)
    adapter, base = lj.split(with_random_factors(tree))
    give(peft, adapter)
    their_loss(peft).loss.backward()
    lr, decay = 5e-3, 0.1
    create_loraplus_optimizer(
        peft, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=7.0, loraplus_weight_decay=decay
    ).step()
    gradients = jax.jit(jax.grad(loss_of(model, base)))(adapter)
    plus = lj.optim.lora_plus(7.0, embedding=1e-6 / lr)
    stepped = step_of(optax.chain(optax.adamw(lr, weight_decay=decay), plus), adapter, gradients)
    expected = take(peft, adapter, lambda p: p)
    assert_close(stepped, expected, 1e-6)
    moved = jax.tree.map(lambda new, old: np.abs(new - np.asarray(old)).max(), stepped, adapter)
    assert min(jax.tree.leaves(moved)) > 5e-7


def test_one_step_of_lora_fa(tiny_llama, monkeypatch):  # noqa: F811
    from peft.optimizers import create_lorafa_optimizer, lorafa

    # Where it can, PEFT multiplies in bfloat16: three digits, which is not what is compared here.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    folder, _ = tiny_llama
    peft = theirs(folder)
    model, _, tree = ours(folder, freeze_a=True)
    tree = with_random_factors(tree)
    adapter, base = lj.split(tree)
    give(peft, {p: {"a": base_a(tree, p), **parts} for p, parts in adapter.items()})
    lr, decay, beta2 = 5e-3, 0.1, 0.999
    optimizer = create_lorafa_optimizer(peft, r=3, lora_alpha=7, lr=lr, weight_decay=decay)
    their_loss(peft).loss.backward()
    optimizer.step()
    gradients = jax.jit(jax.grad(loss_of(model, base)))(adapter)
    # Theirs adds epsilon before the correction of the bias, and decays after the step.
    adam = optax.adam(lr, b2=beta2, eps=1e-6 / np.sqrt(1 - beta2))
    stepped = step_of(optax.chain(lj.optim.project_b(tree), adam), adapter, gradients)
    stepped = jax.tree.map(lambda v: v * (1 - lr * decay), stepped)
    assert_close(stepped, take(peft, adapter, lambda p: p), 5e-6)  # Adam divides by small gradients
    plain = step_of(adam, adapter, gradients)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain, stepped)
    assert max(jax.tree.leaves(difference)) > 1e-4, "the projection must be seen"


def base_a(tree, path):
    node = tree
    for name in path.split("/"):
        node = node[name]
    return node.a


# Whether B starts at zero, and what rules cannot do.
INITIALISERS = {True: True, None: True, False: False, "gaussian": True, "orthogonal": False}


@pytest.mark.parametrize("name", INITIALISERS)
def test_rules_draw_as_peft_does(tiny_llama, name):  # noqa: F811
    """Random, so compared by the spread of each factor."""
    folder, _ = tiny_llama
    theirs_ = theirs(folder, init_lora_weights=True if name is None else name, r=4)
    model, params = loaded(folder)
    fields = theirs_.peft_config["default"].to_dict() | {"init_lora_weights": name}
    adapter, _ = lj.split(lorafied(params, lp.rules(fields, model)))
    for path, expected in take(theirs_, adapter, lambda p: p).items():
        ours_ = adapter[path]
        assert bool(np.any(ours_["b"])) != INITIALISERS[name], path
        for factor in ("a", "b"):
            spread = np.std(expected[factor])
            assert 0.5 * spread <= np.std(ours_[factor]) <= 1.5 * spread, (path, factor)


@pytest.mark.parametrize("name", ["eva", "lora_ga", "mica"])
def test_rules_refuse_initialisers_that_they_cannot_draw(name):
    config = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": name}
    with pytest.raises(lp.PeftError, match=f"'{name}', PEFT .*lora_jax.peft.load"):
        lp.rules(config)


def test_b_stays_frozen_in_a_loaded_mica(tiny_llama, tmp_path):  # noqa: F811
    folder, _ = tiny_llama
    peft = theirs(folder, init_lora_weights="mica")
    peft.save_pretrained(tmp_path)
    model, params = loaded(folder)
    tree = lp.load(tmp_path, model, params)
    adapter, _ = lj.split(tree)
    assert {name for parts in adapter.values() for name in parts} == {"a"}
    trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    assert sum(parts["a"].size for parts in adapter.values()) == trained
    logits = jax.jit(lj.adapt(model.apply, strict=True))({"params": tree}, IDS)
    assert_close(logits, their_loss(peft).logits.detach().numpy(), 1e-5)
