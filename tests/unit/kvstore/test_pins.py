"""Pins, groups and quotas decide who is spared before the inner policy decides who is old."""

import math

import pytest

from kvstore.node import pins, tenants
from kvstore.node.eviction import LengthAware, Lfu, Lru, TailLru
from kvstore.node.node import Node
from kvstore.node.pins import Guarded
from kvstore.node.tags import SOFT_TTL_S_MAX, Pin
from kvstore.node.tenants import TenantUse
from mooncake.core.errors import CapacityError, RequestError

ALL = 1 << 40
PAGE = 4096


def guarded(names: str, hard_bytes_max: int = ALL, **known: str) -> Guarded:
    """Hold blocks of 10 bytes, each of one letter, oldest first; `known` are tenant and group of all."""
    policy = Guarded(hard_bytes_max)
    policy.tick(0)
    add(policy, names, **known)
    return policy


def add(policy: Guarded, names: str, **known: str) -> None:
    for name in names:
        policy.admit(name.encode(), 10, **known)
        policy.insert(name.encode(), 10)


def order(policy: Guarded, need_bytes: int = ALL) -> str:
    return b"".join(policy.victims(need_bytes)).decode()


def evict(policy: Guarded, need_bytes: int) -> str:
    victims = policy.victims(need_bytes)
    for key in victims:
        policy.remove(key)
        policy.forget(key)
    return b"".join(victims).decode()


# ------------------------------------------------------------ without any of it


@pytest.mark.parametrize("make", [Lru, Lfu, LengthAware, lambda: TailLru(2)])
def test_without_pins_groups_and_quotas_the_inner_policy_decides(make):
    policy, inner = Guarded(0, make), make()
    for each in (policy, inner):
        for depth, name in reversed(list(enumerate("abcde"))):
            each.insert(name.encode(), 10, depth, 4 - depth)
        each.touch(b"e")
        each.remove(b"c")
        each.insert(b"c", 10)
        each.remove(b"d")
        each.forget(b"d")
        each.touch(b"a")
        each.remove(b"a")
        each.forget(b"a")
        each.insert(b"a", 10, 4, 0)
    assert policy.victims(ALL) == inner.victims(ALL)
    assert [policy.victims(n) for n in range(0, 50, 5)] == [inner.victims(n) for n in range(0, 50, 5)]
    assert (len(policy), policy.held_bytes, b"c" in policy, b"d" in policy) == (4, 40, True, False)


# ------------------------------------------------------------ hard pins


def test_a_hard_pin_is_never_given_up_and_promises_no_room():
    policy = guarded("ab")
    policy.pin_hard(b"a", 10)
    assert order(policy) == "b"
    assert (policy.held_bytes, policy.hard_bytes, policy.pin(b"a")) == (10, 10, Pin.HARD)


def test_a_hard_pin_outlives_leases_and_time_and_ends_with_unpin():
    policy = guarded("ab")
    policy.pin_hard(b"a", 10)
    policy.remove(b"a")
    policy.tick(10 * SOFT_TTL_S_MAX)
    policy.insert(b"a", 10)
    assert order(policy) == "b"
    policy.unpin(b"a")
    assert order(policy) == "ba"
    assert policy.hard_bytes == 0


def test_hard_pins_leave_room_for_the_cache():
    policy = guarded("abc", hard_bytes_max=20)
    policy.pin_hard(b"a", 10)
    policy.pin_hard(b"b", 10)
    policy.remove(b"a")  # leased: it counts as before
    policy.pin_hard(b"a", 10)  # pinned already: counts once
    with pytest.raises(CapacityError, match="20 of 20"):
        policy.pin_hard(b"c", 10)
    policy.forget(b"a")
    policy.pin_hard(b"c", 10)
    assert policy.hard_bytes == 20


def test_a_soft_pin_does_not_weaken_a_hard_one_and_a_hard_one_ends_the_soft():
    policy = guarded("a")
    policy.pin_soft(b"a", 10, 5)
    policy.pin_hard(b"a", 10)
    policy.pin_soft(b"a", 10, 5)
    policy.tick(6)
    assert policy.pin(b"a") is Pin.HARD
    assert (order(policy), policy.soft_pins) == ("", 0)


