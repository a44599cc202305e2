"""The search for a policy of rematerialisation, and the rule by which it begins."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lora_jax.models import DecoderConfig, GPT2Config, kinds
from lora_jax.training.remat import (
    LADDER,
    SLOW_SECONDS,
    Attempt,
    RematSearch,
    countable_layers,
    expected_bytes,
    is_refusal,
    rungs_for,
    step_bytes,
)
from tests.models import tiny

SIZES = {"none": 30, "products": 20, "projections": 15, "attention": 12, "full": 10, "offload": 4}
SLOW = SLOW_SECONDS + 1


def compiler(sizes, *, refuses=True, seconds=None):
    """A compiler with a capacity, and the policies that it compiled."""
    compiled = []

    def compile_rung(remat, capacity):
        compiled.append(remat)
        size = sizes[remat]
        refused = refuses and capacity is not None and size is not None and size > capacity
        return Attempt(
            remat=remat,
            size=None if refused else size,
            refused=refused,
            seconds=(seconds or {}).get(remat, 1.0),
            step=f"step of {remat}",
        )

    return compile_rung, compiled


def search_over(sizes, capacity, first, *, settled=False, **compiling):
    """Runs a search; returns the policies in the order of compilation, the best, and the lines."""
    search = RematSearch(rungs=LADDER, capacity=capacity, first=first, is_settled=settled)
    compile_rung, compiled = compiler(sizes, **compiling)
    lines = []
    attempts = search.run(lambda remat: compile_rung(remat, capacity), lines.append)
    assert [attempt.remat for attempt in attempts] == compiled
    return search, attempts, lines


# Memory, first policy -> the policies that are compiled, and the one that the search ends with.
WALKS = {
    "it fits, and little is free": (33, "none", ["none"], "none"),
    "it fits, and a third is free": (16, "full", ["full", "attention"], "attention"),
    "up as long as a third is free": (
        31,
        "attention",
        ["attention", "projections", "products", "none"],
        "none",
    ),
    "up, and no further": (19, "attention", ["attention", "projections"], "projections"),
    "up to one that does not fit": (
        13,
        "offload",
        ["offload", "full"],
        "full",
    ),
    "down": (12, "none", ["none", "products", "projections", "attention"], "attention"),
    "down to the leanest": (5, "full", ["full", "offload"], "offload"),
    "nothing fits": (1, "attention", ["attention", "full", "offload"], None),
}


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("refuses", [True, False])
def test_the_policies_that_are_compiled(name, refuses):
    """Whether a compiler refuses what does not fit, or tells its size."""
    capacity, first, compiled, remat = WALKS[name]
    search, attempts, lines = search_over(SIZES, capacity, first, refuses=refuses)
    assert [attempt.remat for attempt in attempts] == compiled
    best = search.best(attempts)
    assert (best and best.remat) == remat and len(lines) == len(compiled) - 1
    kept = [attempt.step for attempt in attempts if attempt.step is not None]
    assert kept == ([] if remat is None else [f"step of {remat}"])
    assert ("no policy that was tried fits" in search.describe(attempts)) == (remat is None)


def test_the_faster_policy_that_does_not_fit_is_left():
    sizes = SIZES | {"attention": 17}
    search, attempts, lines = search_over(sizes, 16, "full")
    assert [attempt.remat for attempt in attempts] == ["full", "attention"]
    assert search.best(attempts).step == "step of full"
    assert "full leaves a third of the memory" in lines[0]


def test_after_a_slow_compilation_only_the_leanest_is_tried():
    slow = {"none": SLOW}
    assert [a.remat for a in search_over(SIZES, 12, "none", seconds=slow)[1]] == ["none", "offload"]
    search, attempts, _ = search_over(SIZES, 2, "none", seconds=slow)
    assert [a.remat for a in attempts] == ["none", "offload"] and search.best(attempts) is None
    # What was slow is not tried again for a faster one.
    slow = {"full": SLOW}
    assert [a.remat for a in search_over(SIZES, 33, "full", seconds=slow)[1]] == ["full"]


def test_after_a_crash_the_next_leaner_policy_is_tried():
    """A crash says nothing about the memory, also after a slow compilation."""

    def crashes(remat):
        has_crashed = remat == "attention"
        size = None if has_crashed else 5
        return Attempt(remat=remat, size=size, refused=False, seconds=SLOW, crashed=has_crashed)

    search = RematSearch(
        rungs=("none", "attention", "full", "offload"), capacity=9, first="attention"
    )
    attempts = search.run(crashes)
    assert [attempt.remat for attempt in attempts] == ["attention", "full"]
    best = search.best(attempts)
    assert best is not None and best.remat == "full"
    only_crash = attempts[:1]
    assert search.describe(only_crash).endswith("(attention: the compiler crashed on the step)")


def test_a_settled_policy_is_compiled_alone_where_it_fits():
    assert [a.remat for a in search_over(SIZES, 16, "full", settled=True)[1]] == ["full"]
    assert [a.remat for a in search_over(SIZES, 5, "full", settled=True)[1]] == ["full", "offload"]


def test_without_sizes_all_is_computed_again():
    unknown = dict.fromkeys(SIZES)
    search, attempts, _ = search_over(unknown, 16, "none")
    assert [a.remat for a in attempts] == ["none", "full"]
    assert search.best(attempts).remat == "full"
    search = RematSearch.begin(LADDER, None, SIZES)
    assert search.first == "full"
    search, attempts, _ = search_over(SIZES, None, "full")
    assert [a.remat for a in attempts] == ["full"] and search.best(attempts).remat == "full"
    assert "not known" in search.describe(attempts)
    # A compiler that refuses "full" all the same leaves the leanest.
    refusing = SIZES | {"full": None}
    search = RematSearch(rungs=LADDER, capacity=None, first="full")

    def compile_rung(remat):
        refused = remat == "full"
        return Attempt(remat=remat, size=refusing[remat], refused=refused, seconds=1.0)

    attempts = search.run(compile_rung)
    assert [a.remat for a in attempts] == ["full", "offload"]
    assert search.best(attempts).remat == "offload"


@pytest.mark.parametrize(
    ("capacity", "first"),
    [(30, "none"), (29, "products"), (10, "full"), (9, "offload"), (3, "full")],
)
def test_the_first_policy_is_the_fastest_that_is_expected_to_fit(capacity, first):
    assert RematSearch.begin(LADDER, capacity, SIZES).first == first
    settled = RematSearch.begin(LADDER, capacity, SIZES, "attention")
    assert settled.first == "attention" and settled.is_settled
    assert RematSearch.begin(("none", "full"), 30, SIZES, "gone").first == "none"


# Of three layers, each takes a third of what a policy takes more. A policy for some layers leaves
# 4% of the memory free. -> the policies that are compiled, and the one that the search ends with.
COUNTED = {
    "one layer": (19, "projections", ["projections", "products:1"], "products:1"),
    "two layers at most": (22, "projections", ["projections", "products:2"], "products:2"),
    "no layer": (17, "projections", ["projections"], "projections"),
    "below one that does not fit": (
        19,
        "products",
        ["products", "projections", "products:1"],
        "products:1",
    ),
    "more than expected": (18, "projections", ["projections", "products:1"], "projections"),
    "after one with much room": (14, "offload", ["offload", "full", "attention:2"], "attention:2"),
    "not of none": (24, "products", ["products"], "products"),
}


@pytest.mark.parametrize("name", COUNTED)
def test_as_many_layers_as_fit_have_the_faster_policy(name):
    capacity, first, compiled, remat = COUNTED[name]
    sizes = SIZES | {"products:1": 17 if name != "more than expected" else 19}
    sizes |= {"products:2": 19, "attention:2": 11}
    search = RematSearch.begin(LADDER, capacity, SIZES, n_layers=3)
    search = dataclasses.replace(search, first=first)
    compile_rung, _ = compiler(sizes)
    lines = []
    attempts = search.run(lambda remat: compile_rung(remat, capacity), lines.append)
    assert [attempt.remat for attempt in attempts] == compiled
    assert search.best(attempts).remat == remat
    assert [attempt.step for attempt in attempts if attempt.step] == [f"step of {remat}"]
    line = search.describe(attempts)
    if ":" in compiled[-1]:
        assert "leaves memory for some layers" in lines[-1]
    if remat == "products:1":
        assert "products:1 (the policy of 1 layers; the others have projections)" in line


def test_a_number_of_layers_is_not_sought_after_a_slow_compilation_or_a_settled_search():
    search = RematSearch.begin(LADDER, 19, SIZES, n_layers=3)
    slow = Attempt(remat="projections", size=15, refused=False, seconds=SLOW)
    soon = dataclasses.replace(slow, seconds=1.0)
    assert search.next_remat([soon]) == "products:1" and search.next_remat([slow]) is None
    unknown = dataclasses.replace(search, capacity=None)
    assert unknown.next_remat([dataclasses.replace(soon, remat="full")]) is None
    settled = RematSearch.begin(LADDER, 20, SIZES, "products:1", n_layers=3)
    assert settled.first == "products:1" and settled.is_settled
    fits = Attempt(remat="products:1", size=17, refused=False, seconds=1.0)
    assert settled.next_remat([fits]) is None
    # Where it no longer fits, all layers have the leaner policy.
    assert settled.next_remat([dataclasses.replace(fits, size=21)]) == "projections"


def test_models_whose_layers_are_one_stack_have_policies_for_some():
    assert countable_layers(tiny.config("llama with biases")) == 3
    assert countable_layers(tiny.config("mixtral")) == 0
    assert countable_layers(GPT2Config(num_hidden_layers=4)) == 4
    assert countable_layers(object()) == 0


def test_policies_that_differ_on_a_platform():
    assert rungs_for("tpu", "splash") == rungs_for("gpu", "flash") == LADDER
    assert rungs_for("gpu", "cudnn") == ("none", "products", "projections", "full", "offload")
    assert rungs_for("cpu", "blockwise") == ("none", "full")


def test_expected_bytes_are_those_of_the_layers_products():
    """By hand: of a token, q 4 x 8 and k, v 2 x 8 each, o 24; gate and up 40 each, down 24."""
    config = DecoderConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 64,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
    )
    layers = 3
    shapes = {
        "q_proj": (24, 32),
        "k_proj": (24, 16),
        "v_proj": (24, 16),
        "o_proj": (32, 24),
    }
    mlps = {"gate_proj": (24, 40), "up_proj": (24, 40), "down_proj": (40, 24)}

    def tree(sizes):
        return {
            name: {"kernel": jax.ShapeDtypeStruct((layers, *shape), jnp.float32)}
            for name, shape in sizes.items()
        }

    params = {"model": {"layers": {"self_attn": tree(shapes), "mlp": tree(mlps)}}}
    sizes = expected_bytes(config, params, kinds(config), tokens=10, itemsize=2, arguments=1000)
    attention, mlp, stream = 32 + 16 + 16 + 24, 40 + 40 + 24, 24
    down = 24  # which no policy but "none" keeps
    a_layer = 2 * 2 * (attention + mlp + stream)
    per_token = {
        "none": layers * (stream + 2 * (attention + mlp + stream)) + a_layer,
        "products": layers * (stream + attention + mlp - down + stream) + a_layer,
        "projections": layers * (stream + attention + stream) + a_layer,
        "attention": layers * (stream + stream) + a_layer,
        "full": layers * stream + a_layer,
        "offload": a_layer,
    }
    assert sizes == {remat: 1000 + 10 * 2 * width for remat, width in per_token.items()}


def test_only_exhausted_memory_is_a_refusal():
    assert is_refusal(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory"))
    assert not is_refusal(jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes"))


def test_bytes_of_a_step_are_its_arguments_and_what_it_computes_with():
    x = jnp.ones((64, 64))
    size = step_bytes(jax.jit(lambda x: jnp.tanh(x @ x) @ x).lower(x).compile())
    assert 2 * x.nbytes <= size <= 5 * x.nbytes
