"""Penzai: named arrays; the parameters of a model by their labels."""

from typing import Any

import jax

from tests.foreign.case import Case, Made, rule
from tests.support import draw

X = draw(9, (13, 6))


def _penzai() -> Made:
    """A Penzai model with its parameters taken out, by their labels."""
    from penzai import pz

    model = pz.nn.Sequential(
        [
            pz.nn.Affine.from_config("up", jax.random.key(1), {"features": 6}, {"features": 11}),
            pz.nn.Elementwise(jax.nn.gelu),
            pz.nn.Affine.from_config("down", jax.random.key(2), {"features": 11}, {"features": 7}),
        ]
    )
    unbound, values = pz.unbind_params(model, freeze=True)
    params = {value.label: value for value in values}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        bound = pz.bind_variables(unbound, params.values())
        return bound(pz.nx.wrap(x, "batch", "features")).unwrap("batch", "features")

    return Made(fn, params, (X,), rule(r".*Linear.*"))


CASES = (Case("penzai", "Affine, gelu, Affine", "bind_variables, on named arrays", 2, _penzai),)
