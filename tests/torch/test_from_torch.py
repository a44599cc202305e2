"""Torch modules as JAX functions: their laws, their loading, and what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax import models
from lora_jax.hf import sources
from lora_jax.hf.fields import ConfigError, read_file
from lora_jax.hf.keys import WeightsError
from lora_jax.lorafy import map_parts
from lora_jax.training import make_mesh
from lora_jax.training.layout import Layout
from tests.torch.checks import VOCAB, compare, distance, is_exact, random_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import (  # noqa: E402
    TorchConfig,
    TorchFolder,
    TorchModelError,
    attention,
    from_torch,
)

IDS = np.random.default_rng(0).integers(0, VOCAB, (4, 12)).astype(np.int32)

# One of each kind: plain, norms after blocks, parallel blocks with layer norms, soft caps and
# windows that alternate, biases, latent attention, experts with a shared one, experts by groups,
# attention and convolutions, state spaces, states and attention side by side, and positions by
# biases of scores.
KINDS = (
    *("llama", "glm4", "cohere2", "gemma2", "starcoder2", "deepseek_v3", "qwen2_moe", "glm4_moe"),
    *("lfm2", "mamba2", "falcon_h1", "bloom"),
)


@pytest.mark.parametrize("model_type", KINDS)
def test_a_model_trains_as_by_peft(model_type, tmp_path):
    facts = compare(model_type, tmp_path, generates=model_type in ("llama", "lfm2"))
    assert is_exact(facts), facts
    assert facts.get("greedy", True), facts
    wrong = facts | {"gradients": 2e-5}
    assert not is_exact(wrong)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a tiny Llama of four layers, and the torch module."""
    folder = tmp_path_factory.mktemp("llama")
    module = random_model("llama")
    module.save_pretrained(folder)
    return folder, module


def adapted(params, **options):
    rule = lj.LoraRule(targets="all-linear", rank=3, alpha=7, **options)
    tree = lj.lorafy(params, [rule], key=jax.random.key(1))
    leaves = iter(jax.random.split(jax.random.key(2), 99))

    def noise(path, name, x):
        return 0.2 * jax.random.normal(next(leaves), x.shape) if name == "b" else x

    return map_parts(noise, tree)


def loss_of(fn, tree):
    adapter, base = lj.split(tree)
    forward = lj.adapt(fn, strict=True)

    def loss(adapter):
        logp = jax.nn.log_softmax(forward(lj.join(adapter, base), IDS)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, IDS[:, 1:, None], axis=2))

    return jax.jit(jax.value_and_grad(loss)), adapter


def test_a_scan_and_recomputed_layers_change_no_gradient(llama):
    folder, _ = llama
    results = []
    for options in ({}, {"remat": True}, {"scan": False}, {"scan": False, "remat": True}):
        fn, params = from_torch(folder, **options)
        tree = adapted(from_torch(folder)[1])
        if not options.get("scan", True):
            lp.save(folder / "adapter", from_torch(folder)[0], tree, overwrite=True)
            tree = lp.load(folder / "adapter", fn, params)
        step, adapter = loss_of(fn, tree)
        text = str(jax.make_jaxpr(step)(adapter))
        assert ("scan" in text) == options.get("scan", True)
        assert ("remat" in text or "checkpoint" in text) == options.get("remat", False)
        # Outside of a scan, XLA would merge what is computed again with the forward pass.
        assert ("prevent_cse=True" in text) == (options == {"scan": False, "remat": True})
        loss, gradients = step(adapter)
        squares = sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(gradients))
        results.append((float(loss), squares))
    np.testing.assert_allclose(results, [results[0]] * 4, rtol=1e-5)
    assert results[0][1] > 1e-3


@pytest.mark.parametrize("scan", [True, False])
def test_offload_moves_each_layers_input_to_the_host(llama, scan):
    def moves(remat):
        fn, params = from_torch(llama[0], scan=scan, remat=remat)
        return str(jax.make_jaxpr(jax.grad(lambda p: fn(p, IDS).sum()))(params)).count("Host")

    assert (moves("offload"), moves(True)) == (1 if scan else 4, 0)


