"""Meshes of a layout: every axis is there, and what cannot be a mesh is refused."""

import jax
import pytest

from lora_jax import training
from lora_jax.models.specs import AXES


def test_a_mesh_has_every_axis():
    mesh = training.make_mesh(jax.devices()[:4], fsdp=2, tensor=2)
    assert mesh.axis_names == AXES
    assert {name: size for name, size in mesh.shape.items() if size > 1} == {"fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"fsdp": 3}, "multiply to 3, but there are 4 devices. Pass sizes"),
        ({"model": 4}, "a mesh has no axis 'model'. .* data, fsdp"),
        ({}, "multiply to 1, but there are 4 devices"),
    ],
)
def test_what_cannot_be_a_mesh_is_refused(sizes, says):
    with pytest.raises(training.TrainingError, match=says):
        training.make_mesh(jax.devices()[:4], **sizes)


def test_a_layout_asks_for_every_axis():
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), devices=jax.devices()[:1])
    with pytest.raises(training.TrainingError, match=r"lacks data, .*training\.make_mesh"):
        training.Layout(mesh, ())
