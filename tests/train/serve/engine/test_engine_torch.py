"""The engine's losses, gradients and updates against PEFT's model on torch.

Weights are in single precision, and torch computes with them in double.
"""

import copy
import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import models
from tests.parity import PARITY
from tests.train.serve.engine.engines import made_engine, running, submitted, tell
from train.serve.engine.base import ServedBase
from train.serve.protocol.requests import (
    AdapterSpec,
    Create,
    Datum,
    Gradient,
    Load,
    Save,
    Update,
)

pytestmark = PARITY
VOCAB = 61
WHOLE = AdapterSpec(rank=3, alpha=7.0)
SPECS = {
    "whole": WHOLE,
    "attention": dataclasses.replace(WHOLE, mlp=False, unembed=False),
    "mlp": dataclasses.replace(WHOLE, attention=False, unembed=False),
    "unembed": dataclasses.replace(WHOLE, attention=False, mlp=False),
}
AS_GRADIENT = Update(learning_rate=1e23, eps=1e20)  # the step is 1000 times the gradient
LIMIT = 1e-5


class World:
    """One base, in an engine and on torch."""

    def __init__(self, folder, tied):
        import torch
        import transformers

        torch.manual_seed(5)
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            initializer_range=0.1,
        )
        self.base = transformers.LlamaForCausalLM(config)
        self.base.save_pretrained(folder / "base")
        self.folder, self.saves = folder, 0
        model, params = models.from_pretrained(folder / "base")
        self.engine = made_engine(ServedBase(model, params, str(folder / "base"), 5), chunk=48)

    def tell(self, command):
        return tell(self.engine, "tenant", command)

    def saved(self):
        """The folder of the adapter as it is now."""
        self.saves += 1
        path = self.folder / f"{self.saves}"
        self.tell(Save(path))
        return path

    def random_adapter(self, spec):
        """Gives the tenant an adapter with random A and B; returns its folder."""
        self.tell(Create(spec))
        path = self.saved()
        rng = np.random.default_rng(8)
        file = path / "adapter_model.safetensors"
        arrays = load_file(file)
        for name in sorted(arrays):
            drawn = rng.normal(size=arrays[name].shape) * 0.1
            arrays[name] = drawn.astype(np.float32)
        save_file(arrays, file)
        self.tell(Load(path, optimizer=False))
        return path

    def on_torch(self, path):
        """PEFT's model with an adapter, in double precision, and its factors by their names."""
        import peft

        base = copy.deepcopy(self.base)
        model = peft.PeftModel.from_pretrained(base, path, is_trainable=True)
        model = model.double().eval()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return model, {name.replace(".default", ""): p for name, p in trained.items()}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def world(request, tmp_path_factory):
    made = World(tmp_path_factory.mktemp("world"), request.param)
    with running(made.engine):
        yield made


def logps_of(model, datum):
    """The log-probabilities of a datum's targets, [n] or [n, k], by torch."""
    import torch

    logits = model(input_ids=torch.tensor(datum.tokens)[None].long()).logits[0]
    targets = torch.tensor(datum.inputs["target_tokens"]).long()
    wide = targets if targets.ndim == 2 else targets[:, None]
    found = torch.log_softmax(logits, -1).gather(1, wide)
    return found if targets.ndim == 2 else found[:, 0]


