"""Two processes: what one engine writes another reads and verifies; a dead store is a miss, never a hang."""

import signal
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kvstore.engine import attachment
from kvstore.engine.client import PoolClient
from mooncake.core.errors import PeerError, PeerGone, PeerTimeout, ProtocolError, RequestError
from mooncake.core.keys import block_checksum
from mooncake.core.messages import StoreRecord
from transfer.copy import gather, scatter

PAGES = 5
PAGE = 98_304
SIZE = PAGES * PAGE
PATIENCE_S = 10.0  # where time is not the property: test machines are busy
SHORT_S = 0.2


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def pages(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (PAGES, PAGE), dtype=np.uint8)


def put(client: PoolClient, *numbers: int) -> None:
    slots = client.reserve([key(n) for n in numbers], SIZE, PATIENCE_S)
    for n, slot in zip(numbers, slots, strict=True):
        gather(pages(n), slot.view)
    sums = [block_checksum(slot.key, slot.view) for slot in slots]
    assert client.commit([slot.ticket for slot in slots], sums, PATIENCE_S) == [True] * len(numbers)


def eventually(condition, limit_s: float = 5.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.01)


@pytest.fixture
def connect():
    clients = []

    def make(record: StoreRecord, writer: str = "engine-1", deadline_s=PATIENCE_S, **options) -> PoolClient:
        clients.append(PoolClient(record, writer, deadline_s=deadline_s, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def quick_retry(monkeypatch):
    monkeypatch.setattr(attachment, "RETRY_S", 0.05)
    monkeypatch.setattr(attachment, "PROBE_S", 0.3)


def test_one_engine_writes_and_another_reads_the_same_bytes(start_store, connect):
    store = start_store()
    writer, reader = connect(store.record, "a"), connect(store.record, "b")
    put(writer, 1, 2, 3)
    lease = reader.acquire([key(n) for n in (1, 2, 3, 4)], lease_s=5)
    assert len(lease) == 3
    assert all(lease.verify(index) for index in range(3))
    assert all(reader.verify(k, b) for k, b in zip(lease.keys, lease.blocks, strict=True))
    for index, n in enumerate((1, 2, 3)):
        got = np.zeros((PAGES, PAGE), np.uint8)
        scatter(lease.views[index], got)
        assert np.array_equal(got, pages(n))
    with pytest.raises(TypeError, match="read-only"):
        lease.views[0][0] = 1
    reader.release(lease.lease_id)
    eventually(lambda: reader.stats().leases == 0)
    assert (writer.stats().hits, writer.stats().misses, writer.stats().commits) == (3, 1, 3)
    del lease
    assert store.stop() == 0
    assert not Path(store.record.fd_path).exists()


def test_present_and_unplaceable_blocks_have_no_slot(start_store, connect):
    client = connect(start_store(capacity_bytes=2 * SIZE).record)
    put(client, 1)
    slots = client.reserve([key(1), key(2), key(3), key(4)], SIZE)
    # 1 is there; 2 takes the free room, 3 evicts 1, nothing is left for 4
    assert [slot is not None for slot in slots] == [False, True, True, False]


def test_a_flipped_byte_is_seen_reported_and_the_block_dropped(shared_store, connect):
    client = connect(shared_store.record)
    put(client, 11, 12)
    lease = client.acquire([key(11), key(12)], lease_s=5)
    client.view(lease.blocks[1].offset + 12_345, 1)[0] ^= 1
    assert [lease.verify(0), lease.verify(1)] == [True, False]
    client.report_bad([key(12), key(11), key(99)])  # 1 is sound: the store looks for itself
    eventually(lambda: client.stats().checksum_failures == 1)
    assert len(client.acquire([key(11), key(12)], lease_s=5)) == 1


def test_the_right_bytes_under_a_wrong_name_do_not_verify(shared_store, connect):
    client = connect(shared_store.record)
    put(client, 21)
    (block,) = client.acquire([key(21)], lease_s=5).blocks
    assert client.verify(key(21), block)
    assert not client.verify(b"\x01" * 32, block)


def test_a_reader_that_waits_gets_the_block_as_soon_as_it_is_committed(shared_store, connect):
    store = shared_store
    writer, reader = connect(store.record, "a"), connect(store.record, "b")
    (slot,) = writer.reserve([key(31)], SIZE)
    call = reader.begin_acquire([key(31)], lease_s=5, wait_s=1.0)
    assert not reader.poll(call)
    time.sleep(0.05)
    gather(pages(31), slot.view)
    writer.commit([slot.ticket], [block_checksum(slot.key, slot.view)])
    start_s = time.monotonic()
    assert len(reader.finish_acquire(call, 5)) == 1
    assert time.monotonic() - start_s < 0.9


def test_a_restarted_engine_gives_up_what_it_was_writing(shared_store, connect):
    store = shared_store
    first = connect(store.record, "engine-41")
    other = connect(store.record, "engine-42")
    (slot,) = first.reserve([key(41)], SIZE)
    (kept,) = other.reserve([key(42)], SIZE)
    again = connect(store.record, "engine-41")
    eventually(lambda: again.stats().writing == 1)
    assert first.commit([slot.ticket], [b"s" * 16]) == [False]
    assert other.commit([kept.ticket], [b"s" * 16]) == [True]


def test_abandoned_tickets_do_not_commit_and_an_empty_list_means_none(shared_store, connect):
    client = connect(shared_store.record)
    one, two = client.reserve([key(51), key(52)], SIZE)
    client.abandon([])
    client.abandon([one.ticket])
    assert client.commit([one.ticket, two.ticket], [b"s" * 16] * 2) == [False, True]


def test_the_stores_refusals_arrive_as_errors_and_leave_it_alive(shared_store, connect):
    client = connect(shared_store.record)
    for call in (
        lambda: client.acquire([b"short"], 5),
        lambda: client.acquire([key(61)], float("nan")),
        lambda: client.acquire([key(61)], -1),
        lambda: client.reserve([key(61)], 0),
        lambda: client.reserve([key(61)], -4096),
        lambda: client.reserve([key(61)], 65 << 20),
        lambda: client.reserve([key(60)] * 20_000, SIZE),
        lambda: client.commit([1], []),
    ):
        with pytest.raises(RequestError):
            call()
    assert client.attached
    assert len(client.acquire([key(60), key(61)], 5)) == 0


# ---------------------------------------------------------------- a store in trouble


def test_a_killed_store_costs_one_deadline_and_then_nothing(start_store, connect):
    store = start_store()
    client = connect(store.record, deadline_s=SHORT_S)
    put(client, 1)
    lease = client.acquire([key(1)], 30, deadline_s=PATIENCE_S)
    calls = [client.begin_acquire([key(1)], 5) for _ in range(3)]
    for call in calls:
        client.finish_acquire(call, 5, PATIENCE_S)
    store.kill()
    start_s = time.monotonic()
    with pytest.raises(PeerTimeout):
        client.acquire([key(1)], lease_s=5)
    assert time.monotonic() - start_s < 10 * SHORT_S
    start_s = time.monotonic()
    for _ in range(100):
        with pytest.raises(PeerTimeout):
            client.reserve([key(2)], SIZE)
    client.release(lease.lease_id)  # harmless
    assert time.monotonic() - start_s < 25 * SHORT_S, "each of a hundred paid the deadline"
    assert not client.attached
    assert lease.verify(0)  # the memory outlives its owner


def test_calls_under_way_when_the_store_dies_pay_the_deadline_once_together(
    start_store, connect, quick_retry
):
    store = start_store()
    client = connect(store.record, deadline_s=SHORT_S)
    store.signal(signal.SIGSTOP)
    calls = [client.begin_acquire([key(n)], 5) for n in range(10)]
    start_s = time.monotonic()
    for call in calls:
        with pytest.raises(PeerTimeout):
            client.finish_acquire(call, 5)
    assert time.monotonic() - start_s < 8 * SHORT_S, "each of ten paid the deadline"


def test_giving_up_an_overdue_answer_opens_the_breaker_too(start_store, connect, quick_retry):
    store = start_store()
    client = connect(store.record, deadline_s=SHORT_S)
    store.signal(signal.SIGSTOP)
    young, old = client.begin_acquire([key(1)], 5), client.begin_acquire([key(1)], 5)
    client.forget(young)
    assert client.attached
    time.sleep(SHORT_S + 0.05)
    assert not client.poll(old)
    client.forget(old)
    assert not client.attached


def test_the_lease_of_an_answer_that_nobody_waited_for_is_given_back(start_store, connect, quick_retry):
    store = start_store()
    client, other = connect(store.record), connect(store.record, writer="engine-2")
    put(client, 1)
    store.signal(signal.SIGSTOP)
    for _ in range(3):
        client.forget(client.begin_acquire([key(1)], 30))
    store.signal(signal.SIGCONT)
    leased = client.acquire([key(1)], 30)
    assert other.stats().leases >= 1
    client.release(leased.lease_id)
    eventually(lambda: other.stats().leases == 0)


def test_a_store_that_was_only_stopped_is_used_again(start_store, connect, quick_retry):
    store = start_store()
    client = connect(store.record, deadline_s=SHORT_S)
    put(client, 1)
    store.signal(signal.SIGSTOP)
    with pytest.raises(PeerTimeout):
        client.acquire([key(1)], 5)
    store.signal(signal.SIGCONT)
    eventually(lambda: client.attached)
    assert len(client.acquire([key(1)], 5, deadline_s=PATIENCE_S)) == 1


def test_a_restarted_store_is_found_without_anybodys_help(start_store, connect, quick_retry):
    first = start_store()
    client = connect(first.record, deadline_s=SHORT_S)
    put(client, 1)
    old = client.acquire([key(1)], 30, deadline_s=PATIENCE_S)
    first.kill()
    second = start_store()
    assert second.record.epoch != first.record.epoch
    with pytest.raises(PeerTimeout):
        client.acquire([key(1)], 5)
    eventually(lambda: client.attached)
    assert len(client.acquire([key(1)], 5, deadline_s=PATIENCE_S)) == 0  # DRAM does not outlive it
    put(client, 1)
    assert len(client.acquire([key(1)], 5, deadline_s=PATIENCE_S)) == 1
    assert old.verify(0)  # old views still show the old memory
    client.release(old.lease_id)  # of another epoch: ignored


def test_a_store_restarted_at_its_old_address_is_recognised(start_store, connect, quick_retry):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    first = start_store(endpoint=endpoint)
    client = connect(first.record)
    (slot,) = client.reserve([key(1)], SIZE)
    first.kill()
    start_store(endpoint=endpoint)
    eventually(lambda: client.stats().writing == 0)  # zmq connected to the new one by itself
    assert client.commit([slot.ticket], [b"s" * 16]) == [False]
    with pytest.raises(PeerGone, match="restarted"):
        client.reserve([key(1)], SIZE)  # its offsets belong to memory that is not mapped here
    eventually(lambda: client.attached)
    put(client, 1)
    assert client.acquire([key(1)], 5).verify(0)


def test_a_client_that_starts_before_its_store_finds_it(start_store, connect, quick_retry, tmp_path):
    store = start_store()
    record = store.record
    store.kill()
    client = connect(record, deadline_s=SHORT_S)
    assert not client.attached
    with pytest.raises(PeerTimeout):
        client.begin_acquire([key(1)], 5)
    with pytest.raises(PeerGone):
        client.view(0, 1)
    start_store()
    eventually(lambda: client.attached)
    put(client, 1)


def test_a_store_that_dies_while_asked_to_wait_is_noticed_before_that_wait_ends(start_store, connect):
    store = start_store()
    client = connect(store.record)
    store.signal(signal.SIGSTOP)  # the call below is never answered
    call = client.begin_acquire([key(1)], 5, wait_s=3600.0)
    assert not client.poll(call)
    store.kill()
    eventually(lambda: client.poll(call))
    with pytest.raises(PeerTimeout):
        client.finish_acquired(call, 0.0)
    assert not client.attached


def test_a_store_that_moved_is_resolved(start_store, connect, quick_retry, tmp_path):
    first = start_store()
    records = [None]
    client = connect(first.record, deadline_s=SHORT_S, resolve=lambda: records[0])
    first.kill()
    with pytest.raises(PeerTimeout):
        client.stats()
    records[0] = start_store(run_dir=str(tmp_path / "elsewhere")).record
    eventually(lambda: client.attached)
    put(client, 1)


def test_reattach_moves_to_another_store_and_keeps_used_views_alive(start_store, connect, tmp_path):
    first, second = start_store(), start_store(node="n2")
    client = connect(first.record)
    put(client, 1)
    lease = client.acquire([key(1)], 30)
    under_way = client.begin_acquire([key(1)], 5)
    client.reattach(first.record)  # the same epoch: nothing happens
    assert len(client.acquire([key(1)], 30)) == 1
    client.reattach(second.record)
    assert len(client.acquire([key(1)], 30)) == 0
    with pytest.raises(PeerError):
        client.finish_acquire(under_way, 5)
    mapped = Path("/proc/self/maps").read_text
    assert lease.verify(0)
    assert first.record.epoch in mapped()
    del lease
    assert first.record.epoch not in mapped()


def test_a_stranger_at_the_socket_is_refused_at_start(tmp_path):
    path = tmp_path / "x.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.bind(str(path))
        stranger.listen(1)

        def answer():
            connection, _ = stranger.accept()
            with connection, Path("/dev/null").open("rb") as file:
                socket.send_fds(connection, [b"hello"], [file.fileno()])

        thread = threading.Thread(target=answer)
        thread.start()
        record = StoreRecord("n", "e", "tcp://127.0.0.1:1", "tcp://127.0.0.1:2", str(path), 4096, 1)
        with pytest.raises(ProtocolError):
            PoolClient(record, "w")
        thread.join()


def test_close_is_idempotent_and_ends_all_calls(shared_store, connect):
    client = connect(shared_store.record)
    put(client, 71)
    lease = client.acquire([key(71)], 5)
    client.close()
    client.close()
    with pytest.raises(PeerTimeout):
        client.stats()
    with pytest.raises(RequestError, match="closed"):
        client.view(0, 1)
    assert lease.verify(0)


def test_many_threads_share_one_client(shared_store, connect):
    client = connect(shared_store.record)
    failures = []

    def work(base: int) -> None:
        try:
            for n in range(base, base + 10):
                put(client, n)
                lease = client.acquire([key(n)], 5)
                assert lease.verify(0)
                client.release(lease.lease_id)
        except BaseException as error:  # noqa: BLE001 - shown by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(100 * t,)) for t in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert client.stats().blocks >= 40
