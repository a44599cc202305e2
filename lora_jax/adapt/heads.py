"""Finds the order of the products of kernels in a function, to tell heads from other kernels.

Names mislead: a kernel called ``img/head`` may be the projector between two models. So a kernel
whose path names a head or an embedding is judged by what the function does with its product.

A **flow** describes a value of the function: the weights and products that it depends on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from lora_jax.adapt import eqns
from lora_jax.adapt.per_example.primitives import ELEMENTWISE
from lora_jax.core.axes import ProductOrder
from lora_jax.core.extend import JaxprEqn


class _Product(NamedTuple):
    """A product, identified by the path of its weight and by its equation."""

    path: str
    eqn: int


_NO_PATHS: frozenset[str] = frozenset()
_NO_PRODUCTS: frozenset[_Product] = frozenset()


class _Flow(NamedTuple):
    """Describes the weights, data and products that a value depends on.

    Attributes:
      weights: the paths of the weights that the value is computed from, moved or scaled.
      has_data: whether the value depends on an input that is no leaf of the tree.
      products: products that the value depends on.
      unmixed_products: products that reach the value by element-wise operations and moves alone.
      is_iota: whether the value counts 0, 1, 2, … along an axis.
      is_one_hot: whether the value compares indices with such a count.
    """

    weights: frozenset[str] = _NO_PATHS
    has_data: bool = False
    products: frozenset[_Product] = _NO_PRODUCTS
    unmixed_products: frozenset[_Product] = _NO_PRODUCTS
    is_iota: bool = False
    is_one_hot: bool = False


def product_orders(
    jaxpr: eqns.AnyJaxpr,
    path_of_input: Sequence[str | None],
    weights: frozenset[str],
) -> dict[str, ProductOrder]:
    """Returns the position of each kernel's products among all products, by path.

    The walk reads a jaxpr and its inner jaxprs. It traces nothing.

    Args:
      jaxpr: the jaxpr of a function.
      path_of_input: the path in the tree of each input; None for data.
      weights: paths of the leaves that the function multiplies by.
    """
    walk = _ProductWalk()
    flow_of_input = []
    for path in path_of_input:
        paths = frozenset({path}) & weights if path is not None else _NO_PATHS
        flow_of_input.append(_Flow(weights=paths, has_data=path is None))
    flow_of_output = walk.run(jaxpr, flow_of_input)
    outputs: set[_Product] = set()
    products_before_output: set[_Product] = set()
    for flow in flow_of_output:
        outputs |= flow.unmixed_products
        products_before_output |= flow.products
    products_of_path: dict[str, set[_Product]] = {path: set() for path in weights}
    for product in walk.products:
        products_of_path[product.path].add(product)
    orders: dict[str, ProductOrder] = {}
    for path, products in products_of_path.items():
        unfollowed = products - walk.followed
        # A second product that no output needs says nothing; vision towers have one.
        last = unfollowed if unfollowed == products else unfollowed & products_before_output
        orders[path] = ProductOrder(
            is_one_hot_lookup=path in walk.one_hot_lookups,
            is_last=bool(last),
            is_output=bool(products & outputs),
        )
    return orders


class _ProductWalk:
    """Walks once over a jaxpr and records products.

    Attributes:
      products: the products of weights.
      followed: products that another weight's product follows.
      one_hot_lookups: paths of weights that a one-hot array is multiplied by.
    """

    def __init__(self) -> None:
        self.products: set[_Product] = set()
        self.followed: set[_Product] = set()
        self.one_hot_lookups: set[str] = set()
        self._results: dict[tuple[int, tuple[_Flow, ...]], list[_Flow]] = {}

    def run(self, jaxpr: eqns.AnyJaxpr, inputs: Sequence[_Flow]) -> list[_Flow]:
        """Returns the flows of a jaxpr's outputs."""
        key = (id(jaxpr), tuple(inputs))
        if key not in self._results:
            self._results[key] = self._run(jaxpr, inputs)
        return self._results[key]

    def _run(self, jaxpr: eqns.AnyJaxpr, inputs: Sequence[_Flow]) -> list[_Flow]:
        """Returns the flows of a jaxpr's outputs, equation by equation."""
        inner, _ = eqns.jaxpr_and_consts(jaxpr)
        flow_of_variable: dict[eqns.Atom, _Flow] = {}
        flow_of_variable |= zip(inner.invars, inputs, strict=True)

        def read(atom: eqns.Atom) -> _Flow:
            # Constants, written into the jaxpr or closed over, are neither weights nor data.
            return _Flow() if eqns.is_literal(atom) else flow_of_variable.get(atom, _Flow())

        for eqn in inner.eqns:
            outputs = self._apply(eqn, [read(atom) for atom in eqn.invars])
            flow_of_variable |= zip(eqn.outvars, outputs, strict=True)
        return [read(atom) for atom in inner.outvars]

    def _apply(self, eqn: JaxprEqn, operands: list[_Flow]) -> list[_Flow]:
        """Returns the flows of an equation's outputs."""
        name = eqn.primitive.name
        if name in _RULES:
            return _RULES[name](self, eqn, operands)
        if name in _PASSED_ON:
            return operands
        body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if body is not None:
            inner, _ = eqns.jaxpr_and_consts(body)
            if len(inner.invars) == len(operands) and len(inner.outvars) == len(eqn.outvars):
                return self.run(body, operands)
        keeps_elements = name in ELEMENTWISE or name in _MOVES
        flow = _join_flows(operands)
        if not keeps_elements:
            flow = flow._replace(weights=_NO_PATHS, unmixed_products=_NO_PRODUCTS)
        if name == "iota":
            flow = flow._replace(is_iota=True)
        elif name == "eq":
            flow = flow._replace(is_one_hot=any(operand.is_iota for operand in operands))
        elif name in _MOVES or name in _CASTS:
            flow = flow._replace(is_iota=operands[0].is_iota, is_one_hot=operands[0].is_one_hot)
        return [flow] * len(eqn.outvars)

    def _multiply(self, eqn: JaxprEqn, operands: list[_Flow]) -> list[_Flow]:
        """Records a product of a weight, and the products that it follows."""
        left, right = operands[:2]
        # A product of two weights is a weight.
        are_weights = bool(left.weights and right.weights)
        if are_weights and not (left.has_data or right.has_data):
            return [_join_flows(operands)] * len(eqn.outvars)
        # An activation that was scaled by a weight is still the activation.
        right_is_weight = bool(right.weights) and not (right.has_data and left.weights)
        weight, activation = (right, left) if right_is_weight else (left, right)
        earlier_products = activation.products | weight.products
        new_products: set[_Product] = set()
        for path in weight.weights:
            new_products.add(_Product(path, id(eqn)))
            if activation.is_one_hot:
                self.one_hot_lookups.add(path)
        self.products |= new_products
        if weight.weights:
            self.followed |= {
                product for product in earlier_products if product.path not in weight.weights
            }
        flow = _Flow(
            has_data=True,
            products=frozenset(new_products | (earlier_products - self.followed)),
            unmixed_products=frozenset(new_products),
        )
        return [flow] * len(eqn.outvars)

    def _gather(self, eqn: JaxprEqn, operands: list[_Flow]) -> list[_Flow]:
        """Returns the flow of a look-up; a member of a stack still counts as a weight."""
        flow = _join_flows(operands)
        slice_sizes = eqn.params["slice_sizes"]
        is_member_of_stack = sum(size > 1 for size in slice_sizes) >= 2
        if not is_member_of_stack:
            flow = flow._replace(weights=_NO_PATHS)
        return [flow]

    def _scan(self, eqn: JaxprEqn, operands: list[_Flow]) -> list[_Flow]:
        """Returns the flows of a scan's outputs."""
        scan = eqns.read_scan(eqn)
        consts, carries, stacks = scan.split(operands)

        def run_iteration(carries: list[_Flow]) -> list[_Flow]:
            return self.run(scan.body, [*consts, *carries, *stacks])

        return _repeat(run_iteration, carries)

    def _while(self, eqn: JaxprEqn, operands: list[_Flow]) -> list[_Flow]:
        """Returns the flows of a while loop's outputs."""
        loop = eqns.read_while(eqn)
        condition_consts, body_consts, carries = loop.split(operands)

        def run_iteration(carries: list[_Flow]) -> list[_Flow]:
            self.run(loop.condition, [*condition_consts, *carries])
            return self.run(loop.body, [*body_consts, *carries])

        return _repeat(run_iteration, carries)

    def _cond(self, eqn: JaxprEqn, operands: list[_Flow]) -> list[_Flow]:
        outputs_of_branches = [self.run(branch, operands[1:]) for branch in eqn.params["branches"]]
        return [_join_flows(outputs) for outputs in zip(*outputs_of_branches, strict=True)]