def test_our_own_llama_has_the_same_tree_and_the_same_gradients(llama):
    folder, _ = llama
    fn, params = from_torch(folder)
    model, own = models.from_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, params, own)
    tree = adapted(own)
    logits = jax.jit(lj.adapt(lambda p: model.apply({"params": p}, IDS)))(tree)
    assert distance(jax.jit(lj.adapt(fn))(tree, IDS), logits) <= 1e-5
    assert distance(jax.jit(fn)(lj.strip(tree), IDS), logits) > 1e-2


def test_roles_are_read_from_the_program(llama):
    fn, params = from_torch(llama[0])
    rule = lj.LoraRule(targets="all-linear", rank=2)
    named, traced = (lj.lorafy(params, [rule], **how) for how in ({}, {"trace": (fn, params, IDS)}))
    assert jax.tree.structure(named) == jax.tree.structure(traced)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])  # values as wide as keys, or less
def test_rows_that_are_packed_are_those_alone(model_type, llama):
    fn, params = from_torch(llama[0] if model_type == "llama" else random_model(model_type))
    alone = jax.jit(fn)(params, IDS)
    packed = {
        "positions": jnp.tile(jnp.arange(12, dtype=jnp.int32), (1, 4)),
        "segment_ids": jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32), 12)[None],
    }
    run = jax.jit(lambda **where: fn.apply({"params": params}, IDS.reshape(1, -1), **where))
    assert distance(run(**packed)[0].reshape(alone.shape), alone) <= 1e-5
    assert distance(run(segment_ids=packed["segment_ids"]), run(**packed)) == 0
    together = run(positions=packed["positions"])
    assert distance(together[0].reshape(alone.shape), alone) > 1e-3


def test_attention_without_padding_has_no_array_for_a_mask(llama, monkeypatch):
    calls, attend = [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a, **k: calls.append(1) or attend(*a, **k))
    fn, params = from_torch(llama[0])
    ways = {"call": lambda p: fn(p, IDS), "apply": lambda p: fn.apply({"params": p}, IDS)}
    ways["mask"] = lambda p: fn.apply({"params": p}, IDS, attention_mask=jnp.ones_like(IDS))
    for way, run in ways.items():
        calls.clear()
        jax.eval_shape(run, params)
        assert bool(calls) == (way != "mask"), way


def test_the_head_of_a_model_that_calls_an_inner_part():
    fn, params = from_torch(random_model("opt"))
    whole = fn(params, IDS)
    at = jnp.array([[3, 5]] * 4)
    assert distance(fn.apply({"params": params}, IDS, logits_at=at), whole[:, [3, 5]]) <= 1e-6
    hidden = fn.apply({"params": params}, IDS, logits_at=at, return_hidden=True)
    logits = fn.apply({"params": params}, hidden, method="head")
    assert distance(logits, whole[:, [3, 5]]) <= 1e-6
    assert distance(whole[:, [4, 6]], whole[:, [3, 5]]) > 1e-2


def test_the_head_by_itself_and_left_padding(llama):
    fn, params = from_torch(llama[0])
    whole = fn.apply({"params": params}, IDS)
    at = jnp.array([[3, 5]] * 4)
    some = fn.apply({"params": params}, IDS, logits_at=at)
    hidden = fn.apply({"params": params}, IDS, logits_at=at, return_hidden=True)
    by_head = fn.apply({"params": params}, hidden, method="head")
    for logits in (some, by_head):
        assert distance(logits, whole[:, [3, 5]]) <= 1e-6
    ids = jnp.pad(IDS, ((0, 0), (3, 0)))
    mask = jnp.pad(jnp.ones(IDS.shape, jnp.int32), ((0, 0), (3, 0)))
    for segments in (None, jnp.ones_like(mask)):
        where = {"attention_mask": mask, "segment_ids": segments}
        padded = fn.apply({"params": params}, ids, **where)
        assert distance(padded[:, 3:], whole) <= 1e-5


