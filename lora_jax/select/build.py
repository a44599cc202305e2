"""Makes the node of a selected leaf: draws its factors, and adds the arrays of its variants.

The `start` of a variant makes A and B of its weights, in place of an initialiser that draws them.
"""

import functools
import math
from collections.abc import Hashable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.axes import EMBEDDING_NAMES
from lora_jax.core.base import as_array, is_abstract
from lora_jax.core.factored import as_matrices, factor_shapes
from lora_jax.core.magnitude import accumulation_dtype
from lora_jax.core.parts import pad_rank
from lora_jax.core.paths import fold_in_path, leaf_name
from lora_jax.core.types import Leaf
from lora_jax.core.weight import LoraWeight, Node, Part, Trained, TrainedRows
from lora_jax.init import Factors, FactorShape, takes_from_base
from lora_jax.select.resolve import Adaptation, Decision, FullTraining
from lora_jax.variants.variant import KernelFacts, MakeFactors, Variant

FactorMakers = Mapping[Variant, MakeFactors]


def _factor_makers_by_variant(
    leaves: Mapping[str, Leaf], decisions: Mapping[str, Decision], key: jax.Array
) -> FactorMakers:
    """Returns the function that makes A and B for each variant that computes them.

    Args:
      leaves: the arrays of the tree, by path.
      decisions: the decision for each selected leaf, by path.
      key: a PRNG key.

    Raises:
      ValueError: the weights do not fit their variant.
    """
    kernels_of_variant: dict[Variant, list[KernelFacts]] = {}
    for path, decision in decisions.items():
        variant = _starting_variant(decision)
        if isinstance(decision, Adaptation) and variant is not None:
            kernel_facts = _kernel_facts(leaves[path], path, decision)
            kernels_of_variant.setdefault(variant, []).append(kernel_facts)
    return {
        variant: variant.start(kernels, key)
        for variant, kernels in kernels_of_variant.items()
        if variant.start
    }


def _starting_variant(decision: Decision) -> Variant | None:
    """Returns the variant that computes A and B; None if they are drawn."""
    if isinstance(decision, FullTraining):
        return None
    return next((variant for variant in decision.rule.variants if variant.start), None)


def _kernel_facts(leaf: Leaf, path: str, adaptation: Adaptation) -> KernelFacts:
    """Returns the facts about a kernel that a variant needs."""
    variant = _starting_variant(adaptation)
    return KernelFacts(
        path=path,
        shape=tuple(leaf.shape),
        roles=adaptation.roles,
        ranks=adaptation.ranks,
        dtype=np.dtype(adaptation.rule.dtype),
        settings=adaptation.rule.settings_of(variant) if variant else {},
    )


def make_nodes(
    leaves: Mapping[str, Leaf], decisions: Mapping[str, Decision], key: jax.Array
) -> dict[str, Node]:
    """Returns the node of each selected leaf, by path.

    An abstract leaf gets a node of abstract arrays. Their types follow from the type and the name
    of the leaf and from the decision. Leaves that agree in these are traced once.

    Args:
      leaves: the leaves of the tree, by path: arrays, or instances of `lora_jax.core.base.Base`.
      decisions: the decision of `lora_jax.select.resolve.resolve` for each selected leaf, by path.
      key: a PRNG key. The draws of a leaf depend on it and on the path of the leaf.

    Raises:
      ValueError: a weight does not fit its rule.
    """
    factor_makers = _factor_makers_by_variant(leaves, decisions, key)
    nodes: dict[str, Node] = {}
    abstract_nodes: dict[Hashable, Node] = {}
    for path, decision in decisions.items():
        leaf = leaves[path]
        make = functools.partial(_make_node, path=path, decision=decision, makers=factor_makers)
        if not is_abstract(leaf):
            nodes[path] = make(leaf, key)
            continue
        types, treedef = jax.tree.flatten(leaf)
        abstract_type = (decision, leaf_name(path), treedef, *types)
        if abstract_type not in abstract_nodes:
            abstract_nodes[abstract_type] = jax.eval_shape(make, leaf, key)
        nodes[path] = _copy_of_abstract_node(abstract_nodes[abstract_type], leaf)
    return nodes