def torch_loss(loss, p, datum, config):
    """A datum's loss as Tinker's documentation has it."""
    import torch

    given = {
        name: torch.tensor(x).double()
        for name, x in datum.inputs.items()
        if name != "target_tokens"
    }
    if loss == "cross_entropy":
        return -(given["weights"] * p).sum()
    q, advantages = given["logprobs"], given["advantages"]
    low = given.get("clip_low_threshold", config.get("clip_low_threshold", 0.8))
    high = given.get("clip_high_threshold", config.get("clip_high_threshold", 1.2))
    low, high = (torch.as_tensor(x, dtype=torch.float64) for x in (low, high))

    def clipped(ratio):
        return torch.minimum(torch.maximum(ratio, low), high)

    ratio = torch.exp(p - q)
    if loss == "importance_sampling":
        return -(ratio * advantages).sum()
    if loss == "ppo":
        return -torch.minimum(ratio * advantages, clipped(ratio) * advantages).sum()
    if loss == "cispo":
        return -(clipped(ratio).detach() * p * advantages).sum()
    if loss == "dro":
        return -(p * advantages - config["beta"] / 2 * (p - q) ** 2).sum()
    assert loss == "gspo"
    used = given["sequence_ratio_mask"] != 0
    of_sequence = (p.detach() - q)[used].mean()
    ratio = torch.exp(of_sequence + p - p.detach())
    return -torch.minimum(ratio * advantages, clipped(ratio) * advantages).sum()


def data_for(loss, model, *, k=None, bounds=False, seed=1):
    """Sequences of several lengths whose ratios lie on both sides of the clip's bounds."""
    import torch

    rng = np.random.default_rng(seed)
    data = []
    for i, n in enumerate((7, 64, 31, 2, 50)):
        shape = (n,) if k is None else (n, k)
        targets = rng.integers(0, VOCAB, shape).astype(np.int32)
        datum = Datum(rng.integers(0, VOCAB, n).astype(np.int32), {"target_tokens": targets})
        if loss == "cross_entropy":
            more = {"weights": rng.normal(size=shape) * 0.7}
        else:
            with torch.no_grad():
                p = logps_of(model, datum).numpy()
            q = p + rng.normal(size=shape) * 0.3 + (-0.4, 0.0, 0.4)[i % 3]
            more = {"logprobs": q, "advantages": rng.normal(size=shape)}
        if loss == "gspo":
            more["sequence_ratio_mask"] = rng.integers(0, 3, shape) * 0.5
            more["sequence_ratio_mask"][0] = 1
        if bounds:
            more["clip_low_threshold"] = rng.uniform(0.5, 0.9, shape)
            more["clip_high_threshold"] = rng.uniform(1.1, 1.5, shape)
        inputs = {name: x.astype(np.float32) for name, x in more.items()}
        data.append(dataclasses.replace(datum, inputs=dict(datum.inputs) | inputs))
    return data


