"""For all tests: which run alone, a second try for those of real processes, and how much hypothesis tries."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("full", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("quick", settings.get_profile("full"), max_examples=30)
"""`make unit`; a full run has everything. On neither a slow machine is a failure."""
settings.load_profile("full")

TAIL_CHARS = 4_000
REAL = ("integration", "rdma", "chaos")
"""Not `kube`: its tests are steps of one cluster's life, and a second try would begin in the middle."""
HERE = Path(__file__).parent
PARALLEL = ("unit", "sim")
"""Folders whose tests share nothing with each other; they import no vLLM either (12 s in every process)."""


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs alone, and give tests of real processes a second try.

    On a busy machine one of these may miss a deadline. The closing line counts second tries ("1 rerun"), and
    why the first one failed is printed above it: each is looked into. Everything else has one try.
    """
    for item in items:
        real = any(item.get_closest_marker(name) for name in REAL)
        if real:
            item.add_marker(pytest.mark.flaky(reruns=1))
        if real or item.path.relative_to(HERE).parts[0] not in PARALLEL:
            item.add_marker(pytest.mark.serial)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show why a first try failed, as if there had been no second."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"first try of {report.nodeid}")
        terminalreporter.line(report.longreprtext[-TAIL_CHARS:])