def _copy_of_abstract_node(node: Node, leaf: Leaf) -> Node:
    """Returns a copy of an abstract node for a leaf of the same type.

    No two nodes share an object, because the identity of an array says which leaf of a tree it is.
    """
    copy: Node = jax.tree.map(lambda array: array.update(), node)
    return copy if isinstance(copy, Trained) else copy.replace(base=leaf)


def _make_node(
    leaf: Leaf, key: jax.Array, path: str, decision: Decision, makers: FactorMakers
) -> Node:
    """Returns the node of an array, or of a tracer.

    Args:
      leaf: the array.
      key: a PRNG key.
      path: path of the leaf.
      decision: the decision for the leaf.
      makers: see `_factor_makers_by_variant`.
    """
    if isinstance(decision, FullTraining):
        return _trained_node(leaf, decision)
    return _adapted_node(leaf, path, decision, key, makers)


def _trained_node(leaf: Leaf, training: FullTraining) -> Node:
    """Returns the node with a copy of the trained value, so that it can be donated."""
    array = as_array(leaf)
    if training.rows is None:
        return Trained(jnp.array(array, copy=True))
    value = jnp.take(array, np.asarray(training.rows), axis=0).astype(
        accumulation_dtype(leaf.dtype)
    )
    return TrainedRows(base=leaf, value=value, rows=training.rows, is_table=training.is_table)


def _adapted_node(
    leaf: Leaf, path: str, adaptation: Adaptation, key: jax.Array, factor_makers: FactorMakers
) -> Node:
    """Returns the node with its factors and the parts of its variants; see `_make_node`."""
    rule = adaptation.rule
    if rule.invocation is not None and leaf_name(path) in EMBEDDING_NAMES:
        raise ValueError(
            f"{path!r} is an embedding table, which is looked up by token. A rule with "
            f"invocation= can only adapt weights that multiply activations. Add {path!r} to "
            "the exclude= of that rule."
        )
    scale = _scales_of_layers(leaf, adaptation)
    variant = _starting_variant(adaptation)
    if variant is not None:
        kernel_facts = _kernel_facts(leaf, path, adaptation)
        arrays = {"scale": scale, **factor_makers[variant](leaf, kernel_facts)}
    else:
        a, b = _draw_stored_factors(leaf, path, adaptation, scale, key)
        arrays = {"scale": scale, "a": a, "b": b}
        if takes_from_base(rule.init):
            # Copies, so that a donated factor spares the factor that training factor_makers from.
            copies = {"a": jnp.array(a, copy=True), "b": jnp.array(b, copy=True)}
            arrays |= {"start_a": a, "start_b": b, **copies}
    node = LoraWeight(
        base=leaf,
        arrays=arrays,
        roles=adaptation.roles,
        ranks=adaptation.ranks,
        dropout=rule.dropout,
        extras=rule.parts,
        frozen=rule.frozen,
        uses=rule.uses,
        invocation=None if rule.invocation is None else tuple(rule.invocation),
    )
    weight_key = fold_in_path(key, path)

    def init_part(part: Part) -> jax.Array:
        if part.is_drawn:
            return part.init(node, fold_in_path(weight_key, part.name)).astype(rule.dtype)
        return part.init(node).astype(rule.dtype)

    return node.replace(**{part.name: init_part(part) for part in rule.parts})


def _scales_of_layers(leaf: Leaf, adaptation: Adaptation) -> jax.Array:
    """Returns s of each member of a stack, [batch…] fp32."""
    shape = adaptation.roles.sizes(leaf.shape, "batch")
    scales = np.asarray(adaptation.scales, np.float32)  # one for each layer, or one for all
    scales = scales.reshape(-1, *[1] * (len(shape) - 1)) if shape else scales[0]
    scale: jax.Array = jax.device_put(np.broadcast_to(scales, shape))  # asarray would compile
    return scale


