"""Stores a subspace in an adapted tree or a folder: θ_d, λ, the seed and the base's checksums.

`tree_of` puts θ_d and λ beside the base, as leaves that train in full. All that takes adapted trees
takes it: `split` and `join`, `adapt`, the training loop and its checkpoints, `save_adapter`.
"""

import os

import jax.numpy as jnp

from lora_jax.core.types import Fields, JsonObject, Tree
from lora_jax.core.weight import Trained
from lora_jax.rules import AnyOf
from lora_jax.saving.checkpoint import adapter_info, load_adapter, save_adapter
from lora_jax.saving.errors import AdapterError
from lora_jax.saving.fingerprint import checksum
from lora_jax.subspace.moving import sample_of_draws
from lora_jax.subspace.space import Subspace, Theta, make

FACTS = "subspace"  # name of the subspace's facts among the facts about an adapter
_ARGUMENTS = ("dimension", "kind", "seed", "targets", "exclude")  # of `make`, unchanged in facts
# Keys of the tree: {"subspace": {"theta": …, "scale": …, "keys": …}, "base": …}.
_SUBSPACE = "subspace"
_BASE = "base"
_KEYS = "keys"


def tree_of(space: Subspace, base: Tree, theta: Tree = None) -> Tree:
    """Returns an adapted tree: the base, with θ_d (and λ) as trained leaves.

    The keys of the projections are frozen leaves of it: a function of the tree is compiled once for
    all seeds.

    Args:
      space: the subspace.
      base: θ₀; its leaves are the very same.
      theta: the numbers that train; those of `Subspace.zeros` by default. They are copied, so that
        donation spares them.

    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> space = lj.subspace.make(params, dimension=5)
    >>> adapter, _ = lj.split(lj.subspace.tree_of(space, params))
    >>> jax.tree.map(jnp.shape, adapter)
    {'subspace/theta': {'value': (5,)}}
    """
    theta = space.zeros() if theta is None else theta
    trained = {name: Trained(jnp.array(array, copy=True)) for name, array in theta.items()}
    return {_SUBSPACE: {**trained, _KEYS: space.keys()}, _BASE: base}


def theta_of(tree: Tree) -> Theta:
    """Returns θ_d (and λ) of a tree that `tree_of` made.

    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> space = lj.subspace.make(params, dimension=5)
    >>> lj.subspace.theta_of(lj.subspace.tree_of(space, params))["theta"].shape
    (5,)
    """
    return {
        name: leaf.value if isinstance(leaf, Trained) else leaf
        for name, leaf in tree[_SUBSPACE].items()
        if name != _KEYS
    }


def base_of(tree: Tree) -> Tree:
    """Returns the base of a tree that `tree_of` made.

    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> space = lj.subspace.make(params, dimension=5)
    >>> lj.subspace.base_of(lj.subspace.tree_of(space, params)) is params
    True
    """
    return tree[_BASE]


def merge(space: Subspace, tree: Tree, shardings: Tree = None) -> Tree:
    """Returns θ₀ + P(θ_d) of a tree that `tree_of` made; see `Subspace.params_of`.

    Args:
      space: the subspace.
      tree: the tree, or what `lora_jax.adapt` makes of it for a function.
      shardings: a `NamedSharding` for each leaf of the base.

    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> space = lj.subspace.make(params, dimension=5)
    >>> tree = lj.subspace.tree_of(space, params)
    >>> bool((lj.subspace.merge(space, tree)["kernel"] == params["kernel"]).all())
    True
    """
    keys = tree[_SUBSPACE][_KEYS]
    return space.params_of(theta_of(tree), base_of(tree), shardings, keys)


def facts_of(space: Subspace) -> JsonObject:
    """Returns the facts that reconstruct the subspace from the base, in JSON types.

    "draws" is a checksum of some random numbers, so that another JAX that draws other numbers from
    the seed is noticed.

    >>> space = lj.subspace.make({"kernel": jnp.ones((4, 3))}, dimension=5, seed=7)
    >>> lj.subspace.facts_of(space)["seed"]
    7
    """
    arguments = {name: getattr(space, name) for name in (*_ARGUMENTS, "stacks")}
    json_arguments = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in arguments.items()
    }
    return {
        **json_arguments,
        "size": space.size,
        "layers": len(space.layers),
        "draws": checksum(sample_of_draws(space.seed)),
    }


