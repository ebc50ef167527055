"""Reads of a store of this host by its table: they ask nobody, and never believe what does not verify."""

import errno
import os
import select
import signal
import threading

import pytest

from kvstore.client.model import Outcome
from kvstore.client.object_names import object_key
from kvstore.client.pool import Pool
from mooncake.core.errors import PeerGone
from mooncake.core.messages import StoreStats

PATIENCE_S = 20.0
PAUSE = threading.Event()


class Asked(Exception):
    """A message went to the store."""


@pytest.fixture
def store(start_store, tmp_path):
    return start_store(node="n1", capacity_bytes=16 << 20, run_dir=str(tmp_path / "run"))


@pytest.fixture
def pool(store):
    with Pool(stores=[store.record]) as pool:
        yield pool


def until(true, what: str) -> None:
    for _ in range(int(PATIENCE_S / 0.01)):
        if true():
            return
        PAUSE.wait(0.01)
    pytest.fail(f"not within {PATIENCE_S:g} s: {what}")


def ask_nobody(pool: Pool, monkeypatch) -> None:
    (access,) = pool._members.stores.values()

    def call(*_):
        raise Asked

    monkeypatch.setattr(access._client, "call", call)


def stats(pool: Pool) -> StoreStats:
    return pool.stats("n1", PATIENCE_S)


def test_a_healthy_store_is_not_asked_for_what_it_has_nor_for_what_it_has_not(pool, monkeypatch):
    names = [f"n{number}" for number in range(20)]
    values = [bytes([number]) * (1 + 9_000 * number) for number in range(20)]
    pool.put(names, values)
    ask_nobody(pool, monkeypatch)
    assert pool.get([*names, "none"]) == [*values, None]
    target = bytearray(9_001)
    assert pool.get_into([names[1]], [target])[0].ok
    assert target == values[1]
    assert pool.get_into(["none"], [target])[0].outcome is Outcome.MISSING
    assert pool.exists([*names, "none"]) == [True] * 20 + [False]
    assert pool.sizes(["none", names[19]]) == [None, len(values[19])]


def test_uses_are_told_of(pool):
    pool.put(["a"], [b"a"])
    before = stats(pool)
    pool.get(["a", "none", "a"])
    pool.get_into(["a"], [bytearray(1)])
    after = stats(pool)
    assert (after.hits - before.hits, after.misses - before.misses) == (3, 1)


def test_uses_are_told_of_soon_although_no_call_follows(store, pool):
    with Pool(stores=[store.record]) as other:
        pool.put(["a"], [b"a"])
        other.get(["a"])
        until(lambda: stats(pool).hits == 1, "the hit is counted")


def test_what_another_pool_removes_is_gone_at_once(store, pool):
    with Pool(stores=[store.record]) as other:
        pool.put(["a"], [b"first"])
        assert other.get(["a"]) == [b"first"]
        pool.remove(["a"])
        assert other.get(["a"]) == [None]
        pool.put(["a"], [b"second"])
        assert other.get(["a"]) == [b"second"]


def test_bytes_that_do_not_verify_are_asked_for_again_and_reported(pool):
    pool.put(["a", "b"], [b"a" * 100_000, b"b"])
    (access,) = pool._members.stores.values()
    _, offset, _ = access.shown.table.find(object_key("a"))
    access.shown.memory[offset + 50_000] ^= 1
    assert pool.get(["a", "b"]) == [None, b"b"]
    until(lambda: stats(pool).checksum_failures == 1, "the store drops the block")
    assert pool.get_into(["a"], [bytearray(100_000)])[0].outcome is Outcome.MISSING


def test_the_memory_of_a_dead_store_is_not_read(store, pool):
    pool.put(["a"], [b"a"])
    (access,) = pool._members.stores.values()
    store.kill()
    assert access.shown.table is None
    (one,) = pool.get_into(["a"], [bytearray(1)])
    assert one.outcome is Outcome.FAILED


def test_a_store_that_has_closed_is_not_believed(store, pool):
    pool.put(["a"], [b"a"])
    store.stop()
    assert pool.get_into(["a"], [bytearray(1)])[0].outcome is Outcome.FAILED


def test_a_store_that_stands_still_is_asked_before_it_is_believed(store, pool):
    pool.put(["a"], [b"a"])
    (access,) = pool._members.stores.values()
    store.signal(signal.SIGSTOP)
    until(lambda: access.shown.table is None, "no sign of life")
    store.signal(signal.SIGCONT)
    until(lambda: access.shown.table is not None, "it lives again")


class Closing:
    """An epoll that another thread closes while the kernel is asked."""

    def __init__(self, asked: select.epoll) -> None:
        self.asked = asked

    def poll(self, timeout: float, events: int) -> list[tuple[int, int]]:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def close(self) -> None:
        self.asked.close()


def test_a_table_that_another_thread_lets_go_of_meanwhile_is_read_no_more(store, pool):
    pool.put(["a"], [b"a"])
    (access,) = pool._members.stores.values()
    lookup = access.shown._lookup
    lookup._ended = Closing(lookup._ended)
    assert access.shown.table is None
    assert pool.get(["a"]) == [b"a"]  # the store is asked


def test_a_store_without_a_table_is_asked(store, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PeerGone("no table")

    monkeypatch.setattr("kvstore.client.lookup.fetch_segment", refuse)
    with Pool(stores=[store.record]) as pool:
        (access,) = pool._members.stores.values()
        assert access.shown is None
        pool.put(["a"], [b"a"])
        assert (pool.get(["a", "b"]), pool.exists(["a", "b"])) == ([b"a", None], [True, False])


def test_where_memory_is_not_seen_in_order_a_store_is_asked(store, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with Pool(stores=[store.record]) as pool:
        (access,) = pool._members.stores.values()
        assert access.shown is None
        pool.put(["a"], [b"a"])
        assert (pool.get(["a", "b"]), pool.exists(["a", "b"])) == ([b"a", None], [True, False])