# ------------------------------------------------------------ soft pins


def test_soft_pins_go_last():
    policy = guarded("abcd")
    policy.pin_soft(b"b", 10, 60)
    policy.pin_soft(b"a", 10, 60)
    assert order(policy) == "cdba"
    assert policy.held_bytes == 40


def test_a_soft_pin_lapses_when_it_was_not_hit_for_its_time_and_then_goes_first():
    policy = guarded("abc")
    policy.pin_soft(b"c", 10, 5)
    policy.tick(4.9)
    assert (order(policy), policy.pin(b"c")) == ("abc", Pin.SOFT)
    policy.tick(5)
    assert (order(policy), policy.pin(b"c"), policy.soft_pins) == ("cab", Pin.NONE, 0)


def test_a_hit_starts_the_time_anew():
    policy = guarded("ab")
    policy.pin_soft(b"a", 10, 5)
    for now_s in (4, 8, 12):
        policy.tick(now_s)
        policy.touch(b"a")
    policy.tick(16.9)
    assert order(policy) == "ba"
    policy.tick(17)
    assert order(policy) == "ab"
    assert policy.pin(b"a") is Pin.NONE


def test_a_leased_block_keeps_its_pin_and_the_end_of_the_lease_is_a_hit():
    policy = guarded("ab")
    policy.pin_soft(b"a", 10, 5)
    policy.remove(b"a")
    policy.tick(100)
    policy.insert(b"a", 10)
    policy.tick(104)
    assert order(policy) == "ba"
    policy.tick(105)
    assert policy.pin(b"a") is Pin.NONE


def test_a_lease_within_the_time_starts_it_anew_at_its_end():
    policy = guarded("a")
    policy.pin_soft(b"a", 10, 5)
    policy.remove(b"a")
    policy.tick(4)
    policy.insert(b"a", 10)
    policy.tick(8)
    assert policy.pin(b"a") is Pin.SOFT


def test_a_hit_after_its_time_makes_it_a_block_like_others():
    policy = guarded("ab")
    policy.pin_soft(b"a", 10, 5)
    policy.tick(5)
    policy.touch(b"a")
    assert order(policy) == "ba"


def test_of_lapsed_pins_the_one_that_lapsed_first_goes_first():
    policy = guarded("abc")
    for name, ttl_s in ((b"a", 9), (b"b", 4), (b"c", 5)):
        policy.pin_soft(name, 10, ttl_s)
    policy.tick(3)
    policy.touch(b"b")  # so it would lapse at 7
    policy.tick(20)
    assert order(policy) == "cba"


def test_a_new_soft_pin_replaces_the_time_of_the_old_one_either_way():
    policy = guarded("ab")
    policy.pin_soft(b"a", 10, 100)
    policy.pin_soft(b"a", 10, 5)
    policy.pin_soft(b"b", 10, 5)
    policy.pin_soft(b"b", 10, 100)
    policy.tick(5)
    assert (policy.pin(b"a"), policy.pin(b"b"), policy.soft_pins) == (Pin.NONE, Pin.SOFT, 1)


@pytest.mark.parametrize("ttl_s", [0, -1, 1e-9, SOFT_TTL_S_MAX + 1, float("nan"), float("inf")])
def test_a_time_out_of_bounds_is_refused(ttl_s):
    with pytest.raises(RequestError, match="ttl_s"):
        guarded("a").pin_soft(b"a", 10, ttl_s)


def test_a_leased_block_can_be_pinned():
    policy = guarded("abc")
    policy.remove(b"a")
    policy.remove(b"b")
    policy.pin_hard(b"a", 10)
    policy.pin_soft(b"b", 10, 5)
    policy.insert(b"b", 10)
    policy.insert(b"a", 10)
    assert (order(policy), policy.hard_bytes, policy.soft_bytes) == ("cb", 10, 10)


