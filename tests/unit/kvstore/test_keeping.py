"""Hints, pins, groups and quotas reach the policy of a node, and only the blocks they are meant for."""

import math

import pytest

from kvstore.limits import NodeLimits
from kvstore.node.contract import FULL, PRESENT
from kvstore.node.eviction import POLICIES
from kvstore.node.keeping import NO_QUOTA, make_policy, pin, set_quota, tags_of
from kvstore.node.node import HARD_PIN_RATIO, Node
from kvstore.node.pins import Guarded
from kvstore.node.tags import DEPTH_MAX, NAME_CHARS_MAX, PLAIN, SOFT_TTL_S_MAX, Tags
from mooncake.core import wire
from mooncake.core.config import EVICTIONS
from mooncake.core.errors import ConfigError, RequestError
from mooncake.core.messages import Pin, Pinned, Reserve, SetQuota, TenantUsage

SIZE = 8192
SUM = bytes(16)


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def keys(*numbers: int) -> list[bytes]:
    return [key(n) for n in numbers]


def make(blocks: int = 4, eviction: str = "lru", **limits) -> Node:
    return Node(blocks * SIZE, NodeLimits(**limits), make_policy(blocks * SIZE, eviction))


def put(node: Node, *numbers: int, now_s: float = 0.0, **tags) -> None:
    reserved = node.reserve(now_s, "w", keys(*numbers), SIZE, Tags(**tags))
    assert min(reserved.offsets) >= 0
    assert all(node.commit(now_s, reserved.tickets, [SUM] * len(numbers)).done)


def there(node: Node) -> set[int]:
    return {int.from_bytes(k, "big") for k in node.complete_keys()}


def use(node: Node, *numbers: int, now_s: float = 0.0) -> None:
    node.release(now_s, node.acquire(now_s, keys(*numbers), 5.0).lease_id)


# ---------------------------------------------------------------- by name


def test_the_setting_and_the_policies_have_the_same_names():
    assert tuple(POLICIES) == EVICTIONS


@pytest.mark.parametrize("name", ["", "LRU", "arc"])
def test_an_unknown_policy_names_itself_and_what_there_is(name):
    with pytest.raises(ConfigError, match=f"eviction='{name}': one of lru, lfu, length, tail"):
        make_policy(SIZE, name)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_a_ratio_of_hard_pins_is_one(ratio):
    with pytest.raises(ConfigError, match="hard_pin_ratio"):
        make_policy(SIZE, "lru", ratio)


@pytest.mark.parametrize(("eviction", "left"), [("lru", {1, 3}), ("lfu", {2, 3})])
def test_a_node_evicts_by_the_policy_of_that_name(eviction, left):
    node = make(2, eviction)
    put(node, 1)
    put(node, 2)
    use(node, 2)
    use(node, 2)
    use(node, 1)
    put(node, 3)
    assert there(node) == left


# ---------------------------------------------------------------- depth


def test_with_depths_the_length_aware_policy_gives_up_the_deepest_first():
    node = make(5, "length")
    put(node, 1, 2, depth=7)
    put(node, 3, 4, 5, depth=0)
    put(node, 6, depth=0)
    assert there(node) == {1, 3, 4, 5, 6}
    put(node, 7, depth=0)
    assert there(node) == {3, 4, 5, 6, 7}


def test_without_depths_the_length_aware_policy_is_lfu():
    by_length, by_count = make(3, "length"), make(3, "lfu")
    for node in (by_length, by_count):
        put(node, 1, 2, 3)
        use(node, 1, 2)
        put(node, 4)
        use(node, 2)
        put(node, 5)
    assert there(by_length) == there(by_count) == {1, 2, 5}


def tail_node(blocks: int) -> Node:
    """A policy for which the last two blocks of a prompt are quick to compute."""
    from kvstore.node.eviction import TailLru

    return Node(blocks * SIZE, policy=Guarded(0, lambda: TailLru(2)))


def test_with_depths_tail_lru_first_gives_up_the_ends_of_prompts():
    node = tail_node(6)
    put(node, 1, 2, 3, 4, depth=0)
    put(node, 10, 11, depth=0)
    put(node, 20)
    put(node, 21)
    assert there(node) == {1, 2, 10, 11, 20, 21}  # 4 and 3 were older than 10 and 11


