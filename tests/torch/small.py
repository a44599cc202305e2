"""A tiny Llama's rows and adapters, which several tests share; gradients by torch and by JAX."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.lorafy import map_parts
from tests.torch.checks import VOCAB

IDS = np.random.default_rng(0).integers(0, VOCAB, (4, 12)).astype(np.int32)
X = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)


def adapted(params):
    """Returns the tree with an adapter of random B on all linear layers."""
    rule = lj.LoraRule(targets="all-linear", rank=3, alpha=7)
    tree = lj.lorafy(params, [rule], key=jax.random.key(1))
    leaves = iter(jax.random.split(jax.random.key(2), 99))

    def noise(path, name, x):
        return 0.2 * jax.random.normal(next(leaves), x.shape) if name == "b" else x

    return map_parts(noise, tree)


def loss_of(fn, tree):
    """Returns the loss of `IDS` with its gradient as a function of the adapter, and the adapter."""
    adapter, base = lj.split(tree)
    forward = lj.adapt(fn, strict=True)

    def loss(adapter):
        logp = jax.nn.log_softmax(forward(lj.join(adapter, base), IDS)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logp, IDS[:, 1:, None], axis=2))

    return jax.jit(jax.value_and_grad(loss)), adapter


def by_torch(network):
    """Returns the output for `X`, and the gradient of its squares by the kernel of `inner`."""
    import torch

    out = network(torch.tensor(X))
    (out**2).sum().backward()
    return out.detach().numpy(), network.inner.weight.grad.numpy().T


def by_jax(network):
    """Like `by_torch`, of the network as a JAX function."""
    import torch

    from lora_jax.torch import from_torch

    fn, params = from_torch(network)

    def squares(params):
        out = fn(params, X)
        return (out**2).sum(), out

    with torch.no_grad():  # the caller's is none of the module's
        (_, out), gradient = jax.jit(jax.value_and_grad(squares, has_aux=True))(params)
    return out, gradient["inner"]["kernel"]
