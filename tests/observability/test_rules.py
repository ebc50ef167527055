"""Alert rules: valid, firing when they should and silent when they should; with Prometheus' own tools."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from mooncake.dashboards.rules import RULES
from tests.observability.prometheus import NEEDS_PROMETHEUS

pytestmark = NEEDS_PROMETHEUS

FOLDER = RULES.parent
CASES = sorted((FOLDER / "tests").glob("*.yaml"))
TOOL_S = 240.0
"""A minute of CPU at most; machines are busy."""


def told(*command: str | Path) -> str:
    """Run a tool; fail with what it says."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=TOOL_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_are_valid():
    assert "SUCCESS" in told("promtool", "check", "rules", RULES)


def test_the_examples_are_valid_and_pages_go_to_the_pager():
    assert "SUCCESS" in told("promtool", "check", "config", "--syntax-only", FOLDER / "prometheus.yml")
    routing = FOLDER / "alertmanager.yml"
    told("amtool", "check-config", routing)
    for severity, receiver in (("page", "pager"), ("ticket", "tickets")):
        found = told("amtool", "config", "routes", "test", f"--config.file={routing}", f"severity={severity}")
        assert found.strip() == receiver


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(case: Path):
    told("promtool", "test", "rules", case)


def test_every_alert_has_a_case_in_which_it_fires():
    alerts = set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    fired = {name for case in CASES for name in re.findall(r'alertname="(\w+)"', case.read_text())}
    assert fired == alerts


def test_a_case_that_expects_what_does_not_happen_fails(tmp_path: Path):
    case = yaml.safe_load((FOLDER / "tests" / "engines.yaml").read_text())
    case["rule_files"] = [str(RULES)]
    case["tests"] = case["tests"][:1]
    case["tests"][0]["promql_expr_test"][-1]["exp_samples"][0]["value"] = 2
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(case))
    with pytest.raises(AssertionError, match="FAILED"):
        told("promtool", "test", "rules", tmp_path / "wrong.yaml")