def test_what_readers_ask_for_tells_tail_lru_what_follows_a_block():
    node = tail_node(4)
    put(node, 1, 2)
    put(node, 3, 4)
    use(node, 3, 4)  # the end of a prompt
    use(node, 1, 2, 8, 9)  # 8 and 9 are missing, but they follow
    use(node, 3, 4)
    put(node, 5)
    assert there(node) == {1, 2, 3, 5}


def test_without_any_hint_tail_lru_is_lru():
    by_tail, by_age = tail_node(3), make(3)
    for node in (by_tail, by_age):
        put(node, 1, 2, 3)
        put(node, 4)
    assert there(by_tail) == there(by_age) == {1, 2, 4}


# ---------------------------------------------------------------- pins


def test_a_block_reserved_with_a_hard_pin_is_never_evicted():
    node = make(4)
    put(node, 1, 2, hard_pin=True)
    for number in range(10, 30):
        put(node, number)
    assert {1, 2} < there(node)
    assert node.stats().hard_pinned_bytes == 2 * SIZE


def test_the_sum_of_hard_pins_is_bounded_and_what_has_no_room_is_cached_unpinned():
    node = make(4)
    put(node, 1, 2, 3, hard_pin=True)
    assert there(node) == {1, 2, 3}
    assert node.stats().hard_pinned_bytes == 4 * SIZE * HARD_PIN_RATIO
    assert node.pins_refused == 1
    assert node.pin(0, keys(1, 2, 3), math.inf) == 2
    assert node.pins_refused == 2


def test_when_all_that_is_left_is_pinned_a_write_finds_no_room():
    node = Node(2 * SIZE, policy=make_policy(2 * SIZE, "lru", 1.0))
    put(node, 1, 2, hard_pin=True)
    assert node.reserve(0, "w", keys(3), SIZE).offsets == [FULL]
    node.pin(0, keys(1), 0)
    assert node.reserve(0, "w", keys(3), SIZE).offsets[0] >= 0


def test_a_soft_pin_lasts_as_long_as_it_is_hit_in_time():
    node = make(2)
    put(node, 1, soft_pin_s=10)
    use(node, 1, now_s=9)
    put(node, 2, now_s=18)
    put(node, 3, now_s=18)
    assert there(node) == {1, 3}
    put(node, 4, now_s=19)  # its time ran out: now it is the first to go
    assert there(node) == {3, 4}


def test_offering_a_present_block_refreshes_or_gives_a_pin():
    node = make(2)
    put(node, 1)
    assert node.reserve(0, "w", keys(1), SIZE, Tags(soft_pin_s=10)).offsets == [PRESENT]
    assert node.reserve(8, "w", keys(1), SIZE).offsets == [PRESENT]
    put(node, 2, now_s=17)
    put(node, 3, now_s=17)
    assert there(node) == {1, 3}


def test_pin_answers_how_many_blocks_are_as_asked():
    node = make(6)
    put(node, 1, 2, 3)
    node.reserve(0, "w", keys(4), SIZE)  # in writing: not there yet
    held = node.acquire(0, keys(1), 50)  # leased blocks can be pinned
    assert pin(node, 0, Pin(keys(1, 2, 4, 9), 60.0)) == Pinned(2)
    assert node.stats().soft_pinned_bytes == 2 * SIZE
    assert pin(node, 0, Pin(keys(1, 3), math.inf)) == Pinned(2)
    assert (node.stats().soft_pinned_bytes, node.stats().hard_pinned_bytes) == (SIZE, 2 * SIZE)
    node.release(0, held.lease_id)
    assert pin(node, 0, Pin(keys(1, 2, 3, 9), 0.0)) == Pinned(3)
    assert (node.stats().soft_pinned_bytes, node.stats().hard_pinned_bytes) == (0, 0)


def test_a_pin_ends_with_a_drop():
    node = make(2)
    put(node, 1, hard_pin=True)
    assert node.drop(0, keys(1)) == 1
    assert node.stats().hard_pinned_bytes == 0
    put(node, 1)
    put(node, 2)
    put(node, 3)
    assert there(node) == {2, 3}


# ---------------------------------------------------------------- groups


def test_a_lease_on_one_block_of_a_group_holds_them_all():
    node = make(4)
    put(node, 1, group="g")
    put(node, 2, group="g")
    put(node, 3)
    held = node.acquire(0, keys(2), 50)
    assert len(held.blocks) == 1
    assert node.reserve(0, "w", keys(7), 3 * SIZE).offsets == [FULL]
    assert there(node) == {1, 2, 3}
    node.release(0, held.lease_id)
    assert node.reserve(0, "w", keys(7), 3 * SIZE).offsets[0] >= 0


