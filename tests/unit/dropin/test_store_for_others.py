"""What other projects' integrations rely on beyond signatures and codes."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from mooncake.dropin.store.settings import Settings
from mooncake.store import MooncakeDistributedStore
from tests.unit.dropin.conftest import MasterThread, client

REQUIRED = {"local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE"}


def test_the_dict_of_setup_may_use_lmcaches_names() -> None:
    theirs = {**REQUIRED, "master_server_address": "10.0.0.1:50051", "device_name": "mlx5_0"}
    ours = {**REQUIRED, "master_server_addr": "10.0.0.1:50051", "rdma_devices": "mlx5_0"}
    assert Settings.of(theirs) == Settings.of(ours)


def test_the_documented_name_wins_over_the_other_one_whatever_comes_first() -> None:
    both = {"master_server_addr": "127.0.0.1:1", "master_server_address": "127.0.0.2:2"}
    for values in (both, dict(reversed(both.items()))):
        assert Settings.of({**REQUIRED, **values}).master == "tcp://127.0.0.1:1"


def test_a_master_under_lmcaches_name_is_the_one_that_is_joined(
    master: MasterThread, join: Callable[..., MooncakeDistributedStore]
) -> None:
    reader = join()
    store = MooncakeDistributedStore()
    theirs = {"global_segment_size": "8388608", "device_name": "", "master_server_address": master.address}
    assert store.setup({**REQUIRED, **theirs}) == 0
    assert store.put("by another name", b"value") == 0
    assert reader.get("by another name") == b"value"
    store.close()


UNCLOSED = """
import sys
from mooncake.store import MooncakeDistributedStore

stores = []
for _ in range(3):
    stores.append(MooncakeDistributedStore())
    assert stores[-1].setup("127.0.0.1", "P2PHANDSHAKE", 8 << 20, 0, "tcp", "", sys.argv[1]) == 0
assert stores[0].put("unclosed", b"value") == 0
print(stores[1].get("unclosed").decode())
"""


def test_a_program_that_closes_nothing_ends_quietly_and_takes_its_segments_with_it(
    master: MasterThread, join: Callable[..., MooncakeDistributedStore]
) -> None:
    program = [sys.executable, "-c", UNCLOSED, master.address]
    ended = subprocess.run(program, check=False, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "value\n")
    assert "Traceback" not in ended.stderr
    store = join(0)
    assert store.is_exist("unclosed") == 0


def test_a_master_that_is_to_listen_everywhere_without_a_secret_serves_this_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MOONCAKE_SECRET", "MOONCAKE_SECRET_FILE"):
        monkeypatch.delenv(name, raising=False)
    everywhere = {"rpc_address": "0.0.0.0", "metrics_host": "0.0.0.0", "http_metadata_server_host": "0.0.0.0"}
    master = MasterThread(enable_http_metadata_server=True, http_metadata_server_port=0, **everywhere)
    try:
        assert master.address.startswith("127.0.0.1:")
        assert master.url.startswith("http://127.0.0.1:")
        store = client(master)
        assert store.put("from this host", b"value") == 0
        store.close()
    finally:
        master.stop()
