"""Of an engine of several nodes: what vLLM is told, and that nothing of it listens beyond one address."""

import socket
import subprocess
import sys

import pytest

from mooncake.core.errors import ConfigError
from mooncake.core.options import FollowerOptions, WorkerOptions
from mooncake.worker import nodes
from mooncake.worker.engine import engine_arguments
from mooncake.worker.spec import EngineSpec, NodeSpec

SPEC = EngineSpec(instance_id="i", role="both", epoch="e", run_dir="/r", model="m")
FIRST = NodeSpec(count=2, rank=0, address="127.0.0.1", leader="127.0.0.1", port=1234)
LEADER = WorkerOptions(metadata="tcp://127.0.0.1:1", use_pool=False, nodes=2)
FOLLOWER = FollowerOptions(leader="127.0.0.1:7710", node_rank=1)
SECRET = "a secret of sixteen bytes"


@pytest.fixture
def secret(monkeypatch):
    from mooncake.core.secret import cluster_secret

    cluster_secret.cache_clear()
    monkeypatch.setenv("MOONCAKE_SECRET", SECRET)
    monkeypatch.delenv("MOONCAKE_SECRET_FILE", raising=False)
    yield
    cluster_secret.cache_clear()


class TestArguments:
    def test_an_engine_of_one_node_is_told_nothing_of_nodes(self):
        words = engine_arguments(SPEC)
        assert not [word for word in words if "node" in word or "master" in word]

    def test_every_node_is_told_its_place_and_the_users_words_come_last(self):
        place = NodeSpec(count=2, rank=1, address="10.0.0.2", leader="10.0.0.1", port=1234)
        spec = EngineSpec(**{**SPEC_FIELDS, "nodes": place, "vllm_args": ["--tensor-parallel-size=2"]})
        words = engine_arguments(spec)
        assert {
            "--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1",
            "--master-port=1234", "--worker-extension-cls=mooncake.worker.rank.Rank",
        } <= set(words)  # fmt: skip
        assert words[-1] == "--tensor-parallel-size=2"


SPEC_FIELDS = {name: getattr(SPEC, name) for name in SPEC.__struct_fields__}


class TestSockets:
    def test_vllm_is_held_to_the_interface_of_the_address(self):
        found = nodes.environment(FIRST, {})
        assert found["VLLM_HOST_IP"] == "127.0.0.1"
        assert found["GLOO_SOCKET_IFNAME"] == "lo"
        assert found["NCCL_SOCKET_IFNAME"] == "=lo"

    def test_what_the_operator_says_wins(self):
        assert "NCCL_SOCKET_IFNAME" not in nodes.environment(FIRST, {"NCCL_SOCKET_IFNAME": "ib0"})

    def test_an_address_of_another_host_is_refused(self):
        with pytest.raises(ConfigError, match=r"address = '192\.0\.2\.1'"):
            nodes.interface_of("192.0.2.1")

    def test_torchs_store_listens_on_one_address_and_serves(self):
        """By itself it listens on every address of the host, whatever it is told."""
        code = """
import importlib, sys
from datetime import timedelta
from mooncake.worker.nodes import bind_rendezvous, free_port
if sys.argv[1] == "bound":
    bind_rendezvous()
rendezvous = importlib.import_module("torch.distributed.rendezvous")
port = free_port("127.0.0.1")
store = rendezvous._create_c10d_store("127.0.0.1", port, 0, 1, timedelta(seconds=30))
other = rendezvous._create_c10d_store("127.0.0.1", port, 1, 1, timedelta(seconds=30))
store.set("key", "value")
print(port, other.get("key").decode(), flush=True)
sys.stdin.read()
"""
        assert self._listens(code, "bound") == {"0100007F"}  # 127.0.0.1, as the kernel writes it
        assert self._listens(code, "as it is") != {"0100007F"}, "torch does it by itself now: no patch needed"

    @staticmethod
    def _listens(code: str, mode: str) -> set[str]:
        """Return the addresses at which the child's port is listened to."""
        child = subprocess.Popen(
            [sys.executable, "-c", code, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with child:
            port, value = child.stdout.readline().split()
            assert value == "value"
            found = set()
            for table in ("tcp", "tcp6"):
                with open(f"/proc/net/{table}") as lines:
                    rows = [line.split() for line in lines][1:]
                    found |= {
                        row[1].partition(":")[0]
                        for row in rows
                        if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == int(port)
                    }
            child.stdin.close()
        return found

    def test_a_free_port_can_be_listened_to_at_once(self):
        port = nodes.free_port("127.0.0.1")
        with nodes.listener("127.0.0.1", port) as listening:
            assert listening.getsockname() == ("127.0.0.1", port)
            with socket.create_connection(("127.0.0.1", port), timeout=5.0):
                pass


class TestOptions:
    def test_an_engine_of_several_nodes_has_no_pool(self):
        LEADER.checked()
        with pytest.raises(
            ConfigError, match=r"an engine of 2 nodes cannot share KV blocks yet: say --no-pool"
        ):
            LEADER.replace(use_pool=True).checked()

    @pytest.mark.parametrize("word", ["--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--headless"])
    def test_vllms_own_words_for_nodes_are_refused(self, word: str):
        with pytest.raises(ConfigError, match=r"say --nodes, and start `mooncake follower`"):
            LEADER.replace(vllm_args=[word]).checked()

    @pytest.mark.usefixtures("secret")
    def test_beyond_loopback_somebody_has_to_accept_that_ranks_prove_nothing(self):
        told = "--accept-unauthenticated-nodes"
        for options in (
            LEADER.replace(address="10.0.0.1"),
            FOLLOWER.replace(address="10.0.0.2"),
            FOLLOWER.replace(leader="engine-0.engine:7710"),
        ):
            with pytest.raises(ConfigError, match=told):
                options.checked()
            options.replace(accept_unauthenticated_nodes=True).checked()

    def test_beyond_loopback_our_own_link_needs_the_secret_whatever_is_accepted(self, monkeypatch):
        from mooncake.core.secret import cluster_secret

        for name in ("MOONCAKE_SECRET", "MOONCAKE_SECRET_FILE"):
            monkeypatch.delenv(name, raising=False)
        cluster_secret.cache_clear()
        for options in (LEADER.replace(address="10.0.0.1"), FOLLOWER.replace(leader="10.0.0.1:7710")):
            with pytest.raises(ConfigError, match="MOONCAKE_SECRET_FILE"):
                options.replace(accept_unauthenticated_nodes=True).checked()

    def test_an_engine_of_one_node_accepts_nothing(self):
        LEADER.replace(nodes=1, use_pool=True).checked()