def test_a_group_that_is_too_large_to_lease_along_keeps_no_reader_out():
    node = make(4, leased_blocks_max=2)
    put(node, 1, 2, 3, group="g")
    held = node.acquire(0, keys(1), 50)
    assert len(held.blocks) == 1
    assert len(node.acquire(0, keys(2), 50).blocks) == 1
    assert node.stats().leases == 2


def test_one_victim_takes_its_group_along():
    node = make(4)
    put(node, 1, 2, group="g")
    put(node, 3, 4)
    put(node, 5)
    assert there(node) == {3, 4, 5}
    assert node.shelf.evictions == 2


# ---------------------------------------------------------------- tenants


def test_under_pressure_the_tenant_over_its_quota_gives_first():
    node = make(4)
    assert set_quota(node, 0, SetQuota("greedy", SIZE)) == TenantUsage(0, 0, SIZE)
    put(node, 1, tenant="modest")
    put(node, 2, 3, 4, tenant="greedy")
    put(node, 5, 6, tenant="modest")
    assert there(node) == {1, 2, 5, 6}
    assert set_quota(node, 0, SetQuota("greedy", NO_QUOTA)) == TenantUsage(SIZE, 0, NO_QUOTA)
    assert node.policy.tenants.used() == {"modest": 3 * SIZE, "greedy": SIZE}


def test_a_pin_beyond_the_quota_of_its_tenant_is_not_given():
    node = make(4)
    set_quota(node, 0, SetQuota("t", SIZE))
    put(node, 1, 2, tenant="t", soft_pin_s=60)
    assert set_quota(node, 0, SetQuota("t", SIZE)) == TenantUsage(2 * SIZE, SIZE, SIZE)
    assert node.pins_refused == 1


# ---------------------------------------------------------------- why and when blocks went


def test_ages_and_reasons_of_what_left_are_counted():
    node = make(2)
    put(node, 1, now_s=100.5)
    put(node, 2, now_s=102)
    put(node, 3, now_s=160)  # evicts 1, which is 60 s old
    node.drop(160, keys(2))
    assert (node.shelf.evictions, node.drops, node.checksum_failures) == (1, 1, 0)
    assert node.shelf.ages.counts == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert node.shelf.ages.sum_s == 60


# ---------------------------------------------------------------- the wire


def test_a_reserve_without_hints_is_what_it_always_was():
    old = wire.encode(["rsv", "w", keys(1), SIZE])
    request = wire.decode(old, Reserve)
    assert request == Reserve("w", keys(1), SIZE)
    assert tags_of(request) is PLAIN


def test_hints_travel():
    request = Reserve("w", keys(1), SIZE, tenant="t", group="g", depth=3, soft_pin_s=1.5, hard_pin=True)
    assert tags_of(wire.decode(wire.encode(request), Reserve)) == Tags("t", "g", 3, 1.5, True)


@pytest.mark.parametrize(
    ("tags", "text"),
    [
        ({"tenant": "t" * (NAME_CHARS_MAX + 1)}, "tenant has 129"),
        ({"group": "g" * (NAME_CHARS_MAX + 1)}, "group has 129"),
        ({"depth": -2}, "depth=-2"),
        ({"depth": DEPTH_MAX + 1}, "depth="),
        ({"soft_pin_s": -1.0}, "ttl_s=-1"),
        ({"soft_pin_s": math.nan}, "ttl_s=nan"),
        ({"soft_pin_s": SOFT_TTL_S_MAX + 1}, "ttl_s="),
    ],
)
def test_hints_out_of_bounds_are_refused_and_nothing_is_reserved(tags, text):
    node = make()
    with pytest.raises(RequestError, match=text):
        node.reserve(0, "w", keys(1), SIZE, Tags(**tags))
    assert node.stats().writing == 0


@pytest.mark.parametrize("ttl_s", [-1.0, math.nan, -math.inf, SOFT_TTL_S_MAX + 1])
def test_a_pin_time_out_of_bounds_is_refused(ttl_s):
    node = make()
    put(node, 1)
    with pytest.raises(RequestError, match="ttl_s"):
        node.pin(0, keys(1), ttl_s)


@pytest.mark.parametrize(("tenant", "quota"), [("", 5), ("t", -2), ("t" * 200, 5)])
def test_a_quota_that_makes_no_sense_is_refused(tenant, quota):
    with pytest.raises(RequestError):
        set_quota(make(), 0, SetQuota(tenant, quota))
