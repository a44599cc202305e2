"""jraph: graph networks whose update functions close over the tree; Haiku makes the layers."""

from typing import Any

import jax
import jax.numpy as jnp

from tests.foreign.case import Case, Made
from tests.support import array, draw


def _graph() -> Any:
    import jraph

    return jraph.GraphsTuple(
        nodes=draw(1, (7, 5)),
        edges=draw(2, (9, 3)),
        globals=draw(3, (1, 2)),
        senders=array([0, 1, 2, 3, 4, 5, 6, 0, 2]),
        receivers=array([1, 2, 3, 4, 5, 6, 0, 3, 5]),
        n_node=array([7]),
        n_edge=array([9]),
    )


def _made(network: Any) -> Made:
    import haiku as hk

    def run(nodes: jax.Array, edges: jax.Array) -> Any:
        out = network(hk)(_graph()._replace(nodes=nodes, edges=edges))
        return out.nodes, out.edges, out.globals

    module = hk.without_apply_rng(hk.transform(run))
    graph = _graph()
    params = module.init(jax.random.key(1), graph.nodes, graph.edges)
    return Made(module.apply, params, (graph.nodes, graph.edges))


def _graph_network(hk: Any) -> Any:
    import jraph

    def update(name: str, size: int) -> Any:
        linear = hk.Linear(size, name=name)

        @jraph.concatenated_args
        def fn(features: jax.Array) -> jax.Array:
            return jnp.tanh(linear(features))

        return fn

    return jraph.GraphNetwork(
        update_edge_fn=update("edge", 11),
        update_node_fn=update("node", 13),
        update_global_fn=update("global", 17),
    )


def _attention(hk: Any) -> Any:
    import jraph

    query, logit, node = (hk.Linear(n, name=f"of_{n}") for n in (8, 1, 7))

    def logits(sent: jax.Array, received: jax.Array, edges: jax.Array) -> jax.Array:
        return logit(jnp.tanh(jnp.concatenate([sent, received, edges], -1)))

    def run(graph: Any) -> Any:
        gat = jraph.GAT(query, logits, lambda x: jnp.tanh(node(x)))
        return gat(graph)._replace(edges=graph.edges)

    return run


def _convolution(hk: Any) -> Any:
    import jraph

    return jraph.GraphConvolution(hk.Linear(7), add_self_edges=True, symmetric_normalization=True)


CASES = (
    Case("jraph", "GraphNetwork: edges, nodes, globals", "apply", 3, lambda: _made(_graph_network)),
    Case("jraph", "GAT", "apply", 3, lambda: _made(_attention), by_hand=True),
    Case("jraph", "GraphConvolution", "apply", 1, lambda: _made(_convolution)),
)
