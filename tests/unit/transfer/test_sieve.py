"""SIEVE against a model written from the paper's pseudo-code, and its promises one by one."""

from hypothesis import given
from hypothesis import strategies as st

from transfer.sieve import Sieve


class Node:
    """Of the paper's doubly linked list: `next` is towards the head (newer)."""

    def __init__(self, key):
        self.key, self.used, self.newer, self.older = key, False, None, None


class Model:
    """Algorithm 1 of the paper, with pinned keys stepped over."""

    def __init__(self):
        self.nodes, self.head, self.tail, self.hand = {}, None, None, None

    def add(self, key):
        node = self.nodes[key] = Node(key)
        node.older = self.head
        if self.head:
            self.head.newer = node
        self.head = node
        self.tail = self.tail or node

    def touch(self, key):
        self.nodes[key].used = True

    def remove(self, key):
        node = self.nodes.pop(key)
        if self.hand is node:
            self.hand = node.newer
        if node.newer:
            node.newer.older = node.older
        else:
            self.head = node.older
        if node.older:
            node.older.newer = node.newer
        else:
            self.tail = node.newer

    def evict(self, pinned):
        if not set(self.nodes) - pinned:
            return None
        node = self.hand or self.tail
        while node.used or node.key in pinned:
            if node.key not in pinned:
                node.used = False
            node = node.newer or self.tail
        self.hand = node
        self.remove(node.key)
        return node.key


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "touch", "remove", "evict"]), st.integers(0, 7), st.sets(st.integers(0, 7))
    ),
    max_size=60,
)


@given(STEPS)
def test_it_evicts_what_the_papers_algorithm_evicts(steps):
    sieve, model = Sieve(), Model()
    for what, key, pinned in steps:
        if what == "evict":
            held = set(model.nodes)
            if not held - pinned:
                assert sieve.evict(lambda k, p=pinned: k not in p) is None
                continue
            assert sieve.evict(lambda k, p=pinned: k not in p) == model.evict(pinned)
        elif what == "add" and key not in model.nodes:
            sieve.add(key)
            model.add(key)
        elif what == "touch" and key in model.nodes:
            sieve.touch(key)
            model.touch(key)
        elif what == "remove" and key in model.nodes:
            sieve.remove(key)
            model.remove(key)
        assert len(sieve) == len(model.nodes)
        assert all(k in sieve for k in model.nodes)


def test_what_was_used_since_the_last_walk_stays():
    sieve = Sieve()
    for key in "abc":
        sieve.add(key)
    sieve.touch("a")
    assert sieve.evict(lambda _: True) == "b"
    assert sieve.evict(lambda _: True) == "c"
    assert sieve.evict(lambda _: True) == "a"
    assert sieve.evict(lambda _: True) is None


def test_a_thing_in_use_is_never_given_up():
    sieve = Sieve()
    for key in "ab":
        sieve.add(key)
    assert sieve.evict(lambda key: key != "a") == "b"
    assert sieve.evict(lambda key: key != "a") is None
    assert "a" in sieve


def test_removing_twice_is_harmless():
    sieve = Sieve()
    sieve.add("a")
    sieve.remove("a")
    sieve.remove("a")
    assert len(sieve) == 0
