"""Alert rules: written by hand for Prometheus, wrapped for the Prometheus operator from the same text."""

import textwrap
from pathlib import Path

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yaml"
PROMETHEUS_RULE = DEPLOY / "components" / "monitoring" / "prometheusrule.yaml"
_HEAD = """\
# Made by `python -m mooncake.dashboards` from deploy/prometheus/rules.yaml: edit that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: mooncake
  namespace: mooncake
  labels: {app.kubernetes.io/name: mooncake, app.kubernetes.io/part-of: mooncake}
spec:
"""


def prometheus_rule(rules: str) -> str:
    """Return the operator's object around a file of rules."""
    groups = rules[rules.index("groups:") :]
    return _HEAD + textwrap.indent(groups, "  ")
