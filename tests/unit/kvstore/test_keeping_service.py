"""Engines pin, tag and quota blocks over the wire; a store evicts by the policy it was started with."""

import math

import pytest

from kvstore.engine.client import PoolClient
from kvstore.node.keeping import NO_QUOTA
from kvstore.store.config import StoreConfig
from mooncake.core.errors import ConfigError, RequestError
from mooncake.core.messages import SetQuota, TenantUsage

SIZE = 65_536
BLOCKS = 8
SUM = bytes(16)
PATIENCE_S = 10.0


def keys(*numbers: int) -> list[bytes]:
    return [n.to_bytes(32, "big") for n in numbers]


@pytest.fixture
def pool(start_store):
    store = start_store(capacity_bytes=BLOCKS * SIZE, eviction="lfu", hard_pin_ratio=0.25)
    client = PoolClient(store.record, "engine", attach_s=PATIENCE_S, deadline_s=PATIENCE_S)
    yield client
    client.close()


def put(pool: PoolClient, *numbers: int, **hints) -> None:
    slots = pool.reserve(keys(*numbers), SIZE, **hints)
    assert all(pool.commit([slot.ticket for slot in slots], [SUM] * len(numbers)))


def has(pool: PoolClient, number: int) -> bool:
    lease = pool.acquire(keys(number), 5.0)
    pool.release(lease.lease_id)
    return len(lease) == 1


def test_hard_pins_outlast_any_pressure_up_to_their_share_of_the_memory(pool):
    put(pool, 1, hard_pin=True)
    put(pool, 2)
    assert pool.pin(keys(2, 99)) == 1
    assert pool.pin(keys(1), math.inf) == 1
    put(pool, 3, hard_pin=True)  # two of eight blocks are a quarter: no room for this pin
    for number in range(10, 40):
        put(pool, number)
    assert [has(pool, number) for number in (1, 2, 3)] == [True, True, False]
    assert pool.stats().hard_pinned_bytes == 2 * SIZE
    assert pool.unpin(keys(1, 2, 3)) == 2
    assert pool.stats().hard_pinned_bytes == 0


def test_soft_pins_and_groups_travel(pool):
    put(pool, 1, 2, soft_pin_s=3600.0, group="g", depth=0)
    assert pool.stats().soft_pinned_bytes == 2 * SIZE
    for number in range(10, 20):
        put(pool, number)
    assert has(pool, 1)
    assert has(pool, 2)
    assert pool.pin(keys(1), 0.0) == 1
    assert pool.stats().soft_pinned_bytes == SIZE


def test_a_store_started_with_lfu_keeps_what_was_used_often(pool):
    put(pool, *range(BLOCKS))
    for _ in range(3):
        assert has(pool, 0)
    put(pool, *range(100, 100 + BLOCKS - 1))
    assert has(pool, 0)


def test_a_tenant_has_a_quota_and_learns_what_it_uses(pool):
    put(pool, 1, 2, 3, tenant="t")
    call = pool._begin(SetQuota("t", SIZE))
    assert pool._finish(call, None, TenantUsage) == TenantUsage(3 * SIZE, 0, SIZE)
    put(pool, *range(10, 17))
    call = pool._begin(SetQuota("t", NO_QUOTA))
    assert pool._finish(call, None, TenantUsage) == TenantUsage(SIZE, 0, NO_QUOTA)


def test_hints_out_of_bounds_are_refused(pool):
    for hints in ({"depth": -7}, {"soft_pin_s": -1.0}, {"tenant": "x" * 1000}):
        with pytest.raises(RequestError):
            pool.reserve(keys(1), SIZE, **hints)
    with pytest.raises(RequestError):
        pool.pin([b"short"])
    with pytest.raises(RequestError):
        pool.pin(keys(1), math.nan)


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"eviction": "best"}, "eviction='best'"), ({"hard_pin_ratio": 2.0}, "hard_pin_ratio=2.0")],
)
def test_a_bad_setting_names_itself(settings, text):
    with pytest.raises(ConfigError, match=text):
        StoreConfig(node="n", capacity_bytes=SIZE, run_dir="/nowhere", **settings)
