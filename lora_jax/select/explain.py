"""`explain`: lists where a function uses each adapted weight, and why others are excluded."""

from collections.abc import Mapping, Sequence

from lora_jax.adapt.observed import traced_roles
from lora_jax.adapt.reports import WeightUse
from lora_jax.adapt.uses import uses
from lora_jax.core.aliases import resolve_aliases
from lora_jax.core.types import Forward, Leaf, Tree
from lora_jax.core.weight import is_node, leaves_of, map_leaves
from lora_jax.rules import ALL_LINEAR, LoraRule
from lora_jax.select.left_out import left_out_reasons
from lora_jax.select.matching import LeafFacts


def explain(fn: Forward, *args: Tree, **kwargs: Tree) -> None:
    """Prints a table of where ``adapt(fn)(*args, **kwargs)`` uses each adapted weight.

    Each line is one use. It shows the primitive, the line of your code, whether the product is
    factored or the weight is merged there, and why. Then follows a line for each kernel that is not
    adapted, and that "all-linear" leaves out; see `left_out`.

    Args:
      fn: traced, not run.
      *args, **kwargs: as `fn` is called, an adapted tree among them; arrays may be abstract.

    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
    >>> tree = lj.lorafy(params, [lj.LoraRule(targets=["dense"], rank=2)])
    >>> lj.explain(lambda params, x: x @ params["dense"]["kernel"], tree, jnp.ones((1, 4)))
    path          primitive    place  how       why
    dense/kernel  dot_general  ...    factored  xW + s·(xA)B
    """
    rows = [*uses(fn, *args, **kwargs), *_left_out_rows(fn, args, kwargs)]
    table: list[Sequence[str]] = [WeightUse._fields, *rows]
    column_widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded_cells = map(str.ljust, cells, column_widths)
        print("  ".join(padded_cells).rstrip())


def _left_out_rows(
    fn: Forward, args: Sequence[Tree], kwargs: Mapping[str, Tree]
) -> list[WeightUse]:
    """Returns a table row for each kernel that "all-linear" excludes."""
    plain_args = [_stripped(arg) for arg in args]
    plain_kwargs = {name: _stripped(arg) for name, arg in kwargs.items()}
    # The leaves of adapted arguments, without nodes, which the plain arguments share.
    tree: dict[str, Leaf] = {}
    node_paths: set[str] = set()
    for argument in (*args, *kwargs.values()):
        leaves, _ = leaves_of(argument)
        nodes_of_argument = {path for path, leaf in leaves if is_node(leaf)}
        if nodes_of_argument:
            node_paths |= nodes_of_argument
            tree |= {path: leaf for path, leaf in leaves if hasattr(leaf, "shape")}

    def call(args: Sequence[Tree], kwargs: Mapping[str, Tree]) -> Tree:
        return fn(*args, **kwargs)

    plain_leaves = [(path, leaf) for path, leaf in tree.items() if path not in node_paths]
    facts = LeafFacts(roles=traced_roles((call, plain_args, plain_kwargs), plain_leaves))
    reasons = left_out_reasons(tree, [LoraRule(targets=ALL_LINEAR)], facts, node_paths)
    return [
        WeightUse(path=path, primitive="", place="", how="left out", why=reason)
        for path, reason in reasons.items()
    ]


def _stripped(tree: Tree) -> Tree:
    """Returns a tree with bases in place of nodes."""
    return resolve_aliases(map_leaves(lambda _, leaf: leaf.base if is_node(leaf) else leaf, tree))