def _draw_stored_factors(
    leaf: Leaf, path: str, adaptation: Adaptation, scale: jax.Array, key: jax.Array
) -> Factors:
    """Draws A and B, in the stored layout; see `lora_jax.core.parts.AXES`."""
    a, b = _draw_factors(leaf, path, adaptation, scale, key)
    a_shape, b_shape, _ = factor_shapes(leaf.shape, adaptation.roles, max(adaptation.ranks))
    a = jnp.moveaxis(a, -1, scale.ndim)  # [batch…, r, in]
    return a.reshape(a_shape), b.reshape(b_shape)


def _draw_factors(
    leaf: Leaf, path: str, adaptation: Adaptation, scale: jax.Array, key: jax.Array
) -> Factors:
    """Returns A [batch…, in, r] and B [batch…, r, out].

    Where ranks differ, the factors are drawn layer by layer and padded with zeros, which training
    leaves at zero.
    """
    roles = adaptation.roles
    rule = adaptation.rule
    ranks = adaptation.ranks
    batch_sizes = roles.sizes(leaf.shape, "batch")
    fan_in = math.prod(roles.sizes(leaf.shape, "in"))
    fan_out = math.prod(roles.sizes(leaf.shape, "out"))
    dtype = np.dtype(rule.dtype)
    weight_key = fold_in_path(key, path)
    kernel = as_matrices(leaf, roles) if takes_from_base(rule.init) else None

    def initialise(key: jax.Array, rank: int, *layer: int) -> Factors:
        """Returns the factors that the rule's initialiser draws for a stack, or for one layer."""
        shape = FactorShape(
            batch=batch_sizes[len(layer) :], fan_in=fan_in, fan_out=fan_out, rank=rank
        )
        base_arguments = {} if kernel is None else {"kernel": kernel[layer], "scale": scale[layer]}
        a, b = rule.init(key, shape, dtype, **base_arguments)
        if a.shape != shape.a or b.shape != shape.b:
            name = getattr(rule.init, "__qualname__", rule.init)
            raise ValueError(
                f"The initialiser {name} returned A of shape {a.shape} and B of shape "
                f"{b.shape}, but the expected shapes are {shape.a} and {shape.b}. Make its arrays "
                "with the shapes of its second argument (shape.a and shape.b)."
            )
        return a.astype(dtype), b.astype(dtype)

    def draw_for_all_uses(rank: int, *layer: int) -> Factors:
        """Returns the factors of all uses, concatenated along the rank."""
        layer_key = jax.random.fold_in(weight_key, *layer) if layer else weight_key
        if rule.uses != "each":
            return initialise(layer_key, rank, *layer)
        # Look-ups see the first half of the rank, and products the second half.
        lookup_key = jax.random.fold_in(layer_key, 0)
        product_key = jax.random.fold_in(layer_key, 1)
        lookup_a, lookup_b = initialise(lookup_key, rank // 2, *layer)
        product_a, product_b = initialise(product_key, rank // 2, *layer)
        a = jnp.concatenate([lookup_a, product_a], axis=-1)
        b = jnp.concatenate([lookup_b, product_b], axis=-2)
        return a, b

    # All layers have one rank.
    if len(set(ranks)) == 1:
        return draw_for_all_uses(ranks[0])
    # Ranks differ: draw each layer, and pad it to the largest rank.
    empty_shape = FactorShape(batch=batch_sizes[1:], fan_in=fan_in, fan_out=fan_out, rank=0)
    empty_factors = (jnp.zeros(empty_shape.a, dtype), jnp.zeros(empty_shape.b, dtype))
    largest_rank = max(ranks)
    a_of_layers = []
    b_of_layers = []
    for layer, rank in enumerate(ranks):
        a, b = draw_for_all_uses(rank, layer) if rank else empty_factors
        a_of_layers.append(pad_rank(a, len(batch_sizes), largest_rank))
        b_of_layers.append(pad_rank(b, len(batch_sizes) - 1, largest_rank))
    return jnp.stack(a_of_layers), jnp.stack(b_of_layers)
