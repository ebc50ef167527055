"""What was measured on upstream's wheel (0.3.13.post1), one test for each behaviour; ours where we differ.

test_store.py and its neighbours go further into each call.
"""

import contextlib
import subprocess
import sys

import pytest

from kvstore.engine.client import PoolClient
from mooncake.core.errors import PeerError, RequestError
from mooncake.core.messages import Stats, StoreStats
from mooncake.store import MooncakeDistributedStore
from tests.unit.dropin.conftest import PATIENCE_S, MasterThread, client
from tests.unit.dropin.master_http import until

# ---------------------------------------------------------------- as upstream


def test_put_on_an_existing_key_is_0_and_the_old_value_is_kept(store) -> None:
    assert (store.put("k", b"old"), store.put("k", b"new")) == (0, 0)
    assert store.get("k") == b"old"


def test_get_of_a_missing_key_is_empty_bytes(store) -> None:
    assert store.get("missing") == b""


def test_is_exist_is_1_or_0(store) -> None:
    store.put("k", b"1")
    assert (store.is_exist("k"), store.is_exist("missing")) == (1, 0)


def test_get_size_of_a_missing_key_is_minus_704(store) -> None:
    store.put("k", b"12345")
    assert (store.get_size("k"), store.get_size("missing")) == (5, -704)


def test_remove_of_what_was_just_read_is_minus_706(store) -> None:
    store.put("k", b"1")
    store.get("k")
    assert store.remove("k") == -706
    assert store.get("k") == b"1"


def test_remove_with_force_is_0_whoever_read_it(store) -> None:
    store.put("k", b"1")
    store.get("k")
    assert store.remove("k", force=True) == 0
    assert store.get("k") == b""


def test_remove_of_a_missing_key_is_minus_704(store) -> None:
    assert store.remove("missing") == -704
    assert store.remove("missing", force=True) == -704


def test_get_into_of_a_missing_key_is_minus_704(store, memory) -> None:
    data, address = memory(8)
    before = data.tobytes()
    assert store.get_into("missing", address, 8) == -704
    assert data.tobytes() == before


def test_put_of_no_bytes_is_minus_600(store) -> None:
    assert store.put("k", b"") == -600
    assert store.is_exist("k") == 0


def test_get_buffer_of_a_missing_key_is_none(store) -> None:
    assert store.get_buffer("missing") is None


def test_get_batch_of_missing_keys_is_empty_bytes_each(store) -> None:
    store.put("k", b"1")
    assert store.get_batch(["missing", "k", "absent"]) == [b"", b"1", b""]


def test_put_batch_is_0(store) -> None:
    assert store.put_batch(["a", "b"], [b"1", b"2"]) == 0
    assert store.get_batch(["a", "b"]) == [b"1", b"2"]


def test_remove_by_regex_is_the_count(store) -> None:
    store.put_batch(["one/1", "one/2", "two/1"], [b"1"] * 3)
    assert store.remove_by_regex("^one/") == 2
    assert store.batch_is_exist(["one/1", "one/2", "two/1"]) == [0, 0, 1]


def test_upsert_is_0_and_the_new_value_counts(store) -> None:
    store.put("k", b"old")
    assert store.upsert("k", b"new") == 0
    assert store.get("k") == b"new"


def test_setup_with_a_share_of_the_memory_is_rejected(master) -> None:
    config = {
        "local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "global_segment_size": "50%",
        "master_server_addr": master.address,
    }  # fmt: skip
    assert MooncakeDistributedStore().setup(config) == -600


# ---------------------------------------------------------------- where upstream refuses, ends or guesses


def test_put_larger_than_the_local_buffer_is_stored_where_upstream_s_is_minus_600(join) -> None:
    store = join("8MB", local_buffer_size="1MB", tenant_id="large")
    value = bytes(range(256)) * (2 << 12)
    assert store.put("k", value) == 0
    assert store.get("k") == value


def test_calls_before_setup_are_errors_where_upstream_s_process_ends() -> None:
    store = MooncakeDistributedStore()
    assert [store.put("k", b"1"), store.is_exist("k"), store.remove("k")] == [-600] * 3
    assert store.close() == 0
    with pytest.raises(RequestError, match="call setup first"):
        store.get("k")


