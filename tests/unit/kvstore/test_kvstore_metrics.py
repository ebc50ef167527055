"""What operators see of a node: why blocks leave, how old they were, who holds what, by tier."""

import re

from prometheus_client import CollectorRegistry, generate_latest

from kvstore.node.ages import BOUNDS_S, AgeHistogram
from kvstore.node.node import Node
from kvstore.node.tags import PLAIN, Tags
from kvstore.ssd.model import SsdStats
from kvstore.store import metrics
from kvstore.store.metrics import StoreCollector

SIZE = 4096


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def put(node: Node, number: int, now_s: float = 0.0, tags: Tags = PLAIN) -> None:
    tickets = node.reserve(now_s, "w", [key(number)], SIZE, tags).tickets
    assert node.commit(now_s, tickets, [bytes(16)]).done == [True]


def page(node: Node, ssd=None) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(StoreCollector("n1", node, ssd))
    lines = generate_latest(registry).decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {re.sub(r'{node="n1"}|node="n1",|,node="n1"', "", name): float(value) for name, value in pairs}


def test_blocks_that_leave_are_counted_by_reason():
    node = Node(2 * SIZE)
    for number in range(5):
        put(node, number)
    held = node.lease_for_check(0, key(4), 1)
    node.drop_bad(0, key(4), held.blocks[0])
    node.drop(0, [key(3)])
    shown = page(node)
    assert shown['mooncake_store_removed_blocks_total{reason="pressure"}'] == 3
    assert shown['mooncake_store_removed_blocks_total{reason="drop"}'] == 1
    assert shown['mooncake_store_removed_blocks_total{reason="bad"}'] == 1
    assert shown["mooncake_store_evictions_total"] == 3
    assert shown["mooncake_store_checksum_failures_total"] == 1


def test_the_age_of_evicted_blocks_is_a_histogram():
    node = Node(SIZE)
    for number, now_s in enumerate((0, 0.5, 10, 5000)):
        put(node, number, now_s)
    shown = page(node)
    name = "mooncake_store_eviction_age_seconds"
    assert shown[name + '_bucket{le="1"}'] == 1
    assert shown[name + '_bucket{le="15"}'] == 2
    assert shown[name + '_bucket{le="3600"}'] == 2
    assert shown[name + '_bucket{le="14400"}'] == 3
    assert shown[name + '_bucket{le="+Inf"}'] == shown[name + "_count"] == 3
    assert shown[name + "_sum"] == 0.5 + 10 + 4990


def test_every_age_falls_into_one_bucket_and_a_bound_into_its_own():
    ages = AgeHistogram()
    for bound_s in BOUNDS_S:
        ages.add(bound_s)
    ages.add(1e9)
    assert ages.counts == [1] * (len(BOUNDS_S) + 1)


def test_pinned_and_quarantined_bytes_and_refused_pins():
    node = Node(6 * SIZE)
    for number in range(4):
        put(node, number, tags=Tags(hard_pin=True))
    put(node, 4, tags=Tags(soft_pin_s=60))
    node.reserve(0, "w", [key(9)], SIZE)
    node.abandon(0, "w", [])
    node.acquire(0, [key(4)], 10)
    shown = page(node)
    assert shown['mooncake_store_pinned_bytes{kind="hard"}'] == 3 * SIZE
    assert shown['mooncake_store_pinned_bytes{kind="soft"}'] == SIZE
    assert shown["mooncake_store_pins_refused_total"] == 1
    assert shown["mooncake_store_quarantined_bytes"] == SIZE
    assert shown["mooncake_store_leases"] == 1


def test_tenants_with_a_quota_are_shown_so_many_of_them_and_the_others_together(monkeypatch):
    monkeypatch.setattr(metrics, "TENANTS_MAX", 2)
    node = Node(64 * SIZE)
    for tenant in ("b", "c", "d"):  # their names are the operator's; those of others, anybody's
        node.policy.set_quota(tenant, 60 * SIZE)
    number = 0
    for tenant, blocks in (("a", 1), ("b", 5), ("c", 3), ("d", 2), ("", 7)):
        for _ in range(blocks):
            number += 1
            put(node, number, tags=Tags(tenant))
    shown = {name: value for name, value in page(node).items() if "tenant_bytes" in name}
    assert shown == {
        'mooncake_store_tenant_bytes{tenant="b"}': 5 * SIZE,
        'mooncake_store_tenant_bytes{tenant="c"}': 3 * SIZE,
        'mooncake_store_tenant_bytes{tenant="other"}': 3 * SIZE,
    }


def test_both_tiers_show_the_same_things_side_by_side():
    node = Node(2 * SIZE)
    put(node, 1)
    node.acquire(0, [key(1), key(2)], 5)
    zeros = dict.fromkeys(SsdStats.__struct_fields__, 0)
    ssd = SsdStats(
        **{**zeros, "capacity_bytes": 900, "live_bytes": 300, "objects": 3, "hits": 7, "misses": 2}
    )
    shown = {name: value for name, value in page(node, lambda: ssd).items() if "tier" in name}
    assert shown == {
        'mooncake_store_tier_capacity_bytes{tier="dram"}': 2 * SIZE,
        'mooncake_store_tier_capacity_bytes{tier="ssd"}': 900,
        'mooncake_store_tier_used_bytes{tier="dram"}': SIZE,
        'mooncake_store_tier_used_bytes{tier="ssd"}': 300,
        'mooncake_store_tier_blocks{tier="dram"}': 1,
        'mooncake_store_tier_blocks{tier="ssd"}': 3,
        'mooncake_store_tier_hits_total{tier="dram"}': 1,
        'mooncake_store_tier_hits_total{tier="ssd"}': 7,
        'mooncake_store_tier_misses_total{tier="dram"}': 1,
        'mooncake_store_tier_misses_total{tier="ssd"}': 2,
        'mooncake_store_tier_evictions_total{tier="dram"}': 0,
        'mooncake_store_tier_evictions_total{tier="ssd"}': 0,
    }
    assert not any('tier="ssd"' in name for name in page(node))
