"""weathernext, the lineage of graphcast (Haiku): its graph network and its sparse transformer."""

from typing import Any

import jax
import numpy as np

from tests.foreign.case import Made
from tests.foreign.repository import Model, Repository, drawn


def _graph_lines(network: Any, params: Any, graph: Any) -> Made:
    def features(params, inputs):
        nodes = {"mesh_nodes": graph.nodes["mesh_nodes"]._replace(features=inputs)}
        output = network.apply(params, None, graph._replace(nodes=nodes))
        return output.nodes["mesh_nodes"].features

    inputs = graph.nodes["mesh_nodes"].features
    return Made(features, params, (inputs,))


def _transformer_lines(network: Any, params: Any, nodes: Any, condition: Any) -> Made:
    def features(params, nodes, condition):
        return network.apply(params, None, nodes, condition)

    return Made(features, params, (nodes, condition))


NODES, EDGES = 6, 14


def _edges() -> tuple[np.ndarray, np.ndarray]:
    senders = np.arange(EDGES) % NODES
    return senders, (senders + 1 + np.arange(EDGES) // NODES) % NODES


def _graph_arguments() -> tuple[Any, ...]:
    import haiku as hk
    from weathernext.utils import typed_graph
    from weathernext.utils.legacy.deep_typed_graph_net import DeepTypedGraphNet

    nodes = jax.random.normal(jax.random.key(1), (NODES, 2, 5))
    edges = jax.random.normal(jax.random.key(2), (EDGES, 2, 3))
    key = typed_graph.EdgeSetKey("mesh", ("mesh_nodes", "mesh_nodes"))
    indices = typed_graph.EdgesIndices(*_edges())
    graph = typed_graph.TypedGraph(
        context=typed_graph.Context(np.array([1]), ()),
        nodes={"mesh_nodes": typed_graph.NodeSet(np.array([NODES]), nodes)},
        edges={key: typed_graph.EdgeSet(np.array([EDGES]), indices, edges)},
    )
    network = hk.transform(
        lambda graph: DeepTypedGraphNet(
            node_latent_size={"mesh_nodes": 8},
            edge_latent_size={"mesh": 8},
            mlp_hidden_size=12,
            mlp_num_hidden_layers=1,
            num_message_passing_steps=2,
            node_output_size={"mesh_nodes": 4},
            activation="swish",
        )(graph)
    )
    return network, drawn(network.init(jax.random.key(0), graph)), graph


def _transformer_arguments() -> tuple[Any, ...]:
    import haiku as hk
    import scipy
    from weathernext.utils.sparse_transformer import Transformer

    ones = np.ones(2 * EDGES + NODES, bool)
    senders, receivers = _edges()
    own = np.arange(NODES)
    places = (np.r_[senders, receivers, own], np.r_[receivers, senders, own])
    adjacency = scipy.sparse.csr_matrix((ones, places), shape=(NODES, NODES))
    network = hk.transform(
        lambda nodes, condition: Transformer(
            adj_mat=adjacency,
            attention_k_hop=1,
            attention_type="mha",
            mask_type="full",
            num_heads=2,
            num_layers=2,
            d_model=8,
        )(nodes, condition)
    )
    nodes = jax.random.normal(jax.random.key(1), (2, NODES, 8))
    condition = jax.random.normal(jax.random.key(2), (2, 3))
    return network, drawn(network.init(jax.random.key(0), nodes, condition)), nodes, condition


REPOSITORY = Repository(
    name="graphcast",
    title="weathernext",
    address="https://github.com/google-deepmind/graphcast",
    pins="no version of JAX",
    requirements=("dm-haiku", "jraph", "chex", "scipy"),
    shown=("dm-haiku", "jraph"),
    models=(
        Model("DeepTypedGraphNet", _graph_lines, _graph_arguments),
        Model("sparse Transformer of GenCast", _transformer_lines, _transformer_arguments),
    ),
)