def apart(found, expected):
    """The largest difference, as a part of the largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check_gradient(world, path, loss, data, config, record_property):
    """Compares the loss, log-probabilities and gradient of all factors."""
    model, factors = world.on_torch(path)
    logps = [logps_of(model, datum) for datum in data]
    total = sum(torch_loss(loss, p, datum, config) for p, datum in zip(logps, data, strict=True))
    total.backward()
    outputs = world.tell(Gradient(data, loss, config))
    world.tell(AS_GRADIENT)
    before, after = (load_file(x / "adapter_model.safetensors") for x in (path, world.saved()))
    assert set(before) == set(factors), "the file's names are PEFT's"
    off = {
        name: apart((before[name] - after[name]) / 1000, factor.grad.numpy())
        for name, factor in factors.items()
    }
    assert all(factor.grad.abs().max() > 1e-3 for factor in factors.values())
    pairs = zip(outputs.logprobs, logps, strict=True)
    off["logprobs"] = max(apart(one, other.detach().numpy()) for one, other in pairs)
    total = float(total.detach())
    off["loss"] = abs(outputs.metrics["loss:sum"] - total) / abs(total)
    worst = max(off, key=off.get)
    record_property("largest deviation", off[worst])
    print(f"{loss}: {off[worst]:.1e} at {worst}")
    assert off[worst] < LIMIT, (worst, off[worst])


@pytest.mark.parametrize(
    ("loss", "options", "config"),
    [
        ("cross_entropy", {}, {}),
        ("cross_entropy", {"k": 3}, {}),
        ("importance_sampling", {}, {}),
        ("importance_sampling", {"k": 2}, {}),
        ("ppo", {}, {}),
        ("ppo", {"bounds": True}, {}),
        ("cispo", {}, {"clip_low_threshold": 0.7, "clip_high_threshold": 1.1}),
        ("cispo", {"bounds": True}, {}),
        ("dro", {}, {"beta": 0.3}),
        ("gspo", {}, {"clip_low_threshold": 0.9, "clip_high_threshold": 1.3}),
        ("gspo", {"bounds": True}, {}),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(f"{k}={v}" for k, v in x.items()) or "-",
)
def test_losses_and_gradients(world, loss, options, config, record_property):
    path = world.random_adapter(WHOLE)
    data = data_for(loss, world.on_torch(path)[0], **options)
    check_gradient(world, path, loss, data, config, record_property)


@pytest.mark.parametrize("part", ["attention", "mlp", "unembed"])
def test_adapters_of_parts(world, part, record_property):
    path = world.random_adapter(SPECS[part])
    data = data_for("cross_entropy", None)
    check_gradient(world, path, "cross_entropy", data, {}, record_property)


def test_a_new_adapter_is_the_base_and_random_in_a(world):
    import torch

    world.tell(Create(WHOLE))
    model, factors = world.on_torch(world.saved())
    for name, factor in factors.items():
        bound = factor.shape[1] ** -0.5
        most = factor.abs().max()
        assert most == 0 if "lora_B" in name else 0.8 * bound < most <= bound, name
    (datum,) = data_for("cross_entropy", None)[1:2]
    with model.disable_adapter(), torch.no_grad():
        plain = logps_of(model, datum).numpy()
    found = world.tell(Gradient([datum], "cross_entropy", forward_only=True)).logprobs[0]
    assert apart(found, plain) < LIMIT


@pytest.mark.parametrize(
    ("rate", "eps", "clip"),
    [(1e-2, 0.1, 0.0), (1e-2, 3e-3, 0.5), (5e-4, 1e-8, 0.0)],
    ids=["plain", "clipped", "small eps"],  # by that, rounding of small gradients weighs a lot
)
def test_three_steps_of_adamw(world, rate, eps, clip, record_property):
    import torch

    path = world.random_adapter(WHOLE)
    model, factors = world.on_torch(path)
    optimizer = torch.optim.AdamW(factors.values())
    steps = [
        Update(rate, 0.9, 0.95, eps, 0.1, clip),
        Update(3 * rate, 0.8, 0.999, eps / 3, 0.0, clip),
        Update(2 * rate, 0.9, 0.99, eps * 3, 0.3, clip / 2),
    ]
    for number, how in enumerate(steps):
        data = data_for("cross_entropy", None, seed=number)
        optimizer.param_groups[0].update(
            lr=how.learning_rate,
            betas=(how.beta1, how.beta2),
            eps=how.eps,
            weight_decay=how.weight_decay,
        )
        optimizer.zero_grad()
        sum(torch_loss("cross_entropy", logps_of(model, x), x, {}) for x in data).backward()
        norm = torch.nn.utils.clip_grad_norm_(factors.values(), how.grad_clip_norm or 1e30)
        optimizer.step()
        world.tell(Gradient(data[:2], "cross_entropy"))
        submitted(world.engine, "tenant", Gradient(data[2:], "cross_entropy"))
        told = world.tell(how)
        assert abs(told.metrics["grad_norm:max"] / float(norm) - 1) < LIMIT
        assert float(norm) > 2, "the clip binds"
    after, before = (load_file(x / "adapter_model.safetensors") for x in (world.saved(), path))
    off = {name: apart(after[name], x.detach().numpy()) for name, x in factors.items()}
    assert all(apart(before[name], after[name]) > rate for name in factors), "it moved"
    worst = max(off, key=off.get)
    record_property("largest deviation", off[worst])
    print(f"AdamW: {off[worst]:.1e} at {worst}")
    assert off[worst] < LIMIT, (worst, off[worst])
