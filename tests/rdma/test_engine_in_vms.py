"""Two hosts, two cables: RDMA over one, TCP over the other, and one end of the RDMA cable pulled."""

import pytest

from tests.rdma import vm
from tests.rdma.guest_engine import CHECKS, PORT

pytestmark = pytest.mark.rdma

TIMEOUT_S = 280.0
"""50 s on idle cores."""
SCRIPT = """ip link set eth1 up && ip addr add 10.0.1.{end}/24 dev eth1 || exit 98
{python} -u tests/rdma/guest_engine.py {args}"""


@pytest.fixture(scope="module")
def verdicts():
    if reason := vm.missing():
        pytest.skip(reason)
    owner, initiator = vm.run_two_guests(
        SCRIPT.format(end=1, python=vm.PYTHON, args="owner 10.0.1.1"),
        SCRIPT.format(end=2, python=vm.PYTHON, args=f"initiator 10.0.1.2 10.0.1.1:{PORT}"),
        cables=2,
        timeout_s=TIMEOUT_S,
    )
    print(owner.output, initiator.output)
    lines = [
        line.split(maxsplit=3) for line in initiator.output.splitlines() if line[:5] in ("PASS ", "FAIL ")
    ]
    assert lines, initiator.output + owner.output
    return {check: (verdict, detail) for verdict, _, check, detail in lines}


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_two_hosts(verdicts, check):
    assert check in verdicts, "the guests did not get that far"
    verdict, detail = verdicts[check]
    assert verdict == "PASS", detail
