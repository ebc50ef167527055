"""Each policy gives up first what its name says, and only as much as is needed."""

import sys

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.node import eviction
from kvstore.node.eviction import EvictionPolicy, LengthAware, Lfu, Lru, TailLru
from mooncake.core.errors import ConfigError

SLACK = 3
POLICIES = {
    "lru": Lru,
    "lfu": Lfu,
    "length-aware": LengthAware,
    "tail": lambda: TailLru(SLACK),
}
every_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES.keys())


def filled(policy: EvictionPolicy, *names: str) -> EvictionPolicy:
    for name in names:
        policy.insert(name.encode(), 10)
    return policy


def prompt(policy: EvictionPolicy, names: str) -> None:
    """Use the blocks `names` of one prompt, as the node does: the last one first."""
    for depth in reversed(range(len(names))):
        key, below = names[depth].encode(), len(names) - 1 - depth
        if key in policy:
            policy.touch(key, below)
        else:
            policy.insert(key, 1, depth, below)


def order(policy: EvictionPolicy) -> str:
    return b"".join(policy.victims(1 << 40)).decode()


# ------------------------------------------------------------ what holds for all


@every_policy
def test_the_oldest_goes_first(make):
    assert filled(make(), "a", "b", "c").victims(20) == [b"a", b"b"]


@every_policy
def test_a_touch_makes_it_the_youngest(make):
    policy = filled(make(), "a", "b", "c")
    policy.touch(b"a")
    assert policy.victims(100) == [b"b", b"c", b"a"]


@every_policy
def test_victims_are_as_few_as_needed_and_stay_held(make):
    policy = filled(make(), "a", "b", "c")
    assert [len(policy.victims(n)) for n in (0, 1, 10, 11, 30, 99)] == [0, 1, 1, 2, 3, 3]
    assert len(policy) == 3


@every_policy
def test_a_removed_block_is_no_victim(make):
    policy = filled(make(), "a", "b")
    policy.remove(b"a")
    assert b"a" not in policy
    assert policy.victims(99) == [b"b"]
    with pytest.raises(KeyError):
        policy.remove(b"a")


@every_policy
def test_forgetting_what_was_never_known_is_fine(make):
    policy = make()
    policy.forget(b"a")
    assert len(policy) == policy.held_bytes == 0


# ------------------------------------------------------------ what each is for


def test_lfu_gives_up_what_was_used_least_though_it_was_used_last():
    lfu = filled(Lfu(), "a", "b")
    lfu.touch(b"a")
    lfu.insert(b"c", 10)
    assert order(lfu) == "bca"


@pytest.mark.parametrize("make", [Lfu, LengthAware])
def test_counts_outlive_a_lease_and_end_with_the_block(make):
    policy = filled(make(), "a", "b", "c")
    for key in (b"a", b"b"):
        policy.remove(key)  # leased: its second use counts when the lease ends
    policy.insert(b"a", 10)
    policy.forget(b"b")
    policy.insert(b"b", 10)
    assert order(policy) == "cba"


def test_length_aware_gives_up_the_deepest_of_equally_used():
    policy = LengthAware()
    prompt(policy, "abc")
    prompt(policy, "xyzuv")
    assert order(policy) == "vuczbyax"
    prompt(policy, "ab")
    assert order(policy) == "vuczyxba"


def test_a_depth_outlives_a_lease():
    policy = LengthAware()
    prompt(policy, "abc")
    for key in (b"b", b"c"):
        policy.remove(key)
    policy.insert(b"b", 1)
    policy.insert(b"c", 1)
    assert order(policy) == "acb"


def test_tail_lru_first_gives_up_what_fits_into_the_budget_of_the_next_turn():
    policy = TailLru(budget_blocks=3, next_blocks=1)  # so two blocks of each prompt can go
    prompt(policy, "abcde")
    prompt(policy, "xy")
    assert order(policy) == "edyxcba"


def test_a_longer_prompt_makes_its_beginning_needed_for_good():
    policy = TailLru(2)
    prompt(policy, "abc")
    prompt(policy, "abcdef")
    prompt(policy, "ab")  # a short prompt over the same blocks does not make them spare again
    assert order(policy) == "fedcba"


def test_what_follows_a_block_is_known_after_a_lease_and_not_after_its_end():
    policy = TailLru(2)
    prompt(policy, "abc")
    prompt(policy, "xyz")
    for key in (b"a", b"b", b"c", b"x"):
        policy.remove(key)
    policy.forget(b"a")
    for key in (b"x", b"c", b"b"):
        policy.insert(key, 1)
    policy.insert(b"a", 1, 0, 0)
    assert order(policy) == "zycbax"


@pytest.mark.parametrize("policy", [TailLru(0), TailLru(5, 5), TailLru(5, 9)])
def test_without_a_budget_left_tail_lru_is_lru(policy):
    prompt(policy, "abc")
    prompt(policy, "xab")
    assert order(policy) == "cbax"


@pytest.mark.parametrize("numbers", [(-1, 0), (0, -1)])
def test_a_negative_budget_is_refused(numbers):
    with pytest.raises(ConfigError, match="at least 0"):
        TailLru(*numbers)


