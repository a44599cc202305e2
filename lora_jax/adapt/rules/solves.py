"""The rule for linear solves with an implicit derivative, as `jax.scipy.sparse.linalg.cg` has.

The operator and the solvers are entered, and the solve is made again of what they become. Its
derivative is taken of the operator alone, by JAX, as before.
"""

from collections.abc import Callable, Sequence

from jax import lax

from lora_jax.adapt import eqns
from lora_jax.adapt.interpreter import Interpreter, Rule, Use
from lora_jax.core.factored import Factored
from lora_jax.core.types import Forward, Outcome, Value


def _linear_solve(interpreter: Interpreter, use: Use) -> Outcome:
    """Keeps the factors of weights that the operator multiplies by; merges a right-hand side.

    None where the operator would not be linear (a bias on B), or not the same in each step
    (dropout).
    """
    weights = [value for value in use.values if isinstance(value, Factored)]
    if any(weight.shift is not None or weight.key is not None for weight in weights):
        return None
    solve = eqns.linear_solve_of(use.eqn)

    def plain(value: Value) -> Value:
        return interpreter.plain(value, use)

    def called(part: eqns.SolverFunction) -> Callable[[Sequence[Value]], list[Value]]:
        body, consts = interpreter.function(part.jaxpr), use.values[part.consts]
        return lambda vector: list(map(plain, body(*consts, *vector)))

    right = list(map(plain, use.values[solve.right]))
    n, has_aux = len(right), len(use.eqn.outvars) > len(right)

    def solver(part: eqns.SolverFunction) -> Forward:
        run = called(part)

        def solved(_: object, vector: Sequence[Value]) -> Value:
            outputs = run(vector)
            return (outputs[:n], outputs[n:]) if has_aux else outputs

        return solved

    back = solve.transpose_solve
    outputs = lax.custom_linear_solve(
        called(solve.matvec),
        right,
        solver(solve.solve),
        None if back is None else solver(back),
        symmetric=solve.is_symmetric,
        has_aux=has_aux,
    )
    return [*outputs[0], *outputs[1]] if has_aux else outputs


SOLVE_RULES: dict[str, Rule] = {"custom_linear_solve": _linear_solve}
