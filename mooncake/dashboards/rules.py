"""Alert rules: written by hand for Prometheus, wrapped for the Prometheus operator from the same text.

Where an alert's page is, is written into both: who is paged has the link, and may have no checkout.
"""

import re
import textwrap
from pathlib import Path

from mooncake.core.config import fail

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SITE = ROOT / "mkdocs.yml"
RUNBOOKS = "docs/runbooks/{name}.md"
"""An alert's page while nobody has said where the documentation is served: within the repository."""
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


_URL = re.compile(r"https?://[^\s\"'\\\\{}]+")
_ALERT, _RUNBOOK = re.compile(r"\s*- alert: (\w+)"), re.compile(r"(\s*runbook_url: ).*")


def runbooks_at(url: str) -> str:
    """Return the address of a page with {name} for the alert's name.

    Args:
        url: what serves `make docs`, or an address with {name}, as of a repository's viewer.

    Raises:
        ConfigError: it is no such address.
    """
    if not _URL.fullmatch(url.replace("{name}", "name")):
        advice = "write https://HOST/PATH, where pages are PATH/runbooks/NAME.html, or {name} for NAME"
        raise fail("runbooks", url, advice)
    return url if "{name}" in url else f"{url.rstrip('/')}/runbooks/{{name}}.html"


def site_runbooks(mkdocs: str) -> str | None:
    """Return the address of an alert's page on the site of an mkdocs.yml; None: it says no site_url."""
    found = re.search(r"^site_url:\s*[\"']?([^\s\"'#]+)", mkdocs, re.MULTILINE)
    return runbooks_at(found[1]) if found else None


def with_runbooks(rules: str, page: str) -> str:
    """Return a file of rules in which each alert's runbook_url is `page` with its name."""
    lines, name = [], ""
    for line in rules.splitlines():
        if found := _ALERT.match(line):
            name = found[1]
        found = _RUNBOOK.match(line)
        lines.append(found[1] + page.replace("{name}", name) if found else line)
    return "\n".join(lines) + "\n"


def prometheus_rule(rules: str) -> str:
    """Return the operator's object around a file of rules."""
    groups = rules[rules.index("groups:") :]
    return _HEAD + textwrap.indent(groups, "  ")
