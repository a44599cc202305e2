"""What strangers meet on GitHub: the workflow runs each stage, and forms ask for reports."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
GITHUB = ROOT / ".github"


def test_the_workflow_runs_each_stage():
    workflow = yaml.safe_load((GITHUB / "workflows/tests.yml").read_text())
    job = workflow["jobs"]["stage"]
    stages = re.findall(r"^stage_(\w+)\(\)", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert sorted(job["strategy"]["matrix"]["stage"]) == sorted(stages)
    steps = job["steps"]
    assert steps[-1]["run"] == '.ci/run "$STAGE"'
    # An action by a name may become another action.
    actions = [step["uses"] for step in steps if "uses" in step]
    assert actions and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in actions)


def test_forms_ask_for_what_our_commands_print():
    def fields(name):
        form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / name).read_text())
        return {field["id"]: field["attributes"] for field in form["body"]}

    assert "lora-jax doctor --json" in fields("problem.yml")["doctor"]["description"]
    device = fields("device.yml")
    assert device["check"]["label"] == "check.json"
    assert "lora-jax check" in device["table"]["description"]
