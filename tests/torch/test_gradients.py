"""Gradients of torch modules are torch's: no_grad, slices, what is written. Torch stays torch."""

import jax
import jax.numpy as jnp
import pytest

from tests.torch.checks import distance
from tests.torch.small import X, by_jax, by_torch

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
torch = pytest.importorskip("torch")
pytest.importorskip("lora_jax.torch", exc_type=ImportError)

from lora_jax.torch import TorchModelError, backend, from_torch  # noqa: E402


class Network(torch.nn.Module):
    """Two linear layers, what is done with the first one's output, and how."""

    def __init__(self, how, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = torch.nn.Linear(5, width), torch.nn.Linear(width, 3)
        self.how = how


def assert_equal(module, how, *wrong):
    """Asserts that a module gives what torch gives, and another gradient than done wrongly."""
    (out, gradient), (want, by_own) = by_jax(module(how)), by_torch(module(how))
    assert distance(out, want) <= 1e-5
    assert distance(gradient, by_own) <= 1e-5
    for other in wrong:
        assert distance(gradient, by_torch(module(other))[1]) > 1e-2


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
    class Cycles(Network):
        def __init__(self, how):
            super().__init__(how, 5)
            for parameter in self.parameters():
                parameter.data *= 2

        def forward(self, x):
            frozen, cube = self.how
            first = torch.tanh(self.inner(x))
            with torch.set_grad_enabled(not frozen):
                state = cube(torch.tanh(self.inner(first)))
                first = first.to(first.dtype)  # the same tensor, whose gradient stays
            return self.outer(cube(torch.tanh(self.inner(state + first))))

    detached = frozen, lambda x: 0 * x + x.detach() ** 3
    assert_equal(Cycles, (frozen, Cube.apply), (not frozen, Cube.apply), detached)


def test_slices_have_no_gradient_where_torch_gives_them_none():
    class Slices(Network):
        def forward(self, x):
            hidden, filled = torch.tanh(self.inner(x)), torch.zeros(2, 2).to(x.device)
            with torch.set_grad_enabled(self.how != "stopped"):
                first = hidden[:, :2]
                filled[:, :1].copy_(hidden[:, :1])
            last = hidden[:, 2:4].detach() if self.how == "stopped" else hidden[:, 2:4]
            return self.outer(torch.cat([first * hidden[:, 3:5], last * hidden[:, 1:3], filled], 1))

    assert_equal(Slices, "stopped", "as they are")


@pytest.mark.parametrize("how", ["no_grad", "a slice", "data", "detach", "a slice's", "new data"])
def test_what_is_written_without_a_gradient_changes_none(how):
    class Writes(Network):
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

    assert_equal(Writes, how, "with one")


@pytest.mark.parametrize("fails", [False, True])
def test_torch_and_torchax_are_as_before_where_no_module_runs(fails):
    def now():
        return [vars(owner).get(name) for owner, name, _ in backend._TORCH_BEHAVIOR]

    class Sevenfold(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x * x)
        backward = staticmethod(lambda ctx, gradient: 7 * gradient)

    class Watched(Network):
        def forward(self, x):
            within.append(now())
            hidden = Sevenfold.apply(self.inner(x))
            return torch.geqrf(hidden)[0] if self.how else self.outer(hidden)

    def as_torch(x):
        x = torch.tensor(x, requires_grad=True)
        with torch.no_grad():
            x.mul_(2)
        Sevenfold.apply(x).sum().backward()
        return x.grad.tolist()

    before, within = now(), []
    tensor = backend.to_torch(jnp.ones(2))
    kind = type(tensor.detach())
    if fails:
        with pytest.raises(TorchModelError, match="geqrf"):
            by_jax(Watched(fails))
    else:
        assert distance(by_jax(Watched(fails))[1], by_torch(Watched(fails))[1]) > 1e-2
    assert now() == before and type(tensor.detach()) is kind and as_torch([1.0]) == [7.0]
    assert within and all(x is not y for x, y in zip(within[0], before, strict=True))


def test_what_cannot_be_lowered_is_named():
    class Counts(torch.nn.Module):
        def forward(self, x):
            return x[x > 0].sum() if x.sum() > 0 else x

    with pytest.raises(TorchModelError, match=r"Counts.*test_gradients.py.*decide"):
        fn, params = from_torch(Counts())
        jax.jit(fn)(params, X)