def save(
    folder: str | os.PathLike[str],
    space: Subspace,
    theta: Tree,
    base: Tree,
    *,
    about: Fields | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a subspace to `folder`: θ_d, λ, the seed, the selection, the base's checksums.

    Args:
      folder: created; its parents too.
      space: the subspace.
      theta: the numbers that train.
      base: θ₀, of which only the fingerprint is written.
      about: further facts; see `lora_jax.save_adapter`.
      overwrite: replace the folder, whatever is in it.

    Raises:
      AdapterError: the folder exists.

    >>> import tempfile
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> space = lj.subspace.make(params, dimension=5, seed=7)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     lj.subspace.save(f"{folder}/small", space, space.zeros(), params)
    ...     again, theta = lj.subspace.load(f"{folder}/small", params)
    >>> again == space, theta["theta"].shape
    (True, (5,))
    """
    facts = {**(about or {}), FACTS: facts_of(space)}
    save_adapter(folder, tree_of(space, base, theta), about=facts, overwrite=overwrite)


def load(
    folder: str | os.PathLike[str],
    base: Tree,
    *,
    space: Subspace | None = None,
    allow_base_mismatch: bool = False,
) -> tuple[Subspace, Theta]:
    """Returns the subspace that `save` wrote to `folder`, and its θ_d and λ.

    Args:
      folder: folder of a subspace.
      base: θ₀; its leaves may be `jax.ShapeDtypeStruct`\\ s with `allow_base_mismatch`.
      space: the subspace that it has to be, to go on with.
      allow_base_mismatch: accept another base of the same shapes.

    Raises:
      AdapterError: the folder holds no subspace, or is damaged; it has another seed, dimension or
        selection than `space`; this JAX draws other numbers; or the base is another one.

    See the example of `save`.
    """
    facts = adapter_info(folder).get(FACTS)
    if facts is None:
        raise AdapterError(
            f"{folder} contains an adapter, not a subspace. Load it with lora_jax.load_adapter."
        )
    if space is not None:
        _check_same_subspace(folder, facts, facts_of(space))
    arguments = {name: facts[name] for name in _ARGUMENTS}
    if not isinstance(arguments["targets"], str):
        arguments["targets"] = AnyOf(arguments["targets"])  # earlier files have unmatched names
    try:
        subspace = make(base, **arguments, stacks=tuple(facts["stacks"]))
    except ValueError as error:
        raise AdapterError(f"The subspace in {folder} does not fit this tree: {error}") from error
    _check_same_subspace(folder, facts, facts_of(subspace))
    tree = load_adapter(folder, tree_of(subspace, base), allow_base_mismatch=allow_base_mismatch)
    return subspace, theta_of(tree)


def _check_same_subspace(folder: str | os.PathLike[str], saved: Fields, current: Fields) -> None:
    """Raises an AdapterError unless a folder's facts match a subspace.

    Args:
      folder: the folder, for the message.
      saved: facts of the folder.
      current: facts of the subspace, as `facts_of` returns them.
    """
    if saved["draws"] != current["draws"] and saved["seed"] == current["seed"]:
        raise AdapterError(
            f"This version of JAX draws other random numbers from the seed {saved['seed']} than "
            f"the training of the subspace in {folder}. Use the JAX version and the value of "
            "jax_threefry_partitionable of the training."
        )
    differences = "; ".join(
        f"{name} {saved.get(name)} in the folder, {value} here"
        for name, value in current.items()
        if saved.get(name) != value and name != "draws"
    )
    if differences:
        raise AdapterError(
            f"The subspace in {folder} has different settings ({differences}). Load it without "
            "`space`, or make the space with the settings and the base of the folder."
        )