def test_a_block_without_pin_group_and_tenant_leaves_no_record():
    policy = guarded("abcd")
    assert policy._blocks == {}
    policy.pin_soft(b"a", 10, 5)
    policy.pin_soft(b"b", 10, 5)
    policy.pin_hard(b"c", 10)
    policy.pin_soft(b"d", 10, 60)
    policy.tick(6)  # a and b lapsed
    policy.touch(b"a")
    policy.remove(b"b")
    policy.insert(b"b", 10)
    policy.unpin(b"c")
    policy.unpin(b"d")
    assert policy._blocks == {}
    assert order(policy) == "abcd"


def test_a_lapsed_block_that_is_unpinned_stays_first_to_go():
    policy = guarded("ab")
    policy.pin_soft(b"b", 10, 5)
    policy.tick(5)
    policy.unpin(b"b")
    assert order(policy) == "ba"
    policy.unpin(b"unknown")
    assert policy.pin(b"unknown") is Pin.NONE


def test_a_pin_ends_with_the_block():
    policy = guarded("a")
    policy.pin_soft(b"a", 10, 5)
    assert evict(policy, 10) == "a"
    add(policy, "ba")
    assert (order(policy), policy.soft_pins) == ("ba", 0)
    policy.tick(5)  # the old timer rings for nobody
    assert order(policy) == "ba"


def test_superseded_timers_are_swept():
    policy = guarded("a")
    for _ in range(10 * pins.STALE_MIN):
        policy.pin_soft(b"a", 10, 5)
        policy.unpin(b"a")
    assert len(policy._timers) <= pins.STALE_MIN + 3
    policy.pin_soft(b"a", 10, 5)
    policy.tick(5)
    assert policy.pin(b"a") is Pin.NONE


# ------------------------------------------------------------ groups


def test_one_victim_takes_its_group_along():
    policy = guarded("ab")
    add(policy, "cd", group="g")
    add(policy, "e")
    policy.touch(b"a")
    policy.touch(b"b")
    policy.touch(b"d")
    assert order(policy, 1) == "cd"
    assert order(policy, 21) == "cde"


def test_what_is_leased_or_held_more_firmly_stays_when_its_group_goes():
    policy = guarded("abcde", group="g")
    policy.remove(b"b")
    policy.pin_soft(b"c", 10, 60)
    policy.pin_hard(b"d", 10)
    assert order(policy, 1) == "ae"


def test_a_soft_pinned_victim_takes_soft_pinned_companions():
    policy = guarded("abc", group="g")
    for name in (b"a", b"b", b"c"):
        policy.pin_soft(name, 10, 60)
    policy.pin_hard(b"c", 10)
    assert order(policy, 1) == "ab"


def test_companions_are_the_other_complete_blocks_leased_or_not():
    policy = guarded("ab", group="g")
    add(policy, "c", group="h")
    add(policy, "d", group="g")
    policy.remove(b"d")
    assert policy.companions(b"a") == [b"b", b"d"]
    assert policy.companions(b"c") == policy.companions(b"x") == []
    policy.forget(b"d")
    assert policy.companions(b"a") == [b"b"]


def test_a_group_ends_with_its_last_block():
    policy = guarded("ab", group="g")
    assert evict(policy, 1) == "ab"
    assert policy._groups == {}


def test_beyond_the_bound_of_a_group_blocks_stand_alone(monkeypatch):
    monkeypatch.setattr(pins, "GROUP_KEYS_MAX", 2)
    policy = guarded("abc", group="g")
    assert order(policy, 1) == "ab"
    assert policy.companions(b"c") == []


# ------------------------------------------------------------ tenants


def test_who_is_over_quota_gives_first_and_only_down_to_the_quota():
    policy = guarded("ab", tenant="small")
    add(policy, "cdefg", tenant="big")
    policy.set_quota("small", 20)
    policy.set_quota("big", 30)
    assert order(policy, 15) == "cd"
    assert order(policy, 30) == "cda"


def test_the_tenant_furthest_over_gives_first():
    policy = guarded("ab", tenant="p")
    add(policy, "cdef", tenant="q")
    add(policy, "ghi", tenant="r")
    for tenant in "pqr":
        policy.set_quota(tenant, 10)
    assert order(policy) == "cdeghabfi"


