"""LRU gives up what was used longest ago, and only as much as is needed."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.eviction import Lru


def filled(*names: str) -> Lru:
    lru = Lru()
    for name in names:
        lru.insert(name.encode(), 10)
    return lru


def test_the_oldest_goes_first():
    assert filled("a", "b", "c").victims(20) == [b"a", b"b"]


def test_a_touch_makes_it_the_youngest():
    lru = filled("a", "b", "c")
    lru.touch(b"a")
    assert lru.victims(100) == [b"b", b"c", b"a"]


def test_victims_are_as_few_as_needed_and_stay_held():
    lru = filled("a", "b", "c")
    assert [len(lru.victims(n)) for n in (0, 1, 10, 11, 30, 99)] == [0, 1, 1, 2, 3, 3]
    assert len(lru) == 3


def test_a_removed_block_is_no_victim():
    lru = filled("a", "b")
    lru.remove(b"a")
    assert b"a" not in lru
    assert lru.victims(99) == [b"b"]
    with pytest.raises(KeyError):
        lru.remove(b"a")


@given(st.lists(st.tuples(st.sampled_from("itr"), st.integers(0, 7)), max_size=60))
def test_lru_agrees_with_a_list_ordered_by_last_use(steps):
    lru, model = Lru(), []
    for kind, number in steps:
        key = bytes([number])
        if kind == "i" and key not in model:
            lru.insert(key, number + 1)
            model.append(key)
        elif kind == "t" and key in model:
            lru.touch(key)
            model.remove(key)
            model.append(key)
        elif kind == "r" and key in model:
            lru.remove(key)
            model.remove(key)
    assert lru.victims(1 << 40) == model
    assert lru.held_bytes == sum(key[0] + 1 for key in model)
    assert len(lru) == len(model)
