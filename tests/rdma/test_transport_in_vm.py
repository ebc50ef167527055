"""The RDMA transport over a real kernel's verbs: one VM, all checks of guest_transport.py."""

import pytest

from tests.rdma import vm

pytestmark = pytest.mark.rdma

TIMEOUT_S = 280.0
"""25 s on idle cores, 120 s on busy ones."""


@pytest.fixture(scope="module")
def verdicts():
    if reason := vm.missing():
        pytest.skip(reason)
    result = vm.run_guest(f"{vm.PYTHON} -u tests/rdma/guest_transport.py ibverbs", timeout_s=TIMEOUT_S)
    print(result.output)
    lines = [line.split(maxsplit=3) for line in result.output.splitlines() if line[:5] in ("PASS ", "FAIL ")]
    assert lines, result.console
    return {check: (verdict, detail) for verdict, _, check, detail in lines}


@pytest.mark.parametrize(
    "check",
    [
        "bytes_move_both_ways",
        "a_wrong_key_is_refused_and_the_rest_is_moved",
        "a_queue_pair_killed_in_the_middle_costs_a_reconnection",
        "memory_unregistered_in_the_middle_is_refused",
        "after_a_cancelled_write_nothing_lands",
        "a_cap_of_two_endpoints_serves_four_peers",
        "an_owner_that_evicts_is_connected_to_again",
        "two_rails_share_the_bytes",
        "a_rail_that_is_down_is_left_out",
    ],
)
def test_on_a_real_device(verdicts, check):
    assert check in verdicts, "the guest did not get that far"
    verdict, detail = verdicts[check]
    assert verdict == "PASS", detail
