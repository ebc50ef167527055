"""For all tests: a second try for those of real processes, and how much hypothesis tries."""

import pytest
from hypothesis import settings

settings.register_profile("quick", max_examples=30)
"""`make unit`; a full run has everything."""

TAIL_CHARS = 4_000
REAL = ("integration", "rdma", "chaos")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests of real processes a second try: on a busy machine one of them may miss a deadline.

    The closing line counts second tries ("1 rerun"), and why the first one failed is printed above it: each
    is looked into. Everything else has one try.
    """
    for item in items:
        if any(item.get_closest_marker(name) for name in REAL):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show why a first try failed, as if there had been no second."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.section(f"first try of {report.nodeid}")
        terminalreporter.line(report.longreprtext[-TAIL_CHARS:])
