import json
import math

import pytest

from tests.train.compare.made_up import example
from train.compare.result import JSON, read, write
from train.console.errors import UserError


def test_a_comparison_survives_its_file(tmp_path):
    comparison = example()
    write(comparison, tmp_path)
    again = read(tmp_path)
    # NaN is unlike itself, so the one that the example has is compared by its text.
    assert repr(again) == repr(comparison)
    assert again.latencies == comparison.latencies and again.rungs == comparison.rungs
    assert any(math.isnan(point.value) for run in again.runs for point in run.losses)
    text = (tmp_path / JSON).read_text()
    content = json.loads(text, parse_constant=pytest.fail)  # NaN bare is no JSON
    assert content["runs"][0]["arm"]["targets"] == ["q_proj", "v_proj"]
    assert content["runs"][0]["losses"][0] == {"step": 20, "value": again.runs[0].losses[0].value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda c: c["runs"][3]["arm"].update(rank="8"),
            r"runs\[3\].arm.rank is .*must be an integer",
        ),
        (lambda c: c["runs"][3].update(status="lost"), r"runs\[3\].status is .*must be 'done' or"),
        (
            lambda c: c["runs"][0]["losses"].append([1, 2.0]),
            r"runs\[0\].losses\[10\] is .*must be an o",
        ),
        (lambda c: c["facts"].pop("model"), "facts.model is missing"),
        (lambda c: c["facts"].update(colour="red"), "facts.colour is no field of ComparisonFacts"),
        (
            lambda c: c["facts"]["versions"].update(jax=1),
            r"facts.versions\['jax'\] is 1, but it must be a str",
        ),
        (
            lambda c: c["rungs"][0]["kept"][0].pop(),
            r"rungs\[0\].kept\[0\] is .*must be a list of 2",
        ),
        (
            lambda c: c["runs"][0].update(steps=True),
            r"runs\[0\].steps is true, .*must be an integer",
        ),
    ],
)
def test_another_shape_is_refused_by_file_and_field(tmp_path, change, said):
    write(example(), tmp_path)
    content = json.loads((tmp_path / JSON).read_text())
    change(content)
    (tmp_path / JSON).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{JSON}: {said}"):
        read(tmp_path)


def test_missing_or_broken_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / JSON).write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read(tmp_path)
    (tmp_path / JSON).write_text("[]")
    with pytest.raises(UserError, match="the content is .* must be an object"):
        read(tmp_path)