# ------------------------------------------------------------ against naive models


class Model:
    """Everything in dicts, sorted anew at each question; also the definition of each order."""

    def __init__(self, name):
        self.name, self.now = name, 0
        self.size, self.last, self.uses, self.depth, self.below = {}, {}, {}, {}, {}

    def insert(self, key, size, depth, below):
        self.size[key] = size
        self.uses[key] = self.uses.get(key, 0) + 1
        self.depth[key] = depth if depth is not None else self.depth.get(key, 0)
        self.learn(key, below)

    def touch(self, key, below):
        self.uses[key] += 1
        self.learn(key, below)

    def learn(self, key, below):
        self.now += 1
        self.last[key] = self.now
        if below is not None:
            self.below[key] = max(below, self.below.get(key, 0))

    def remove(self, key):
        del self.size[key]

    def forget(self, key):
        for facts in (self.uses, self.depth, self.below):
            facts.pop(key, None)

    def rank(self, key):
        needed = self.below.get(key, SLACK) >= SLACK
        first = {
            "lru": (),
            "lfu": (self.uses[key],),
            "length-aware": (self.uses[key], -self.depth[key]),
            "tail": (needed,),
        }[self.name]
        return (*first, self.last[key])

    def victims(self, need):
        chosen = []
        for key in sorted(self.size, key=self.rank):
            if sum(self.size[k] for k in chosen) >= need:
                break
            chosen.append(key)
        return chosen


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "insert", "touch", "remove", "forget", "evict"]),
        st.integers(0, 7),
        st.none() | st.integers(0, 4),
        st.none() | st.integers(0, 5),
    ),
    max_size=60,
)


def run(policy, model, steps):
    """Drive both; return what was evicted."""
    evicted = []
    for kind, number, depth, below in steps:
        key = bytes([number])
        if kind == "insert" and key not in model.size:
            policy.insert(key, number + 1, depth, below)
            model.insert(key, number + 1, depth, below)
        elif kind == "touch" and key in model.size:
            policy.touch(key, below)
            model.touch(key, below)
        elif kind == "remove" and key in model.size:
            policy.remove(key)
            model.remove(key)
        elif kind == "forget" and key not in model.size:
            policy.forget(key)
            model.forget(key)
        elif kind == "evict":
            victims = policy.victims(number)
            assert victims == model.victims(number)
            for victim in victims:
                for each in (policy, model):
                    each.remove(victim)
                    each.forget(victim)
            evicted += victims
        assert policy.held_bytes == sum(model.size.values())
        assert len(policy) == len(model.size)
        assert (key in policy) == (key in model.size)
        if key in model.size:
            assert policy.size_of(key) == model.size[key]
    assert policy.victims(1 << 40) == model.victims(1 << 40)
    return evicted


@pytest.mark.parametrize("name", POLICIES)
@given(STEPS)
def test_a_policy_agrees_with_its_naive_model(name, steps):
    run(POLICIES[name](), Model(name), steps)


@pytest.mark.parametrize("name", ["lru", "tail"])
@given(STEPS)
def test_keeping_only_the_oldest_few_apart_changes_no_choice(name, steps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction, "OLDEST_MAX", 2)
        run(POLICIES[name](), Model(name), steps)


@pytest.mark.parametrize("name", POLICIES)
@given(STEPS)
def test_the_same_uses_evict_the_same_blocks(name, steps):
    assert run(POLICIES[name](), Model(name), steps) == run(POLICIES[name](), Model(name), steps)


# ------------------------------------------------------------ bounds


@pytest.mark.parametrize("make", [Lfu, LengthAware])
def test_superseded_entries_are_swept(make):
    policy = filled(make(), "a", "b")
    for _ in range(10 * eviction.STALE_MIN):
        policy.touch(b"a")
        policy.remove(b"b")
        policy.insert(b"b", 10)
    assert len(policy._heap) <= 2 * len(policy) + eviction.STALE_MIN + 1


def test_gaps_of_removed_blocks_are_not_walked_over_again_and_again():
    lru = Lru()
    for number in range(5_000):
        lru.insert(number.to_bytes(2, "big"), 1)
    for number in range(4_990):
        lru.remove(number.to_bytes(2, "big"))
    before = sys.getsizeof(lru._sizes)
    assert len(lru.victims(3)) == 3
    assert sys.getsizeof(lru._sizes) < before / 50
    walks = [lru._oldest]
    for _ in range(10):
        key = lru.victims(1)[0]
        lru.remove(key)
        walks.append(lru._oldest)
    assert lru.victims(1) == []
    assert all(kept is walks[0] for kept in walks)


@pytest.mark.parametrize("make", [Lfu, LengthAware, lambda: TailLru(2)])
def test_of_too_many_removed_blocks_the_oldest_memory_goes(make, monkeypatch):
    """A node that never says `forget` costs bounded memory."""
    monkeypatch.setattr(eviction, "REMEMBERED_MAX", 3)
    policy = make()
    for number in range(9):
        policy.insert(bytes([number]), 1, 0, 0)
        policy.remove(bytes([number]))
    assert list(policy._away._facts) == [bytes([n]) for n in (6, 7, 8)]
