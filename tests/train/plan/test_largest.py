"""The longest row and the largest batch: found in few compilations, and as asked."""

import json
from types import SimpleNamespace

import pytest

from tests.train.plan.tiny_plans import FIELDS, write
from train.plan import __main__ as plan
from train.plan.__main__ import find_largest_fit
from train.plan.gpus import CARDS
from train.plan.machines import find_machine

CAPACITY = 10_000.0
# What a step needs by its size: a line, one with steps, a curve; None where the compiler refuses.
NEEDS = {
    "a line": lambda n: 500 + 3 * n,
    "in steps": lambda n: 500 + 3 * (n - n % 64),
    "a curve": lambda n: 500 + n * n / 300,
    "refusals without a number": lambda n: 500 + 3 * n if 500 + 3 * n <= CAPACITY else None,
    "all is refused": lambda n: None,
    "all fits": lambda n: 5,
}


@pytest.mark.parametrize("first", [16, 300, 1000, 8192])
@pytest.mark.parametrize("name", NEEDS)
def test_the_largest_size(name, first):
    asked = []

    def plan_of(size):
        assert size % 16 == 0 and size not in asked
        asked.append(size)
        total = NEEDS[name](size)
        fits = total is not None and total <= CAPACITY
        memory = {"total": total, "capacity": CAPACITY}
        return SimpleNamespace(per_chip_bytes=memory, fits_share={"1": fits})

    found = find_largest_fit(plan_of, first, unit=16, size_limit=5000, share=1.0)
    sizes = [n for n in range(16, 5001, 16) if (NEEDS[name](n) or CAPACITY + 1) <= CAPACITY]
    want = max(sizes, default=None)
    assert found == want or (found and want - want / 32 - 16 <= found <= want)
    assert len(asked) <= 12


@pytest.mark.slow
def test_a_plan_of_the_longest_row(tmp_path, capsys, monkeypatch):
    model = write(tmp_path, FIELDS | {"max_position_embeddings": 700})
    words = ["--model", model, "--batch-size", "2", "--rank", "3", "--longest", "--json"]
    plan.main([*words, "--capacity-gib", "10"])
    out, err = capsys.readouterr()
    assert json.loads(out)["largest"] == {"1": 512} and json.loads(out)["seq_len"] == 512
    assert "compiled" not in err, "the plan of that length is not made again"
    assert "the largest size that fits: 512 tokens per row (the model's limit)" in err
    memory = {"total": None, "capacity": 1}
    refused = SimpleNamespace(per_chip_bytes=memory, fits_share={"1": False}, failed=None)
    refused.compile_seconds = 0
    monkeypatch.setattr(plan, "plan", lambda *_: refused)
    with pytest.raises(SystemExit):
        plan.main(words)
    assert "256 tokens per row, does not fit into cpu:1. Use --quantize" in capsys.readouterr().err


BAD = {
    "h99:8": "no known machine. Pass one of v5e",
    "h100": "no known machine",
    "h100:0": "Pass a number of GPUs, such as h100:8, or hosts",
    "h100:2x2x2": "Pass a number of GPUs",
    "2xh100:8": "only TPUs have slices. For 2 hosts of GPUs, pass h100:2x8",
    "2xcpu:4": "only TPUs have slices. Pass cpu:4",
    "0xv5e:4x4": "no known machine",
    "rtx4090:9999": "Pass a number of GPUs",
}


@pytest.mark.parametrize("topology", BAD)
def test_a_gpu_that_does_not_exist(topology):
    with pytest.raises(plan.UserError, match=BAD[topology]):
        find_machine(topology)
    with pytest.raises(plan.UserError, match="only applies to GPUs, but --topology is cpu:1"):
        find_machine("cpu:1", mem_fraction=0.5)


def test_cards_are_described_as_their_compiler_needs():
    """Every field once, and the capability that decides which kernels run."""
    for card in CARDS.values():
        text = card.description
        assert text.count("{") == text.count("}") and f"core_count: {card.cores}" in text
        assert f"major: {card.compute[0]} minor: {card.compute[1]}" in text
        assert ("ACCELERATED" in text) == (card.compute >= (9, 0))