def _join_flows(flows: Sequence[_Flow]) -> _Flow:
    """Returns the flow of a value that is computed element-wise from several values."""
    return _Flow(
        weights=_NO_PATHS.union(*(flow.weights for flow in flows)),
        has_data=any(flow.has_data for flow in flows),
        products=_NO_PRODUCTS.union(*(flow.products for flow in flows)),
        unmixed_products=_NO_PRODUCTS.union(*(flow.unmixed_products for flow in flows)),
    )


def _repeat(
    run_iteration: Callable[[list[_Flow]], list[_Flow]], first_carries: list[_Flow]
) -> list[_Flow]:
    """Returns the flows of a loop's outputs, by iterating until the carries no longer change.

    Args:
      run_iteration: returns the outputs of an iteration, carries first.
      first_carries: the flows of the carries before the first iteration.
    """
    carries = first_carries
    while True:
        outputs = run_iteration(carries)
        next_carries = [
            _join_flows([carry, output])
            for carry, output in zip(carries, outputs[: len(carries)], strict=True)
        ]
        if next_carries == carries:
            return outputs
        carries = next_carries


_Rule = Callable[[_ProductWalk, JaxprEqn, list[_Flow]], list[_Flow]]
_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_PRODUCTS, _ProductWalk._multiply),
    "gather": _ProductWalk._gather,
    "scan": _ProductWalk._scan,
    "while": _ProductWalk._while,
    "cond": _ProductWalk._cond,
}
_CASTS = frozenset({"convert_element_type", "copy", "copy_p", "stop_gradient"})
_PASSED_ON = ("optimization_barrier", "device_put")  # each operand is an output
# Operations that move elements or leave some out.
_MOVES = frozenset(
    """
    all_gather bitcast_convert_type broadcast_in_dim concatenate dynamic_slice expand_dims pad
    reshape rev slice split squeeze stack transpose unstack sharding_constraint reshard
    """.split()
)
