"""An engine of two nodes serves as one, and ends as one: nobody waits for a node that is gone."""

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mooncake.core.config import LOOPBACK
from mooncake.core.process import alive
from tests.integration.client import GREEDY, Client
from tests.integration.hosts import HERE, THERE, no_second_host, second_host
from tests.integration.nodes import TwoNodes
from tests.integration.reference import LENGTHS, Reference, greedy_jobs, random_prompt

pytestmark = pytest.mark.integration

NOTICED_S = 30.0
"""A follower that is gone is noticed after 10 s of silence, or with the next step."""
FEW = slice(0, 20, 3)
LOOP, APART = False, True
"""Where the nodes are: both on loopback, or on two hosts (network namespaces)."""


@pytest.fixture(scope="module")
def two(model: Path, clusters) -> Iterator[TwoNodes]:
    clusters.close()  # two cores are shared by everything
    with contextlib.ExitStack() as stack:
        two = TwoNodes(model, "" if no_second_host() else stack.enter_context(second_host()))
        stack.callback(two.stop)
        yield two


@pytest.fixture
def serving(two: TwoNodes, request: pytest.FixtureRequest) -> TwoNodes:
    """Both nodes, made anew where the last test has ended them, or had them elsewhere."""
    apart = getattr(request, "param", LOOP) and bool(two.space)
    if "leader" not in two.processes or two.apart != apart:
        two.start_engine(apart)
    two.wait_serves()
    return two


def assert_same_tokens(serving: TwoNodes, reference: Reference) -> None:
    jobs, expected = greedy_jobs()[FEW], reference.greedy("float32")[FEW]
    for length, job, wanted in zip(LENGTHS[FEW], jobs, expected, strict=True):
        answer = serving.client.complete(job["prompt"], **job["params"])
        assert answer.tokens == wanted["tokens"], f"{length} tokens"
    assert "world_size=2" in serving.log("leader"), "one rank would answer the same"


def hexed(address: str) -> str:
    """Return an IPv4 address as the kernel writes it."""
    return socket.inet_aton(address)[::-1].hex().upper()


def listening() -> dict[int, set[str]]:
    """Return the addresses at which each process here can be reached, in any network, as `hexed`."""
    inodes = {}
    for table in Path("/proc").glob("[0-9]*/net/tcp*"):
        with contextlib.suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                row = line.split()
                if row[3] == "0A":
                    inodes[f"socket:[{row[9]}]"] = row[1].partition(":")[0]
    found: dict[int, set[str]] = {}
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            name = os.readlink(entry)
        except OSError:
            continue
        if name in inodes:
            found.setdefault(int(entry.parts[2]), set()).add(inodes[name])
    return found


def test_two_nodes_answer_as_one_engine_with_one_rank(serving: TwoNodes, reference: Reference):
    assert_same_tokens(serving, reference)
    assert serving.page("follower", "/livez") == (200, "alive")


def test_nothing_of_them_listens_beyond_loopback(serving: TwoNodes):
    ours = serving.family()
    found = {pid: addresses for pid, addresses in listening().items() if pid in ours}
    assert len(found) >= 5, "leader, its engine, follower and two ranks"
    assert set.union(*found.values()) == {hexed(LOOPBACK)}, found


def test_a_killed_follower_ends_the_instance_and_its_requests_and_nothing_hangs(serving: TwoNodes):
    client = Client(serving.url, serving.client.model)
    stream = client.stream(random_prompt(100, 1), max_tokens=4000, **GREEDY)
    stream.wait_tokens(5)
    before = serving.family()
    assert len(before) >= 6, "two nodes, their engines, their ranks"
    serving.processes["follower"].kill()
    assert serving.code("leader", NOTICED_S) == 1
    assert serving.code("follower") == -signal.SIGKILL
    serving.wait("the gateway knows", lambda: "alive" not in serving.states(), NOTICED_S)
    # no other instance is there to which the stream could be moved: its client is told
    with pytest.raises(AssertionError, match=r"instance|alive|gone"):
        stream.result(NOTICED_S)
    client.close()
    serving.wait("every rank is gone", lambda: not [pid for pid in before if alive(pid)], NOTICED_S)


@pytest.mark.parametrize("serving", [APART], ids=["apart"], indirect=True)
def test_two_hosts_answer_as_one_engine_with_one_rank(serving: TwoNodes, reference: Reference):
    assert_same_tokens(serving, reference)
    found = set.union(*(listening().get(pid, set()) for pid in serving.family()))
    assert found <= {hexed(LOOPBACK), hexed(HERE), hexed(THERE)}, "each at its own address and no other"


@pytest.mark.parametrize("serving", [APART], ids=["apart"], indirect=True)
def test_a_told_leader_drains_and_takes_its_follower_along(serving: TwoNodes):
    client = Client(serving.url, serving.client.model)
    quiet = client.complete(random_prompt(60, 2), max_tokens=200, **GREEDY)
    stream = client.stream(random_prompt(60, 2), max_tokens=200, **GREEDY)
    stream.wait_tokens(3)
    serving.processes["leader"].send_signal(signal.SIGTERM)
    assert stream.result().outcome == quiet.outcome
    assert (serving.code("leader"), serving.code("follower")) == (0, 0)
    client.close()


def test_a_told_follower_has_its_leader_drain_and_both_end(serving: TwoNodes):
    client = Client(serving.url, serving.client.model)
    stream = client.stream(random_prompt(60, 3), max_tokens=200, **GREEDY)
    stream.wait_tokens(3)
    serving.processes["follower"].send_signal(signal.SIGTERM)
    assert len(stream.result().tokens) == 200
    assert (serving.code("follower"), serving.code("leader")) == (0, 0)
    assert re.search(r"drain\.begins.*follower 1|follower 1.*drain\.begins", serving.log("leader"))
    client.close()
