"""Both verbs backends keep their promises on a real device: one VM for each alone, two for them together."""

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.rdma import guest_pair, guest_verbs, vm

PYVERBS = Path("/usr/lib/python3/dist-packages/pyverbs")
BACKENDS = ("ibverbs", "pyverbs")

pytestmark = pytest.mark.rdma


def why_not() -> str:
    if importlib.util.find_spec("ibverbs") is None:
        return "no ibverbs wheel: pip install ibverbs"
    if not PYVERBS.is_dir() or sys.version_info[:2] != (3, 11):
        return "no pyverbs for this Python: run scripts/rdma-parts on Debian 12, with Python 3.11"
    return vm.missing()


def verdicts(output: str) -> dict[tuple[str, str], str]:
    """Collect "PASS|FAIL subject check rest" lines: (subject, check) -> line."""
    lines = [line.split(" ", 3) for line in output.splitlines() if line.startswith(("PASS ", "FAIL "))]
    return {(words[1], words[2]): " ".join(words) for words in lines}


@pytest.fixture(scope="module")
def alone() -> vm.GuestResult:
    if reason := why_not():
        pytest.skip(reason)
    commands = [f"{vm.PYTHON} tests/rdma/guest_verbs.py {backend}" for backend in BACKENDS]
    return vm.run_guest("; ".join(commands), timeout_s=400)


@pytest.fixture(scope="module")
def together() -> vm.GuestResult:
    if reason := why_not():
        pytest.skip(reason)
    program = f"{vm.PYTHON} tests/rdma/guest_pair.py"
    server, client = vm.run_two_guests(
        f"{program} server pyverbs", f"{program} client ibverbs {vm.ADDRESSES[0]}", timeout_s=400
    )
    return vm.GuestResult(client.rc, server.output + client.output, client.console, client.seconds)


@pytest.mark.parametrize("check", [check.__name__ for check in guest_verbs.CHECKS])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_keeps_its_promise(alone: vm.GuestResult, backend: str, check: str):
    verdict = verdicts(alone.output).get(
        (backend, check), f"not reached: {alone.output[-2000:]}{alone.console}"
    )
    assert verdict.startswith("PASS"), verdict


@pytest.mark.parametrize("check", [check.__name__ for check in guest_pair.CHECKS])
def test_the_backends_work_together_between_machines(together: vm.GuestResult, check: str):
    verdict = verdicts(together.output).get(("pair", check), f"not reached: {together.output[-2000:]}")
    assert verdict.startswith("PASS"), verdict
