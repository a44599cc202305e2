"""Image models of diffusers: blocks as scans, and adapters, beside diffusers and PEFT on torch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
import lora_jax.peft as lp
from lora_jax.training import losses
from tests.torch.checks import distance

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import TorchModelError, from_torch  # noqa: E402
from tests.torch import images  # noqa: E402

TARGETS = ["to_q", "to_k", "to_v", "to_out/0", "add_q_proj", "add_v_proj", "to_add_out"]
RULE = lj.LoraRule(targets=TARGETS, rank=3, alpha=5)
UNET_RULE = lj.LoraRule(targets=["to_q", "to_k", "to_v", "to_out/0"], rank=3, alpha=5)
# The start and the repetitions of each stack.
STACKS = {
    "flux": [("transformer_blocks", 0, 3), ("single_transformer_blocks", 0, 4)],
    "sd3": [("transformer_blocks", 0, 2), ("transformer_blocks", 2, 3)],
    "qwen": [("transformer_blocks", 0, 3)],
}


def _adapted(params, rule=RULE):
    """Returns an adapted tree whose B is not zero."""
    tree = lj.lorafy(params, [rule])
    adapter, base = lj.split(tree)
    leaves, structure = jax.tree.flatten(adapter)
    rng = np.random.default_rng(5)
    leaves = [jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype) for x in leaves]
    return lj.join(jax.tree.unflatten(structure, leaves), base)


def _split_arguments(arguments):
    """Returns arrays and other arguments."""
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    return arrays, {name: x for name, x in arguments.items() if name not in arrays}


def _in_torch(arguments):
    return {
        name: torch.tensor(x) if isinstance(x, np.ndarray) else x for name, x in arguments.items()
    }


@pytest.fixture(scope="module", params=images.MODELS)
def model(request):
    module = images.MODELS[request.param]().eval()
    return request.param, module, *from_torch(module)


def test_blocks_are_scans_in_several_sizes(model):
    """Traces a module twice: Qwen caches positions, which must not go from trace to trace."""
    name, module, fn, params = model
    stacks = [(stack.name, stack.start, stack.repeats) for stack in fn.built.stacks]
    assert stacks == STACKS[name]
    for size in ((4, 6), (8, 4)):
        arguments = images.inputs_of(module, *size)
        arrays, others = _split_arguments(arguments)
        out = jax.jit(lambda params, arrays, o=others: fn(params, **arrays, **o)[0])(params, arrays)
        with torch.no_grad():
            assert distance(out, module(**_in_torch(arguments))[0].numpy()) <= 1e-5


def test_adapters_are_those_of_peft(model, tmp_path):
    _, module, fn, params = model
    _compare_with_peft(module, fn, params, images.inputs_of(module, 4, 6), tmp_path)


def test_a_unet_runs_block_by_block_as_with_peft(tmp_path):
    module = images.unet().eval()
    fn, params = from_torch(module)
    assert not fn.built.stacks
    _compare_with_peft(module, fn, params, images.inputs_of_unet(), tmp_path, UNET_RULE)


def _compare_with_peft(module, fn, params, arguments, tmp_path, rule=RULE):
    """Asserts that outputs, and gradients of A and B, are those of PEFT."""
    import peft

    tree = _adapted(params, rule)
    lp.save(tmp_path / "adapter", fn, tree)
    theirs = peft.PeftModel.from_pretrained(module, tmp_path / "adapter", is_trainable=True)
    arrays, others = _split_arguments(arguments)
    adapter, base = lj.split(tree)
    run = lj.adapt(fn.clone(remat=True), strict=True)

    @jax.jit
    def value_and_gradient(adapter, arrays):
        def loss(adapter):
            out = run(lj.join(adapter, base), **arrays, **others)[0]
            return jnp.sum(out**2), out

        return jax.value_and_grad(loss, has_aux=True)(adapter)

    (_, out), gradient = value_and_gradient(adapter, arrays)
    expected = theirs(**_in_torch(arguments))[0]
    assert distance(out, expected.detach().numpy()) <= 1e-5
    with torch.no_grad():
        plain = jax.jit(lambda p, a: fn(p, **a, **others)[0])(params, arrays)
    assert np.abs(out - plain).max() > 1e-2
    torch.sum(expected**2).backward()
    lp.save(tmp_path / "gradient", fn, lj.join(gradient, base))
    from safetensors.numpy import load_file

    ours = load_file(tmp_path / "gradient" / "adapter_model.safetensors")
    found = {
        name.replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert ours.keys() == found.keys()
    for name, array in ours.items():
        if found[name] is None:  # nothing reads the last block's text
            assert not array.any()
        else:
            assert distance(array, found[name].numpy()) <= 5e-5
    theirs.unload()


def test_three_steps_of_flow_matching(tmp_path, standard_promotion):
    """A loop written by hand in torch and ours end with the same adapter."""
    import peft
    from safetensors.numpy import load_file

    module = images.flux().eval()
    fn, params = from_torch(module)
    tree = _adapted(params)
    lp.save(tmp_path / "first", fn, tree)
    theirs = peft.PeftModel.from_pretrained(module, tmp_path / "first", is_trainable=True)
    schedule = losses.FlowSchedule(shift=1.7)
    rng = np.random.default_rng(1)
    latents, noise = rng.normal(size=(2, 3, 2, 2, 4, 6)).astype(np.float32)
    times = rng.uniform(0.1, 0.9, size=(3, 2)).astype(np.float32)
    arrays, others = _split_arguments(images.inputs_of(module, 4, 6))
    adapter, base = lj.split(tree)
    run = lj.adapt(fn, strict=True)
    optimizer = optax.adam(3e-2)

    @jax.jit
    def step(adapter, state, latents, noise, time):
        time = schedule.shift_times(time)

        def loss(adapter):
            tokens = losses.pack_latents(schedule.add_noise(latents, noise, time))
            inputs = arrays | {"hidden_states": tokens, "timestep": time}
            prediction = run(lj.join(adapter, base), **inputs, **others)[0]
            prediction = losses.unpack_latents(prediction, 4, 6)
            return losses.flow_loss(prediction, latents, noise, time, schedule).mean()

        updates, state = optimizer.update(jax.grad(loss)(adapter), state)
        return optax.apply_updates(adapter, updates), state

    state = optimizer.init(adapter)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    torch_optimizer = torch.optim.Adam(trained, lr=3e-2)
    for x, e, t in zip(latents, noise, times, strict=True):
        adapter, state = step(adapter, state, x, e, t)
        sigma = torch.tensor(1.7 * t / (1 + 0.7 * t))[:, None, None, None]
        noisy = (1 - sigma) * torch.tensor(x) + sigma * torch.tensor(e)
        tokens = noisy.reshape(2, 2, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 8)
        inputs = arrays | {"hidden_states": tokens.numpy(), "timestep": sigma.flatten().numpy()}
        prediction = theirs(**_in_torch(inputs), **others)[0]
        prediction = prediction.reshape(2, 2, 3, 2, 2, 2).permute(0, 3, 1, 4, 2, 5)
        target = torch.tensor(e - x)
        torch_optimizer.zero_grad()
        torch.mean((prediction.reshape(2, 2, 4, 6) - target) ** 2).backward()
        torch_optimizer.step()
    lp.save(tmp_path / "last", fn, lj.join(adapter, base))
    theirs.save_pretrained(tmp_path / "theirs")
    first, ours, expected = (
        load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("first", "last", "theirs")
    )
    assert ours.keys() == expected.keys()
    for name, array in ours.items():
        assert np.abs(array - first[name]).max() > 1e-2
        assert distance(array, expected[name]) <= 1e-3


def test_flux_dev_is_a_small_program():
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    from lora_jax.hf.keys import nest_leaves
    from lora_jax.torch.config import TorchConfig
    from lora_jax.torch.model import TorchModel

    with init_empty_weights(include_buffers=False):
        module = FluxTransformer2DModel(guidance_embeds=True)
    config = TorchConfig("", module=module)
    fn = TorchModel(config, jnp.bfloat16, jnp.bfloat16, remat=True)
    params = nest_leaves(
        (row.path, jax.ShapeDtypeStruct(row.stacked_shape, jnp.bfloat16))
        for row in config.key_rows()
    )
    tree = jax.eval_shape(lambda params: lj.lorafy(params, [RULE]), params)
    adapter, base = lj.split(tree)
    arrays, others = _split_arguments(images.inputs_of(module, 128, 128, batch=1))

    def loss(adapter, base, arrays):
        return jnp.sum(lj.adapt(fn)(lj.join(adapter, base), **arrays, **others)[0])

    program = jax.make_jaxpr(jax.grad(loss))(adapter, base, arrays)
    assert _count_equations(program.jaxpr, set()) <= 4000


def _count_equations(program, counted):
    """Counts the equations of a program and, once each, of the programs within."""
    n_equations = len(program.eqns)
    for value in jax.tree.leaves([equation.params for equation in program.eqns]):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns") and id(inner) not in counted:
            counted.add(id(inner))
            n_equations += _count_equations(inner, counted)
    return n_equations


def test_an_example_makes_other_modules_scans():
    """Other modules are compared with the user's example; a wrong example is no error."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

        def forward(self, x, y, gain):
            return self.right(y) * gain, x + self.left(x)

    class TwoStreams(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.blocks = torch.nn.ModuleList(Block() for _ in range(4))

        def forward(self, x, gain):
            y = x * 2
            for block in self.blocks:
                y, x = block(x, y, gain=gain)
            return x - y

    module = TwoStreams()
    x = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    gain = np.float32([0.5, 0.7, 1, 1, 1, 2])
    plain, _ = from_torch(module)
    assert not plain.built.stacks
    assert "no example" in plain.config.layer_lines()[0]
    fn, params = from_torch(module, example={"x": x[:1], "gain": gain})
    assert [stack.repeats for stack in fn.built.stacks] == [4]
    assert params["blocks"]["left"]["kernel"].shape == (4, 6, 6)
    with torch.no_grad():
        expected = module(torch.tensor(x), torch.tensor(gain)).numpy()
    assert distance(jax.jit(fn)(params, x, gain), expected) <= 1e-5
    wrong, _ = from_torch(module, example={"x": x[:, :3], "gain": gain})
    assert not wrong.built.stacks and "cannot be compared" in wrong.config.layer_lines()[0]


def test_an_example_of_a_language_model_has_no_effect(llama):
    with pytest.raises(TorchModelError, match="example has no effect, because"):
        from_torch(llama[0], example={"input_ids": np.zeros((1, 3), np.int32)})
    with pytest.raises(TorchModelError, match="example has no effect with scan=False"):
        from_torch(torch.nn.Linear(2, 2), example={"input": np.zeros((1, 2))}, scan=False)


def _largest_stack_of_floats(program, n_layers):
    """Returns the most numbers of an array of floats whose first axis counts the layers."""
    sizes = [0]
    for equation in program.eqns:
        for variable in equation.outvars:
            shape = getattr(variable.aval, "shape", ())
            is_stack = len(shape) == 3 and shape[0] == n_layers
            if is_stack and jnp.issubdtype(variable.aval.dtype, jnp.floating):
                sizes.append(math.prod(shape))
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                sizes.append(_largest_stack_of_floats(inner, n_layers))
    return max(sizes)


def test_quantized_blocks_are_dequantized_one_at_a_time():
    """The control is a function that has the stacks dequantized."""
    module = images.flux()
    fn, params = from_torch(module, remat=True)
    coded = lj.quantized.quantize(params, "nf4")
    arrays, others = _split_arguments(images.inputs_of(module, 4, 6))

    def gradient(base, adapter):
        def loss(adapter):
            return jnp.sum(lj.adapt(fn)(lj.join(adapter, base), **arrays, **others)[0])

        return jax.grad(loss)(adapter)

    adapter, base = lj.split(lj.lorafy(coded, [RULE]))
    kernel = 32 * 128  # the smallest one of the MLPs
    program = jax.make_jaxpr(gradient)(base, adapter)
    assert _largest_stack_of_floats(program.jaxpr, 4) < 4 * kernel

    def through_floats(coded, adapter):
        _, base = lj.split(lj.lorafy(lj.quantized.dequantize(coded), [RULE]))
        return gradient(base, adapter)

    control = jax.make_jaxpr(through_floats)(coded, adapter)
    assert _largest_stack_of_floats(control.jaxpr, 4) >= 4 * kernel
    ours = jax.jit(gradient)(base, adapter)
    expected = jax.jit(through_floats)(coded, adapter)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), ours, expected)
