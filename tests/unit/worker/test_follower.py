"""Leader and follower as processes see each other: who waits, who ends, and that everything does."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from mooncake.core.errors import ConfigError, PeerTimeout
from mooncake.core.options import FollowerOptions, WorkerOptions
from mooncake.worker import follower as follower_module
from mooncake.worker import roster
from mooncake.worker.leader import Leader, leading
from mooncake.worker.spec import EngineSpec, NodeSpec
from tests.integration.ports import lasting_port

WAIT_S = 30.0
SILENT_S = 3.0
"""Instead of ten: tests wait for it."""
FOLLOWER = """
import sys
from mooncake.core.options import FollowerOptions
from mooncake.worker import follower, launch
from mooncake.up.launch import guarded
import os, subprocess
ENGINE = '''
import signal, sys, time
from mooncake.core.process import set_parent_death_signal
set_parent_death_signal(int(sys.argv[2]))  # as every engine
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(0))
from pathlib import Path
Path(sys.argv[1], "facts.json").write_text("{}")
time.sleep(60)
'''
def start(spec):  # an engine that loads at once, and has no ranks
    child = subprocess.Popen([sys.executable, "-c", ENGINE, spec.run_dir, str(os.getpid())])
    child.returncode = 0
    return launch.EngineProcess(child.pid)