def check_devices(folder, n):
    """Asserts that n devices train an adapter as one does, each with its part of the weights."""
    results = []
    for mesh in (make_mesh(jax.devices()[:1]), make_mesh(jax.devices()[:n], fsdp=n // 2, tensor=2)):
        fields = read_file(folder / "config.json", "a model", ValueError)
        layout = Layout.of(mesh, TorchConfig.from_hf(fields))
        fn, params = from_torch(folder, sharding=layout.of_parameter)
        step, adapter = loss_of(layout.constrained(fn), layout.placed(adapted(params)))
        with jax.set_mesh(mesh):
            for _ in range(3):
                loss, gradients = step(adapter)
                adapter = jax.tree.map(lambda x, g: x - 0.5 * g, adapter, gradients)
        results.append((loss, jax.device_get(adapter)))
    (one, alone), (many, together) = results
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), alone, together)
    assert abs(float(one) - float(many)) <= 1e-5
    kernel = params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 32 // (n // 2), 24)


def test_devices_train_as_one_does(llama):
    check_devices(llama[0], 4)


EIGHT = """
import pathlib, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from tests.torch.test_from_torch import check_devices
check_devices(pathlib.Path(sys.argv[1]), 8)
"""


@pytest.mark.slow
def test_eight_devices_train_as_one_does(llama):
    subprocess.run([sys.executable, "-c", EIGHT, str(llama[0])], check=True)


LOADING = """
import json, sys
import jax
from safetensors.numpy import load_file
from lora_jax.torch import TorchFolder, from_torch

def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

folder = TorchFolder(__import__("pathlib").Path(sys.argv[1]))
len(folder.config.key_rows())  # builds the module
jax.numpy.ones(3).block_until_ready()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
tensors = load_file(sys.argv[1] + "/model.safetensors") if sys.argv[2:] else {}
_, params = from_torch(sys.argv[1])
sizes = [x.nbytes for x in jax.tree.leaves(params)]
print(json.dumps([status("VmHWM") - before, sum(sizes), max(sizes)]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_holds_two_tensors_beyond_what_stays(tmp_path):
    """A program that reads the whole file beforehand has a copy of all weights more."""
    fields = {
        **{"model_type": "llama", "vocab_size": 99, "hidden_size": 512, "intermediate_size": 2048},
        **{"num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    rows = TorchConfig.from_hf(fields).key_rows()
    tensors = {n: np.zeros(row.hf_shape, np.float32) for row in rows for n in row.hf_names}
    save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", LOADING, str(tmp_path)]
    for more in ([], ["whole"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
        grown, total, largest = json.loads(done.stdout.splitlines()[-1])
        assert (grown <= total + 2 * largest + 16e6) == (not more), (grown, total, largest)


def test_parts_of_tensors_in_files(tmp_path, monkeypatch):
    """Each tensor is joined once; what transformers leaves in the files is left there."""
    random_model("deepseek_v3").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, joined = load_file(file), []
    join = TorchFolder._join
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(TorchFolder, "_join", lambda *a: joined.append(a[1]) or join(*a))
    experts = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    up = tensors[experts.format(1, 3)]
    save_file({**tensors, experts.format(61, 0): up}, file)
    _, params = from_torch(tmp_path)
    assert sorted(joined) == sorted(set(joined)) and len(joined) == 3 * 2
    whole = params["model"]["layers"]["0of1from1"]["mlp"]["experts"]["gate_up_proj"]
    np.testing.assert_array_equal(whole[0, 3, 16:], up)
    save_file({**tensors, experts.format(7, 0): up}, file)
    with pytest.raises(WeightsError, match=r"layers\.7\.mlp"):
        from_torch(tmp_path)
    del tensors[experts.format(1, 3)], tensors[experts.format(1, 3).replace("up", "gate")]
    save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"\[3, 32, 32\].*expected \[4, 32, 32\]"):
        from_torch(tmp_path)


def test_codes_of_files_are_read_as_arrays(tmp_path):
    """FP8 in blocks, as DeepSeek-V3 is shipped: parts of experts, layers in a stack and outside."""
    random_model("deepseek_v3").save_pretrained(tmp_path / "floats")
    file = tmp_path / "floats/model.safetensors"
    tensors = {n: x.bfloat16() for n, x in safetensors_torch.load_file(file).items()}
    coded = dict(tensors)
    for name in [n for n in tensors if re.search(r"(_proj|_a|_b|_mqa)\.weight$", n)]:
        values, (rows, columns) = tensors[name].float(), tensors[name].shape
        scale = 0.5 + torch.rand(-(-rows // 16), -(-columns // 16))
        each = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(16, 1)[:, :columns]
        codes = (values / each).to(torch.float8_e4m3fn)
        coded |= {name: codes, f"{name}_scale_inv": scale}
        tensors[name] = codes.float() * each
    fields = json.loads((tmp_path / "floats/config.json").read_text())
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    (tmp_path / "fp8").mkdir()
    text = json.dumps(fields | {"quantization_config": fp8})
    (tmp_path / "fp8/config.json").write_text(text)
    before = from_torch(tmp_path / "floats")[1]
    for folder, held in (("floats", tensors), ("fp8", coded)):
        safetensors_torch.save_file(held, tmp_path / folder / "model.safetensors")
    (_, want), (fn, params) = (from_torch(tmp_path / folder) for folder in ("floats", "fp8"))
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert {*TorchFolder(tmp_path / "fp8").dtypes.values()} == {"BF16"}
    experts = [x["model"]["layers"]["0of1from1"]["mlp"]["experts"] for x in (params, before)]
    assert distance(experts[0]["gate_up_proj"], experts[1]["gate_up_proj"]) > 1e-3
    assert np.isfinite(jax.jit(fn)(params, IDS)).all() and len(coded) - len(tensors) > 20
    (tmp_path / "fp8/config.json").write_text(text.replace('"fp8"', '"sinq"'))
    with pytest.raises(ConfigError, match="quant_method"):
        from_torch(tmp_path / "fp8")


def test_a_module_is_taken_as_it_is(llama):
    folder, module = llama
    fn, params = from_torch(module)
    want = from_torch(folder)[1]
    jax.tree.map(np.testing.assert_array_equal, params, want)
    assert next(module.parameters()).device.type == "cpu"

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = torch.nn.Linear(5, 7), torch.nn.LayerNorm(7)
            self.last = torch.nn.Linear(7, 3)

        def forward(self, x):
            return self.last(torch.nn.functional.gelu(self.norm(self.first(x))))

    network = Network()
    fn, params = from_torch(network)
    x = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    with torch.no_grad():
        assert distance(fn(params, x), network(torch.tensor(x)).numpy()) <= 1e-5
    tree = lj.lorafy(params, [lj.LoraRule(targets="all-linear", rank=2)])
    assert lj.adapt(fn, strict=True)(tree, x).shape == (2, 3)


class Cube(torch.autograd.Function):
    """x ** 3, with its own backward; torch runs its forward under no_grad."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x * x * gradient


