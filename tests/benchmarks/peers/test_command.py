"""The command on tiny models, end to end: its structure, and the refusal of other computations."""

import argparse
import json

import pytest

from tests.benchmarks import __main__ as command
from tests.benchmarks.peers import measure, table
from tests.benchmarks.peers.cases import CASES
from tests.benchmarks.peers.contenders import CONTENDERS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict]:
    """(exit code, results) of lora_jax, naive merging, and full fine-tuning with another alpha."""
    file = tmp_path_factory.mktemp("benchmarks") / "results.json"
    arguments = "--tiny --device cpu --cases 4x128 --contenders naive full --spoil full --rounds 2"
    code = command.main([*arguments.split(), "--json", str(file)])
    return code, json.loads(file.read_text())


@pytest.mark.slow
def test_ratios_of_who_computes_the_same(run) -> None:
    _, results = run
    (result,) = results["cases"]
    ours, naive = result["contenders"]["lora_jax"], result["contenders"]["naive"]
    assert ours["losses"] == pytest.approx(naive["losses"], rel=1e-5)
    assert ours["losses"][1] < 0.999 * ours["losses"][0]  # it trains
    assert len(naive["ratios"]) == 2
    assert naive["ratio"]["min"] <= naive["ratio"]["median"] <= naive["ratio"]["max"]
    assert 0.5 < table.flops_ratio(result, "naive") < 1
    assert ours["process_peak"] > 1e8 and ours["temporaries"] > 0


@pytest.mark.slow
def test_another_computation_is_refused(run) -> None:
    code, results = run
    entry = results["cases"][0]["contenders"]["full"]
    assert code == 1
    assert entry["status"] == measure.REFUSED and "ratio" not in entry and not entry["seconds"]
    assert "losses" in entry["reason"]


@pytest.mark.slow
def test_the_block_between_the_markers(run, tmp_path) -> None:
    _, results = run
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.write_block(readme, table.markdown(results))
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert table.ratio(results["cases"][0]["contenders"]["naive"]) in text
    assert "refused" in text and results["machine"]["date"] in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="needs one pair"):
        table.write_block(readme, "")


def test_tokens_decoded_are_compared_too() -> None:
    ours = {"decoded": [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]}
    other = {"decoded": [[1, 2, 3, 4, 0], [6, 7, 8, 9, 0]]}  # differs later
    wrong = {"decoded": [[1, 2, 3, 0, 0], [6, 7, 8, 9, 0]]}
    case = CASES["decode-base"]
    assert measure.disagreement(case, "base", ours, "torch-base", other) == ""
    assert "88%" in measure.disagreement(case, "base", ours, "torch-base", wrong)


def test_full_fine_tuning_is_held_to_full_fine_tuning() -> None:
    found = {
        "lora_jax": {"status": measure.MEASURED, "losses": [5.0, 4.9]},
        "full": {"status": measure.MEASURED, "losses": [5.0, 4.0]},
        "torch-full": {"status": measure.MEASURED, "losses": [5.0, 4.1]},
    }
    case, torch = CASES["4x128"], found["torch-full"]
    ours = found["lora_jax"]
    assert measure.disagreement(case, "lora_jax", ours, "torch-full", torch) == ""
    assert measure._peers("torch-full", found) == ["full"]
    assert measure.disagreement(case, "full", found["full"], "torch-full", torch)


def test_what_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--cases", "4x127"],
        ["--contenders", "pefd"],
        ["--contenders", "merged", "--cases", "4x128"],  # it would have no effect
        ["--rounds", "-1"],
        ["--readme", "--tiny"],
    ):
        with pytest.raises(SystemExit):
            command.parse(arguments)
        assert arguments[1] in capsys.readouterr().err
    absent = argparse.Namespace(device="cpu", contenders=["unsloth"])
    found: dict = {}
    assert command._present(CASES["8b-2048"], absent, found) == ["lora_jax"]
    assert found["unsloth"]["reason"] == "it needs a gpu"


def test_each_contender_has_a_file_and_each_case_knows_its_contenders() -> None:
    for case in CASES.values():
        assert set(case.contenders) <= set(CONTENDERS)
        for name in case.contenders:
            file = command.ROOT / f"tests/benchmarks/peers/contenders/{CONTENDERS[name].module}.py"
            assert case.kind == "import" or file.is_file()