def test_calls_after_close_are_errors_where_upstream_s_process_ends(join) -> None:
    store = join(0)
    store.close()
    assert [store.put("k", b"1"), store.is_exist("k"), store.remove("k")] == [-600] * 3
    assert store.close() == 0
    with pytest.raises(RequestError, match="call setup first"):
        store.get("k")


def kill(program: subprocess.Popen) -> None:
    """SIGKILL it (idempotent)."""
    program.kill()
    program.wait(PATIENCE_S)
    for pipe in (program.stdin, program.stdout):
        if pipe is not None:
            pipe.close()


MASTER = """
import asyncio, sys
from mooncake.core import log
from mooncake.dropin.master.command import Master, MasterOptions

async def main():
    log.setup("master")
    master = Master(MasterOptions(rpc_port=int(sys.argv[1]), metrics_port=0))
    await master.start()
    print(master.endpoint.removeprefix("tcp://"), flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


class MasterProcess:
    """A master that can be killed."""

    def __init__(self, port: int = 0) -> None:
        command = [sys.executable, "-c", MASTER, str(port)]
        self.program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.program.stdout is not None
        self.address = self.program.stdout.readline().strip()
        assert self.address


def test_a_killed_master_is_an_error_where_nobody_has_a_segment_and_never_a_miss() -> None:
    master = MasterProcess()
    store = client(master, 0)
    try:
        kill(master.program)
        assert (store.put("k", b"1"), store.is_exist("k"), store.get_size("k")) == (-900, -900, -900)
        with pytest.raises(PeerError):  # upstream: b"", as if it were not there
            store.get("k")
    finally:
        kill(master.program)
        store.close()


def test_a_master_that_was_killed_and_starts_again_loses_nothing_that_live_nodes_hold() -> None:
    master = MasterProcess()
    store = client(master)
    try:
        assert store.put("k", b"1") == 0
        kill(master.program)
        assert store.get("k") == b"1"  # nor does anybody have to wait for it
        master = MasterProcess(int(master.address.split(":")[1]))
        late = client(master, 0)
        until(lambda: late.get("k") == b"1")  # the segment has registered anew
        assert (late.put("k", b"2"), late.get("k"), late.remove("k", force=True)) == (0, b"1", 0)
        late.close()
    finally:
        kill(master.program)
        store.close()


OWNER = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 8 << 20, 0, "tcp", "", sys.argv[1], tenant_id="node") == 0
assert store.put("k", b"1" * 100_000) == 0
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_node_s_death_is_an_error_or_a_miss_and_never_wrong_bytes(memory) -> None:
    master = MasterThread()
    store = client(master, 0, tenant_id="node")
    command = [sys.executable, "-c", OWNER, master.address]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        until(lambda: store.get("k") == b"1" * 100_000)
        kill(owner)
        data, address = memory(100_000)
        for _ in range(3):
            with contextlib.suppress(PeerError):
                assert store.get("k") in (b"", b"1" * 100_000)
            assert store.get_into("k", address, data.nbytes) in (-704, -800, -900, data.nbytes)
            assert store.is_exist("k") in (0, 1, -900)
    finally:
        kill(owner)
        store.close()
        master.stop()


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_flipped_byte_is_found_by_the_checksum_and_never_read(store, memory, size) -> None:
    data, address = memory(size)
    good = data.tobytes()
    assert store.put_from("k", address, size) == 0
    flip(store, "k")
    with contextlib.suppress(PeerError):
        assert store.get("k") == b""
    assert store.get_into("k", address, size) in (-800, -704)
    while store.is_exist("k"):  # its owner has looked for itself, and dropped it
        pass
    assert (store.get("k"), store.upsert("k", good), store.get("k")) == (b"", 0, good)


def flip(store: MooncakeDistributedStore, name: str) -> None:
    """Damage the first byte of an object in the segment that has it."""
    pool = store._need().pool
    ((place,),) = pool.places([name])
    (record,) = [one for one in pool.records if one.node == place.node]
    owner = PoolClient(record, "flipper")
    try:
        link, _ = owner.call(Stats(), StoreStats)
        link.segment.view(place.address - record.segment_address, 1)[0] ^= 1
    finally:
        owner.close()
