"""EasyDeL, whose kernels hold JAX below 0.10."""

from tests.foreign.repository import Repository

REPOSITORY = Repository(
    name="EasyDeL",
    title="EasyDeL",
    address="https://github.com/erfanzar/EasyDeL",
    pins="jax 0.9.2 or newer, flax 0.12.3, ejkernel 0.0.78",
    models=(),
    not_run="ejkernel 0.0.78, which it pins, requires a JAX before 0.10.",
)
