"""The time and the memory of a run beside what the compiler says: report.json, and a warning."""

import json
import types

import jax
import pytest

from tests.train.plan.test_clock import FORWARD_SCOPE, HLO
from tests.train.tiny import write_model, write_rows
from train.plan.clock.groups import BASE
from train.processes.memory import device_peak_bytes
from train.run.costs import print_costs
from train.run.log import read_metrics
from train.sft import main
from train.stages import alone, estimate, finish
from train.stages.estimate import SlowStepWarning, StepEstimate, estimate_step

TEXT = HLO.replace("COLLECTIVE", "").replace("DONE", "").replace("SCOPE", FORWARD_SCOPE)
ESTIMATE = StepEstimate(seconds=0.4, group="attention", group_seconds=0.1)


def device_of(kind, stats=None):
    return types.SimpleNamespace(device_kind=kind, platform="tpu", memory_stats=lambda: stats)


class Step:
    """A compiled step that counts how often its HLO was read."""

    def __init__(self, text=TEXT):
        self.text, self.n_reads = text, 0

    def as_text(self):
        self.n_reads += 1
        return self.text


def test_the_estimate_is_that_of_the_kind_of_tpu_and_names_the_largest_group():
    made = estimate_step(Step(), [device_of("TPU v5 lite")])
    cycles = 4 * 1050 + 7  # see test_clock.py
    assert made.seconds == pytest.approx(cycles / 1.5e9, rel=1e-12)
    assert made.group == BASE
    assert made.group_seconds == pytest.approx(4 * 1000 / 1.5e9, rel=1e-12)
    faster = estimate_step(Step(), [device_of("TPU v6 lite")])
    assert faster.seconds == pytest.approx(cycles / 1.75e9, rel=1e-12)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L4", "TPU v2"])
def test_no_hlo_is_read_where_no_time_is_estimated(kind):
    step = Step()
    assert estimate_step(step, [device_of(kind)]) is None and step.n_reads == 0


@pytest.mark.parametrize("text", [None, "no HLO", TEXT.replace("estimated_cycles", "cycles")])
def test_an_hlo_without_an_estimate_has_none(text):
    assert estimate_step(Step(text), [device_of("TPU v5 lite")]) is None


def test_a_slow_step_is_told_once():
    lines = []
    warn = SlowStepWarning(ESTIMATE, lines.append)
    warn([])
    warn([0.7, 0.8, 99.0])  # a pause of one step
    assert not lines
    warn([0.9, 0.9, 0.7])
    warn([0.9, 0.9, 0.9])
    (line,) = lines
    assert "a step takes 900 ms, but the compiler estimates 400 ms" in line
    assert "The largest part of the estimate is attention (25%)" in line
    SlowStepWarning(None, lines.append)([1e9])
    assert len(lines) == 1


def test_the_peak_is_that_of_the_fullest_device():
    full, empty = ({"peak_bytes_in_use": size} for size in (7, 5))
    assert device_peak_bytes([device_of("", empty), device_of("", full)]) == 7
    for unknown in (None, {}, {"bytes_in_use": 3}):
        assert device_peak_bytes([device_of("", full), device_of("", unknown)]) is None
    assert device_peak_bytes([]) is None
    assert device_peak_bytes(jax.devices("cpu")) is None


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model, rows = write_model(folder / "model"), write_rows(folder / "rows.jsonl")
    options = ["--batch-size", "4", "--rank", "2", "--steps", "4", "--report-to", "none"]
    return ["--model", str(model), "--dataset", str(rows), *options, "--log-every", "1"]


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_report_has_the_estimate_and_the_devices_memory(inputs, tmp_path, monkeypatch, capsys):
    tiny = ESTIMATE._replace(seconds=1e-9)
    monkeypatch.setattr(alone, "estimate_step", lambda step, devices: tiny)
    monkeypatch.setattr(finish, "device_peak_bytes", lambda devices: 3_000_000)
    main([*inputs, "--output", str(tmp_path)])
    report, shown = report_of(tmp_path), " ".join(capsys.readouterr().out.split())
    assert report["estimated_step_seconds"] == 1e-9 and report["device_peak_bytes"] == 3_000_000
    sizes = report["compiled_bytes"]
    assert report["compiled_step_bytes"] == sum(sizes.values()) - 2 * sizes["aliased"]
    assert shown.count("but the compiler estimates 1e-06 ms") == 1
    assert "step, as the compiler estimates" in shown and "3.0 MB" in shown
    assert len(read_metrics(tmp_path)) == 4  # the warning came while the log had four lines
    main([*inputs, "--output", str(tmp_path), "--resume"])  # no step is taken
    assert report_of(tmp_path) == report


def test_a_cpu_reads_no_hlo_and_reports_what_it_knows(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "hlo_text_of", lambda step: pytest.fail("the HLO was read"))
    main([*inputs, "--output", str(tmp_path)])
    report, shown = report_of(tmp_path), capsys.readouterr().out
    assert report["compiled_step_bytes"] > 0 and report["peak_bytes"] > 0
    assert "estimated_step_seconds" not in report and "device_peak_bytes" not in report
    assert "estimates" not in shown and "memory of a device" not in shown


def test_reports_of_earlier_versions_are_printed(capsys):
    from rich.console import Console

    report = {"compiled_bytes": None, "median_step_seconds": None, "compile_seconds": 1.0}
    sizes = dict.fromkeys(("peak_bytes", "adapter_bytes", "base_bytes"), 3)
    print_costs(Console(), {**report, "further_compile_seconds": 0.0, **sizes})
    assert "no step taken" in capsys.readouterr().out