@pytest.mark.parametrize("frozen", [True, False])
def test_a_modules_no_grad_stops_gradients_and_a_functions_forward_does_not(frozen):
    class Cycles(torch.nn.Module):
        def __init__(self, frozen, cube):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer = torch.nn.Linear(5, 5), torch.nn.Linear(5, 3)
            self.frozen, self.cube = frozen, cube
            for parameter in self.parameters():
                parameter.data *= 2

        def forward(self, x):
            first = torch.tanh(self.inner(x))
            with torch.set_grad_enabled(not self.frozen):
                state = self.cube(torch.tanh(self.inner(first)))
                first = first.to(first.dtype)  # the same tensor, whose gradient stays
            return self.outer(self.cube(torch.tanh(self.inner(state + first))))

    def by_torch(*how):
        network = Cycles(*how)
        (network(torch.tensor(x)) ** 2).sum().backward()
        return network.inner.weight.grad.numpy().T

    x = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    fn, params = from_torch(Cycles(frozen, Cube.apply))
    with torch.no_grad():  # the caller's is none of the module's
        gradient = jax.jit(jax.grad(lambda p: (fn(p, x) ** 2).sum()))(params)
    assert distance(gradient["inner"]["kernel"], by_torch(frozen, Cube.apply)) <= 1e-5
    for wrong in ((not frozen, Cube.apply), (frozen, lambda x: 0 * x + x.detach() ** 3)):
        assert distance(gradient["inner"]["kernel"], by_torch(*wrong)) > 1e-2


