"""Puts without a message: who asks, or looks, finds them as if there had been one."""

import itertools

import pytest

from kvstore.client.model import Outcome
from kvstore.client.pool import Pool
from kvstore.rings import RINGS
from tests.unit.kvstore.test_lookup import ask_nobody, stats, until

DONE, EXISTS = Outcome.DONE, Outcome.EXISTS
SIZE = 10_000


def value(number: int) -> bytes:
    return bytes([number % 251]) * SIZE


@pytest.fixture(scope="module")
def store(store_parent, tmp_path_factory):
    from tests.unit.kvstore.conftest import StoreProcess

    folder = str(tmp_path_factory.mktemp("run"))
    store = StoreProcess(store_parent, node="n1", capacity_bytes=64 << 20, run_dir=folder)
    yield store
    store.stop()


@pytest.fixture
def open_pool(store):
    pools = []

    def make(**options) -> Pool:
        pools.append(Pool(stores=[store.record], **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def pool(open_pool):
    return open_pool()


@pytest.fixture
def names():
    """Of nobody else."""
    return (f"{next(NUMBERS)}" for _ in itertools.repeat(None))


NUMBERS = itertools.count()


def outcomes(results) -> list[Outcome]:
    return [one.outcome for one in results]


def test_after_the_first_put_of_a_size_no_message_is_sent(pool, open_pool, names, monkeypatch):
    other = open_pool()
    pool.put([next(names)], [value(0)])
    put = [next(names) for _ in range(12)]
    with monkeypatch.context() as patch:
        ask_nobody(pool, patch)
        for at, name in enumerate(put[:4]):
            assert outcomes(pool.put([name], [value(at)])) == [DONE]
        assert outcomes(pool.put(put[4:], [value(at) for at in range(4, 12)])) == [DONE] * 8
    assert other.get(put) == [value(at) for at in range(12)]


def test_what_was_put_is_seen_at_once_by_everybody_who_looks(pool, open_pool, names):
    others = [open_pool() for _ in range(3)]
    for turn in range(30):
        name = next(names)
        pool.put([name], [value(turn)])
        assert others[0].exists([name]) == [True]
        assert others[1].get([name]) == [value(turn)]
        assert others[2].sizes([name]) == [SIZE]


def test_of_two_puts_of_a_name_the_first_one_stays(open_pool, names):
    first, second = open_pool(), open_pool()
    for pool in (first, second):
        pool.put([next(names)], [value(0)])
    for _ in range(20):
        name = next(names)
        assert outcomes(first.put([name], [value(1)])) == [DONE]
        assert outcomes(second.put([name], [value(2)]))[0] in (DONE, EXISTS)
        assert second.get([name]) == [value(1)]


def test_a_put_is_removed_and_listed_like_any_other(pool, open_pool, names):
    other = open_pool()
    pool.put([next(names)], [value(0)])
    name = next(names)
    pool.put([name], [value(1)], listed=True)
    assert name in other.names()
    assert outcomes(other.remove([name])) == [DONE]
    assert pool.get([name]) == [None]
    assert outcomes(pool.put([name], [value(2)])) == [DONE]
    assert other.get([name]) == [value(2)]


def test_names_too_long_for_a_ring_go_the_long_way(pool, names):
    pool.put([next(names)], [value(0)])
    put = [next(names) + "x" * 2000 for _ in range(40)]
    assert outcomes(pool.put(put, [value(1)] * 40, listed=True)) == [DONE] * 40
    assert set(put) <= set(pool.names())


def test_a_full_ring_is_read_before_more_is_put(pool, names, store):
    pool.put([next(names)], [b"x"])
    put = [next(names) + "x" * 4000 for _ in range(60)]
    for name in put:
        assert outcomes(pool.put([name], [b"x"], listed=True)) == [DONE]
    assert all(pool.exists(put))


def test_room_that_is_not_used_comes_back(open_pool, names):
    pool = open_pool()
    before = stats(pool).used_bytes
    pool.put([next(names)], [value(0)])
    assert stats(pool).used_bytes > before + 3 * 4096  # what one object takes
    until(lambda: stats(pool).used_bytes == before + 3 * 4096, "room is given back")
    assert outcomes(pool.put([name := next(names)], [value(1)])) == [DONE]
    pool.close()
    with Pool(stores=[pool_record(open_pool)]) as other:
        assert stats(other).used_bytes == before + 6 * 4096
        assert other.get([name]) == [value(1)]


def pool_record(open_pool):
    (access,) = open_pool()._members.stores.values()
    return access.record


def test_more_writers_than_rings_put_all_the_same(open_pool, names):
    pools = [open_pool() for _ in range(RINGS + 2)]
    put = [next(names) for _ in pools]
    for at, (pool, name) in enumerate(zip(pools, put, strict=True)):
        assert outcomes(pool.put([name], [value(at)])) == [DONE]
    assert pools[0].get(put) == [value(at) for at in range(len(pools))]


def test_a_pool_smaller_than_what_is_put_keeps_the_youngest(start_store, tmp_path, names):
    store = start_store(node="small", capacity_bytes=64 * 4096, run_dir=str(tmp_path / "run"))
    with Pool(stores=[store.record]) as pool:
        put = [next(names) for _ in range(300)]
        for at, name in enumerate(put):
            assert outcomes(pool.put([name], [bytes([at % 256]) * 4096])) == [DONE]
        last = range(280, 300)
        assert pool.get(put[280:]) == [bytes([at % 256]) * 4096 for at in last]


def test_objects_of_several_sizes_find_room(pool, names):
    for turn in range(3):
        for size in (1, 5_000, 9_000, 70_000, 300_000, 2_000_000):
            name = next(names)
            assert outcomes(pool.put([name], [bytes([turn + 1]) * size])) == [DONE]
            assert pool.get([name]) == [bytes([turn + 1]) * size]