follower.start_engine = start
follower.SILENT_S = float(sys.argv[2])
options = FollowerOptions.decoded(sys.argv[1].encode())
sys.exit(guarded("follower", options, lambda: follower.main(options)))
"""


class Pair:
    """A leader in this process, a follower as a process; the engine of the leader is what tests say."""

    def __init__(self, folder: Path) -> None:
        self.port, self.admin = lasting_port(), lasting_port()
        self.options = WorkerOptions(
            metadata="tcp://127.0.0.1:1", use_pool=False, nodes=2, nodes_port=self.port, join_s=WAIT_S,
            instance_id="engine", model=str(folder),
        )  # fmt: skip
        self.follower = FollowerOptions(
            leader=f"127.0.0.1:{self.port}", node_rank=1, admin_port=self.admin, run_dir=str(folder),
            join_s=WAIT_S,
        )  # fmt: skip
        place = NodeSpec(count=2, rank=0, address="127.0.0.1", leader="127.0.0.1", port=1)
        self.spec = EngineSpec(
            instance_id="engine", role="both", epoch="e", run_dir="", model=str(folder), nodes=place
        )
        self.leader = Leader(self.options)
        self.drained = threading.Event()
        self.lost: list[str] = []
        self.leaves: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start_follower(self, **changes) -> None:
        words = self.follower.replace(**changes).encoded().decode()
        self.process = subprocess.Popen([sys.executable, "-c", FOLLOWER, words, str(SILENT_S)])

    def lead(self) -> None:
        self.leader.lead(self.spec, self.drained.is_set, self.lost.append, self.leaves.append)

    def code(self) -> int:
        assert self.process is not None
        return self.process.wait(WAIT_S)

    def page(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}{path}", timeout=5.0) as answer:
                return answer.status, answer.read().decode().strip()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode().strip()
        except OSError:
            return 0, ""

    def wait(self, what, *arguments, until) -> None:
        end_s = time.monotonic() + WAIT_S
        while not until(found := what(*arguments)):
            assert time.monotonic() < end_s, found
            time.sleep(0.05)

    def serve(self) -> None:
        """Return when both serve."""
        self.leader.start()
        self.start_follower()
        self.leader.gather()
        self.lead()
        self.wait(self.page, "/readyz", until=lambda found: found == (200, "ready"))

    def close(self) -> None:
        self.leader.close()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(5.0)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.delenv("MOONCAKE_ADMIN_TOKEN", raising=False)
    monkeypatch.setattr(roster, "SILENT_S", SILENT_S)
    pair = Pair(tmp_path)
    yield pair
    pair.close()


def test_a_leader_without_followers_says_which_and_what_to_start():
    options = WorkerOptions(
        metadata="tcp://127.0.0.1:1", use_pool=False, nodes=3, nodes_port=lasting_port(), join_s=1.0
    )
    with pytest.raises(PeerTimeout, match=r"no follower 1, 2 after 1 s: start `mooncake follower --leader="):  # noqa: SIM117
        with leading(options):
            raise AssertionError("it led nobody")


def test_an_engine_of_one_node_has_no_leader():
    with leading(WorkerOptions(metadata="tcp://127.0.0.1:1")) as leader:
        assert leader is None


def test_a_port_that_is_taken_is_told_by_name(pair: Pair):
    pair.leader.start()
    with pytest.raises(ConfigError, match=f"nodes_port = {pair.port}: cannot listen there"):
        Leader(pair.options).start()


def test_a_follower_without_a_leader_says_so_and_ends(pair: Pair, tmp_path):
    options = pair.follower.replace(join_s=1.0, admin_port=0)
    with pytest.raises(PeerTimeout, match=rf"leader 127\.0\.0\.1:{pair.port}: nothing to do after 1 s"):
        follower_module.main(options)


def test_a_follower_of_a_rank_that_is_not_there_ends_with_a_usage_error(pair: Pair):
    pair.leader.start()
    pair.start_follower(node_rank=5)
    assert pair.code() == 2


def test_a_follower_is_ready_when_its_ranks_are_and_not_before_there_is_an_order(pair: Pair):
    pair.leader.start()
    pair.start_follower()
    pair.leader.gather()
    pair.wait(pair.page, "/livez", until=lambda found: found == (200, "alive"))
    assert pair.page("/startupz")[0] == 503
    pair.lead()
    pair.wait(pair.page, "/readyz", until=lambda found: found == (200, "ready"))
    assert pair.page("/startupz")[0] == 200


def test_a_leader_that_stops_takes_its_follower_along_and_that_one_ends_well(pair: Pair):
    pair.serve()
    pair.leader.release(failed=False)
    assert pair.code() == 0
    assert not pair.lost


def test_an_engine_that_died_on_the_leader_ends_the_follower_which_says_so(pair: Pair):
    pair.serve()
    pair.leader.release(failed=True)
    assert pair.code() == 69


def test_a_leader_that_is_gone_without_a_word_ends_the_follower(pair: Pair):
    pair.serve()
    pair.leader.close()  # nobody answers any more
    assert pair.code() == 69


def test_a_leader_that_is_back_at_once_does_not_take_ranks_of_the_engine_before(pair: Pair):
    pair.serve()
    pair.leader.close()
    pair.leader = Leader(pair.options)
    pair.leader.start()
    assert pair.code() == 69


def test_a_follower_that_is_killed_is_lost_to_the_leader(pair: Pair):
    pair.serve()
    pair.process.kill()
    pair.wait(lambda: pair.lost, until=bool)
    assert pair.lost == [f"follower 1 has been silent for {SILENT_S:g} s"]


def test_ranks_that_end_are_told_to_the_leader_at_once(pair: Pair):
    pair.serve()
    (child,) = children(pair.process.pid)
    os.kill(child, signal.SIGKILL)
    assert pair.code() == 1
    pair.wait(lambda: pair.lost, until=bool)
    assert pair.lost == ["follower 1 lost its ranks, code -9"]


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_follower_that_is_told_to_go_waits_until_the_leader_has_drained(pair: Pair):
    pair.serve()
    pair.process.send_signal(signal.SIGTERM)
    pair.wait(lambda: pair.leaves, until=bool)
    assert pair.leaves[0] == "follower 1 was told to go"
    assert pair.page("/readyz") == (503, "draining: SIGTERM")
    with contextlib.suppress(subprocess.TimeoutExpired):
        pair.process.wait(1.5)
    assert pair.process.poll() is None, "it did not wait"
    pair.drained.set()
    assert pair.code() == 0
    pair.wait(lambda: pair.lost, until=bool)
    assert pair.lost == ["follower 1 was told to go"]


def test_a_second_signal_ends_a_follower_at_once(pair: Pair):
    pair.serve()
    for _ in range(2):
        pair.process.send_signal(signal.SIGTERM)
        pair.wait(pair.page, "/readyz", until=lambda found: found[0] != 200)
    assert pair.code() == 0


def test_a_drain_of_a_follower_drains_the_leader_and_is_done_when_that_is(pair: Pair):
    pair.serve()
    url = f"http://127.0.0.1:{pair.admin}/drain"

    def state() -> str:
        with urllib.request.urlopen(url, timeout=5.0) as answer:
            return json.load(answer)["state"]

    with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=5.0) as answer:
        assert json.load(answer) == {"state": "draining", "in_flight": 1}
    pair.wait(lambda: pair.leaves, until=bool)
    pair.drained.set()
    pair.wait(state, until=lambda found: found == "drained")
    assert pair.process.poll() is None, "it was not told to end"
    pair.process.terminate()
    assert pair.code() == 0


def test_a_follower_that_starts_again_ends_the_engine_and_joins_the_next_one(pair: Pair):
    pair.serve()
    pair.process.kill()
    pair.process.wait(5.0)
    pair.start_follower()
    pair.wait(lambda: pair.lost, until=bool)
    pair.leader.release(failed=True)
    pair.leader.close()
    pair.leader, pair.lost = Leader(pair.options), []
    pair.leader.start()
    pair.leader.gather()
    pair.lead()
    pair.wait(pair.page, "/readyz", until=lambda found: found == (200, "ready"))
    assert not pair.lost


def test_the_order_has_nothing_of_the_leaders_own_place(pair: Pair, tmp_path):
    options = pair.follower.replace(cores=[0], threads=3, address="127.0.0.1")
    spec = follower_module.Follower(options)._own_spec(pair.spec)
    assert spec.nodes == NodeSpec(count=2, rank=1, address="127.0.0.1", leader="127.0.0.1", port=1)
    assert (spec.cores, spec.threads) == ([0], 3)
    assert Path(spec.run_dir).parent == tmp_path


def test_a_model_that_is_not_on_this_node_is_told(pair: Pair):
    order = EngineSpec(
        **{**{n: getattr(pair.spec, n) for n in pair.spec.__struct_fields__}, "model": "/not/here"}
    )
    with pytest.raises(ConfigError, match=r"model = '/not/here': no such folder here, only on the leader"):
        follower_module.Follower(pair.follower)._own_spec(order)