def test_slices_have_no_gradient_where_torch_gives_them_none():
    class Slices(torch.nn.Module):
        def __init__(self, stops=True):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer = torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)
            self.stops = stops

        def forward(self, x):
            hidden, filled = torch.tanh(self.inner(x)), torch.zeros(2, 2, device=x.device)
            with torch.set_grad_enabled(not self.stops):
                first = hidden[:, :2]
                filled[:, :1].copy_(hidden[:, :1])
            last = hidden[:, 2:4].detach() if self.stops else hidden[:, 2:4]
            return self.outer(torch.cat([first * hidden[:, 3:5], last * hidden[:, 1:3], filled], 1))

    def by_torch(network):
        out = network(torch.tensor(x))
        (out**2).sum().backward()
        return out.detach().numpy(), network.inner.weight.grad.numpy().T

    x = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    fn, params = from_torch(Slices())
    gradient = jax.jit(jax.grad(lambda p: (fn(p, x) ** 2).sum()))(params)["inner"]["kernel"]
    out, want = by_torch(Slices())
    assert distance(jax.jit(fn)(params, x), out) <= 1e-5
    assert distance(gradient, want) <= 1e-5
    assert distance(gradient, by_torch(Slices(stops=False))[1]) > 1e-2


@pytest.mark.parametrize("how", ["no_grad", "a slice", "data", "detach", "a slice's", "new data"])
def test_what_is_written_without_a_gradient_changes_none(how):
    class Writes(torch.nn.Module):
        def __init__(self, how):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer = torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)
            self.how = how

        def forward(self, x):
            state = self.inner(x) + 1
            with torch.set_grad_enabled(self.how not in ("no_grad", "a slice")):
                if self.how == "no_grad":
                    state.mul_(state)
                elif self.how == "a slice":
                    state[:, 1:3] = 2 * state[:, :2]
                elif self.how == "data":
                    state.data.mul_(state)
                elif self.how == "detach":
                    state.detach()[:, :3] = 2
                elif self.how == "a slice's":
                    state[:, 1:4].detach().mul_(3)
                elif self.how == "new data":
                    state.data = state.detach() ** 2
                else:
                    state = state * state
            return self.outer(state)

    def by_torch(how):
        network = Writes(how)
        out = network(torch.tensor(x))
        (out**2).sum().backward()
        return out.detach().numpy(), network.inner.weight.grad.numpy().T

    x = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    fn, params = from_torch(Writes(how))
    gradient = jax.jit(jax.grad(lambda p: (fn(p, x) ** 2).sum()))(params)["inner"]["kernel"]
    out, want = by_torch(how)
    assert distance(jax.jit(fn)(params, x), out) <= 1e-5
    assert distance(gradient, want) <= 1e-5
    assert distance(gradient, by_torch("with one")[1]) > 1e-2


def test_modules_that_are_named_by_numbers_are_saved_for_peft(tmp_path):
    """Their last names alone would select the blocks that hold them, which PEFT refuses."""
    import peft

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(
                torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 6))
                for _ in range(2)
            )

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    network = Network()
    fn, params = from_torch(network)
    tree = adapted(params)
    lp.save(tmp_path / "adapter", fn, tree)
    x = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(Network(), peft.LoraConfig(target_modules=["0", "2"]))
    theirs = peft.PeftModel.from_pretrained(network, tmp_path / "adapter")
    with torch.no_grad():
        assert distance(lj.adapt(fn)(tree, x), theirs(torch.tensor(x)).numpy()) <= 1e-5


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


def test_what_cannot_be_lowered_is_named():
    class Counts(torch.nn.Module):
        def forward(self, x):
            return x[x > 0].sum() if x.sum() > 0 else x

    class Unknown(torch.nn.Module):
        def forward(self, x):
            return torch.geqrf(x)[0]

    x = np.eye(3, dtype=np.float32)
    with pytest.raises(TorchModelError, match=r"Counts.*test_from_torch.py.*decide"):
        fn, params = from_torch(Counts())
        jax.jit(fn)(params, x)
    with pytest.raises(TorchModelError, match="Unknown.*geqrf.*lower"):
        fn, params = from_torch(Unknown())
        jax.jit(fn)(params, x)


def test_a_plan_of_shardings_is_printed(llama):
    lines = []
    from_torch(llama[0], print_plan=lines.append)
    (narrowing,) = [line for line in lines if line.startswith("tensor, ")]
    assert "o_proj/kernel" in narrowing and "q_proj" not in narrowing
