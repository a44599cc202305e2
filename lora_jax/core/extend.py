"""JAX's names for those who extend it, which move from release to release: imported here alone.

Public JAX has no names for what walks over a jaxpr or adds a primitive. From 0.12 on, `ClosedJaxpr`
is another name of `Jaxpr`; what differs inside equations is read in `lora_jax.adapt.eqns`.
"""

from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Primitive",
    "Var",
    "ad",
    "batching",
    "jaxpr_as_fun",
    "mlir",
    "source_info_util",
]
