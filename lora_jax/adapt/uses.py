"""Lists the uses of each adapted weight by a function, factored or merged, with the reason."""

import jax

from lora_jax.adapt import eqns
from lora_jax.adapt.activate import args_with_masks
from lora_jax.adapt.interpreter import Interpreter
from lora_jax.adapt.reports import WeightUse
from lora_jax.adapt.transform import RULES, run
from lora_jax.core.aliases import flatten_with_aliases
from lora_jax.core.types import Forward, Tree
from lora_jax.core.weight import LoraWeight, leaves_of


def uses(fn: Forward, *args: Tree, **kwargs: Tree) -> list[WeightUse]:
    """Returns every use of an adapted weight by ``fn(*args, **kwargs)``, in program order.

    `fn` is traced, not run; arrays may be `jax.ShapeDtypeStruct`\\ s. A weight that the function
    never uses has one entry, which says so.
    """
    records: list[WeightUse] = []
    interpreter = Interpreter(RULES, strict=False, record=records.append)
    keyed_leaves, treedef = flatten_with_aliases((args, kwargs))
    leaves = [leaf for _, leaf in keyed_leaves]
    array_indices = [index for index, leaf in enumerate(leaves) if hasattr(leaf, "shape")]

    # Trace the function with a recording interpreter, which writes to `records`.
    def run_with_records(args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> Tree:
        return run(fn, interpreter, args_with_masks(fn, args, kwargs), kwargs, None)

    fn_of_arrays = eqns.function_of_inputs(run_with_records, leaves, treedef, array_indices)
    jax.eval_shape(fn_of_arrays, *(leaves[index] for index in array_indices))
    # Add an entry for each weight without a use.
    for argument in (*args, *kwargs.values()):
        leaves_by_path, _ = leaves_of(argument)
        used_paths = {record.path for record in records}
        for path, leaf in leaves_by_path:
            if isinstance(leaf, LoraWeight) and path not in used_paths:
                unused = WeightUse(
                    path=path,
                    primitive="",
                    place="",
                    how="unused",
                    why="no output depends on this weight, so its adapter will not train",
                )
                records.append(unused)
    return list(dict.fromkeys(records))
