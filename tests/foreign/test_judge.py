"""The judge passes right cases and reports wrong ones."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from tests.foreign.case import Case, Made, rule
from tests.foreign.judge import judged
from tests.support import draw

PARAMS = {"kernel": draw(1, (5, 7))}
X = draw(2, (3, 5))


def linear(params, x):
    return x @ params["kernel"]


def bent(params, x):
    return x @ jnp.sin(params["kernel"])


def case(fn, merges=0, rules=rule(["kernel"]), adapted=None):  # noqa: B008
    make = lambda: Made(fn, PARAMS, (X,), rules, adapted)  # noqa: E731
    return Case("a library", "a model", "called", 1, make, merges, "a sine" if merges else "")


ROLES = rule(["kernel"], in_axes=[0], out_axes=[1])


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("good", [case(linear), case(bent, 1, ROLES)], ids=["factored", "merged"])
def test_it_passes_what_is_as_it_says(good):
    verdict = judged(good)
    assert verdict.paths == {"kernel"} and len(verdict.merges) == good.merges
    assert sorted(verdict.errors) == [
        f"{how} {what}" for how in ("eager", "jit") for what in ("gradients", "outputs")
    ]


def base_alone(tree, x):
    return linear(lj.strip(tree), x)


def wrong_gradient(tree, x):
    kernel = tree["kernel"]
    return lj.adapt(linear)({"kernel": kernel.replace(a=jax.lax.stop_gradient(kernel.a))}, x)


def slightly_off(tree, x):
    return lj.adapt(linear)(tree, x) * (1 + 1e-4)


@pytest.mark.parametrize(
    "bad",
    [
        case(bent, 0, ROLES),
        case(linear, 1),
        case(linear, adapted=base_alone),
        case(linear, adapted=slightly_off),
        case(linear, adapted=wrong_gradient),
    ],
    ids=["a merge too many", "a merge too few", "no adapter", "wrong outputs", "a wrong gradient"],
)
def test_it_refuses_what_is_not(bad):
    with pytest.raises(AssertionError):
        judged(bad)
