"""A node keeps room free if asked to, spares soft pins if asked to, and holds tenants to strict quotas."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.limits import NodeLimits
from kvstore.node.contract import FULL, OVER_QUOTA, PRESENT
from kvstore.node.keeping import NO_QUOTA, make_policy, set_quota
from kvstore.node.node import Node
from kvstore.node.shelf import AHEAD_MAX
from kvstore.node.tags import Tags
from kvstore.node.tenants import NOT_REGISTERED
from kvstore.store.config import StoreConfig
from mooncake.core.errors import ConfigError, RequestError
from mooncake.core.messages import SetQuota, TenantUsage

SIZE = 8192
SUM = bytes(16)


def keys(*numbers: int) -> list[bytes]:
    return [n.to_bytes(32, "big") for n in numbers]


def make(blocks: int = 10, limits: NodeLimits | None = None, **policy) -> Node:
    return Node(blocks * SIZE, limits, make_policy(blocks * SIZE, "lru", **policy))


def reserve(node: Node, *numbers: int, now_s: float = 0.0, **tags):
    return node.reserve(now_s, "w", keys(*numbers), SIZE, Tags(**tags))


def put(node: Node, *numbers: int, now_s: float = 0.0, **tags) -> list[int]:
    """Return which of them were taken."""
    room = reserve(node, *numbers, now_s=now_s, **tags)
    for ticket in filter(None, room.tickets):
        node.commit(now_s, [ticket], [SUM])  # one by one: the first is the oldest
    return [n for n, ticket in zip(numbers, room.tickets, strict=True) if ticket]


def there(node: Node) -> list[int]:
    return [int.from_bytes(k, "big") for k in node.complete_keys()]


def strict(node: Node, tenant: str, blocks: int) -> TenantUsage:
    return set_quota(node, 0, SetQuota(tenant, blocks * SIZE, strict=True))


# ---------------------------------------------------------------- ahead of need


def test_nothing_is_evicted_ahead_below_the_watermark():
    node = make()
    put(node, *range(8))
    assert node.evict_ahead(0, 8 * SIZE, 6 * SIZE, None) == 0
    assert node.stats().eviction_attempts == 0


def test_above_the_watermark_the_oldest_go_until_the_lower_mark_is_reached():
    node = make()
    put(node, *range(9))
    assert node.evict_ahead(0, 8 * SIZE, 6 * SIZE, None) == 3
    assert there(node) == [3, 4, 5, 6, 7, 8]
    stats = node.stats()
    assert (stats.evictions, stats.evicted_bytes) == (3, 3 * SIZE)
    assert stats.eviction_attempts == stats.eviction_successes == 1


def test_what_is_read_or_hard_pinned_stays_whatever_the_watermark():
    node = make()
    put(node, 0, hard_pin=True)
    put(node, *range(1, 10))
    node.acquire(0, keys(1), 5.0)
    node.evict_ahead(0, 0, 0, None)
    assert there(node) == [0, 1]


def test_blocks_that_may_not_go_yet_are_passed_over():
    node = make()
    put(node, *range(10))
    odd = set(keys(*range(1, 10, 2)))
    assert node.evict_ahead(0, 5 * SIZE, 5 * SIZE, odd.__contains__) == 2
    assert there(node) == [0, 2, 4, 5, 6, 7, 8, 9]


def test_one_round_is_bounded():
    blocks = 3 * AHEAD_MAX
    node = make(blocks)
    put(node, *range(blocks))
    assert node.evict_ahead(0, 0, 0, None) == AHEAD_MAX


@pytest.mark.parametrize("name", ["evict_above_ratio", "evict_ratio"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_watermark_that_is_no_ratio_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        StoreConfig(node="n", capacity_bytes=1 << 20, run_dir="/tmp/x", **{name: value})


# ---------------------------------------------------------------- soft pins that do not give way


def test_soft_pins_give_way_last_or_not_at_all():
    for spared in (False, True):
        node = make(4, evict_soft=not spared)
        put(node, 0, 1, 2, 3, soft_pin_s=60)
        assert put(node, 4) == ([] if spared else [4])
        assert (reserve(node, 5).offsets == [FULL]) is spared
        put(node, 6, now_s=61)
        assert 6 in there(node), "a pin whose time is over gives way"


# ---------------------------------------------------------------- strict quotas


def test_a_tenant_at_its_strict_quota_pays_with_its_own_oldest_blocks():
    node = make()
    strict(node, "t", 3)
    put(node, 100)
    assert put(node, 0, 1, 2, 3, 4, tenant="t") == [0, 1, 2], "what is in writing counts, and cannot go yet"
    for number in range(5, 8):
        assert put(node, number, tenant="t") == [number]
    assert there(node) == [100, 5, 6, 7]
    assert strict(node, "t", 3) == TenantUsage(3 * SIZE, 0, 3 * SIZE)


def test_a_tenant_whose_blocks_cannot_go_is_refused_and_loses_none():
    node = make()
    strict(node, "t", 2)
    put(node, 0, 1, tenant="t", soft_pin_s=60)
    assert reserve(node, 2, 3, tenant="t").offsets == [OVER_QUOTA, OVER_QUOTA]
    assert reserve(node, 0, tenant="t").offsets == [PRESENT]
    assert there(node) == [0, 1]
    assert node.stats().puts_refused == 3


def test_a_block_larger_than_the_quota_costs_nobody_anything():
    node = make()
    strict(node, "t", 2)
    put(node, 0, 1, tenant="t")
    assert node.reserve(0, "w", keys(5), 3 * SIZE, Tags("t")).offsets == [OVER_QUOTA]
    assert there(node) == [0, 1]


def test_a_write_that_is_given_up_frees_its_part_of_the_quota():
    node = make(limits=NodeLimits(write_s=10))
    strict(node, "t", 1)
    first = reserve(node, 0, tenant="t")
    assert reserve(node, 1, tenant="t").offsets == [OVER_QUOTA]
    node.abandon(0, "w", first.tickets)
    assert put(node, 1, tenant="t") == [1]
    strict(node, "t", 2)
    reserve(node, 2, now_s=1, tenant="t")
    assert reserve(node, 3, now_s=12, tenant="t").offsets[0] >= 0, "it was never committed"
    assert node.stats().puts_discarded == 2


def test_a_quota_under_pressure_only_is_no_wall():
    node = make()
    set_quota(node, 0, SetQuota("t", SIZE))
    assert put(node, 0, 1, 2, tenant="t") == [0, 1, 2]
    strict(node, "t", 1)
    assert put(node, 3, tenant="t") == [3]
    assert there(node) == [3], "made strict, it is brought back to its quota by its next block"
    set_quota(node, 0, SetQuota("t", NO_QUOTA))
    assert put(node, 4, 5, tenant="t") == [4, 5]


def test_where_quotas_are_needed_a_tenant_without_one_is_refused():
    node = make(quota_needed=True)
    with pytest.raises(RequestError, match=NOT_REGISTERED):
        reserve(node, 0, tenant="t")
    assert put(node, 1) == [1], "what carries no tenant is the pool's own"
    strict(node, "t", 1)
    assert put(node, 0, tenant="t") == [0]


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("ab"), st.booleans()), max_size=60))
def test_no_sequence_of_puts_takes_a_tenant_beyond_its_strict_quota(puts):
    node = make(8)
    for tenant, blocks in (("a", 3), ("b", 2)):
        strict(node, tenant, blocks)
    for number, tenant, pinned in puts:
        put(node, number, tenant=tenant, soft_pin_s=60.0 * pinned)
        used = node.policy.tenants.used()
        assert used.get("a", 0) <= 3 * SIZE
        assert used.get("b", 0) <= 2 * SIZE


# ---------------------------------------------------------------- what only passes through


def read(node: Node, number: int) -> None:
    node.release(0, node.acquire(0, keys(number), 5.0).lease_id)


@pytest.mark.parametrize("reads", [1, 2, 3])
def test_what_came_from_the_ssd_goes_first_until_it_was_read_often_enough(reads):
    node = make(4)
    put(node, 0, 1)
    put(node, 2)
    node.pass_through(keys(2), reads)
    for n in range(reads):
        assert node.evict_ahead(0, 0, 0, lambda _: False) == 0
        assert node.policy.victims(SIZE) == keys(2), f"after {n} reads"
        read(node, 2)
    assert node.policy.victims(SIZE) == keys(0)
    assert node.policy.victims(3 * SIZE) == keys(0, 1, 2), "as any other, the last one read last"


def test_what_passes_through_can_be_pinned_dropped_and_put_again():
    node = make(4)
    put(node, 0, 1)
    node.pass_through(keys(0, 1, 7), 2)
    node.pin(0, keys(0), 60)
    assert node.policy.victims(2 * SIZE) == keys(1, 0), "a pin is stronger"
    node.drop(0, keys(0, 1))
    put(node, 0, 1, 2)
    assert node.policy.victims(SIZE) == keys(0), "nothing is left of it"


def test_what_is_being_read_or_pinned_does_not_pass_through():
    node = make(4)
    put(node, 0)
    put(node, 1, soft_pin_s=60)
    lease = node.acquire(0, keys(0), 5.0)
    node.pass_through(keys(0, 1), 2)
    node.release(0, lease.lease_id)
    put(node, 2)
    assert node.policy.victims(2 * SIZE) == keys(0, 2)