@pytest.mark.parametrize(("make", "first"), [(Lru, "cab"), (Lfu, "bca")])
def test_the_blocks_of_a_tenant_over_quota_go_in_the_order_of_the_policy(make, first):
    policy = Guarded(0, make)
    policy.set_quota("t", 0)
    for _ in range(3):  # what was learnt about "b" ends with it, in the tenant's order too
        add(policy, "b", tenant="t")
        assert evict(policy, 10) == "b"
    add(policy, "abc", tenant="t")
    add(policy, "x")
    for name in (b"a", b"a", b"b") if make is Lru else (b"a", b"a", b"c"):
        policy.touch(name)
    assert order(policy, 30) == first


def test_a_quota_takes_nothing_while_nobody_needs_it():
    policy = guarded("abc", tenant="t")
    policy.set_quota("t", 0)
    assert order(policy, 0) == ""
    assert policy.tenants.use("t") == TenantUse(30, 0, 0)


def test_without_quota_nobody_is_over():
    policy = guarded("abc", tenant="t")
    add(policy, "d")
    policy.set_quota("t", 10)
    policy.set_quota("t", None)
    policy.touch(b"a")
    assert order(policy) == "bcda"


def test_leases_count_for_a_tenant_until_the_block_is_gone():
    policy = guarded("abc", tenant="t")
    policy.set_quota("t", 20)
    policy.remove(b"a")
    assert (policy.tenants.use("t").used_bytes, order(policy, 10)) == (30, "b")
    policy.forget(b"a")
    add(policy, "x")
    policy.touch(b"b")
    policy.touch(b"c")
    assert (policy.tenants.use("t").used_bytes, order(policy, 10)) == (20, "x")


def test_what_a_tenant_pins_must_fit_into_its_quota():
    policy = guarded("abcd", tenant="t")
    policy.set_quota("t", 20)
    policy.pin_soft(b"a", 10, 60)
    policy.pin_hard(b"b", 10)
    policy.pin_hard(b"a", 10)  # its bytes are pinned already
    for pin in (lambda: policy.pin_soft(b"c", 10, 60), lambda: policy.pin_hard(b"c", 10)):
        with pytest.raises(CapacityError, match="'t' has pinned 20 of 20"):
            pin()
    assert policy.tenants.use("t") == TenantUse(40, 20, 20)
    policy.unpin(b"a")
    policy.pin_soft(b"c", 10, 60)
    assert policy.tenants.use("t") == TenantUse(40, 20, 20)


def test_quotas_are_bounded_and_sane(monkeypatch):
    monkeypatch.setattr(tenants, "QUOTAS_MAX", 1)
    policy = Guarded(0)
    policy.set_quota("a", 5)
    policy.set_quota("a", 6)
    with pytest.raises(CapacityError, match="1 tenants"):
        policy.set_quota("b", 5)
    policy.set_quota("a", None)
    policy.set_quota("b", 5)
    with pytest.raises(RequestError, match="-1"):
        policy.set_quota("b", -1)


def test_a_tenant_without_blocks_and_quota_costs_nothing():
    policy = guarded("a", tenant="t")
    evict(policy, 10)
    policy.set_quota("u", None)
    assert policy.tenants.used() == {}


# ------------------------------------------------------------ in a node


def test_a_node_evicts_around_pins():
    policy = Guarded(PAGE)
    node = Node(4 * PAGE, policy=policy)
    keys = [bytes([n]) * 32 for n in range(7)]

    def put(number):
        reply = node.reserve(0, "w", [keys[number]], PAGE)
        return node.commit(0, reply.tickets, [bytes(16)]).done[0]

    assert all(put(n) for n in range(4))
    assert node.pin(0, keys[:1], math.inf) == 1
    assert node.pin(0, keys[1:2], 60) == 1
    assert all(put(n) for n in range(4, 7))
    assert sorted(node.complete_keys()) == [keys[0], keys[1], keys[5], keys[6]]
    assert node.acquire(0, keys[:1], 1).blocks
