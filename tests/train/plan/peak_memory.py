"""Measures the memory of a planned step: compiles it in one process, runs it in another.

python tests/train/plan/peak_memory.py compile|run CACHE PLAN'S OPTIONS…

Both print a line of JSON: {"total": the plan's bytes}, {"peak": how many bytes more than a process
that has loaded JAX and the scripts}.
"""

import json
import sys

mode, cache, *args = sys.argv[1:]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from train.plan import __main__ as plan  # noqa: E402
from train.plan import compile as planned  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def resident_peak() -> int:
    """The most memory that this process has had resident, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def filled(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of this shape, in memory that is really there."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jax.block_until_ready(jnp.full(shape.shape, 1, shape.dtype))


options = plan.parse(args)
plan.check_options(options)
job, optim = plan.make_job(options.plan)
(variant,) = plan.variants_to_plan(options)
if mode == "compile":
    print(json.dumps(planned.plan(job, variant, optim).per_chip_bytes))
else:
    before = resident_peak()
    step = planned.prepare(job, variant, optim)
    compiled = step.lowered.compile()  # from the cache
    state, base, batch = jax.tree.map(filled, (step.state, step.base, step.batch))
    for _ in range(2):
        state, metrics = jax.block_until_ready(compiled(state, base, batch))
    print(json.dumps({"peak": resident_peak() - before}))
