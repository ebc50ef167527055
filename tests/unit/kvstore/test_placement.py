"""A block goes where it is wanted, near, and where there is room; the same question has the same answer."""

from collections import Counter
from hashlib import sha256

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvstore.leader.placement import COPIES_MAX, Placer, Room
from mooncake.core.errors import RequestError

MB = 1 << 20
SIZE = MB


def key(n: int) -> bytes:
    return sha256(n.to_bytes(8, "little")).digest()


def placer(**free_mb: int) -> Placer:
    made = Placer()
    for node, free in free_mb.items():
        made.update(Room(node, 100 * MB, free * MB))
    return made


def test_preferred_nodes_come_first_in_their_order_even_when_full():
    choice = placer(a=90, b=0, c=50).choose(key(1), SIZE, 3, preferred=["b", "x", "c", "b"])
    assert choice.nodes == ("b", "c", "a")
    assert choice.missing == 0


def test_replicas_lie_on_distinct_nodes_and_what_is_missing_is_said():
    choice = placer(a=9, b=9).choose(key(1), SIZE, 3)
    assert sorted(choice.nodes) == ["a", "b"]
    assert choice.missing == 1


def test_without_any_node_all_copies_are_missing():
    assert Placer().choose(key(1), SIZE, 2).missing == 2


@pytest.mark.parametrize(("copies", "size"), [(0, SIZE), (COPIES_MAX + 1, SIZE), (1, 0)])
def test_nonsense_is_refused(copies, size):
    with pytest.raises(RequestError):
        placer(a=1).choose(key(1), size, copies)


def test_a_node_smaller_than_the_block_excluded_or_draining_is_never_chosen():
    made = placer(a=9, b=9, c=9)
    made.update(Room("small", SIZE - 1, SIZE - 1))
    made.drain("b")
    choice = made.choose(key(1), SIZE, 4, preferred=["b", "small", "c"], exclude=["c"])
    assert choice.nodes == ("a",)
    made.drain("b", on=False)
    assert sorted(made.choose(key(1), SIZE, 4).nodes) == ["a", "b", "c"]


def test_the_first_copy_goes_near_the_writer_unless_all_there_is_full():
    made = Placer()
    for node, rack, free in [("a", "r1", 90), ("b", "r2", 10), ("c", "r2", 20), ("d", "r3", 1)]:
        made.update(Room(node, 100 * MB, free * MB, rack))
    assert made.choose(key(1), SIZE, near="r2").nodes[0] in ("b", "c")
    assert {made.choose(key(n), 4096, near="r3").nodes[0] for n in range(40)} >= {"a", "b", "c"}
    assert len(made.choose(key(1), SIZE, 3, near="r2").nodes) == 3


def test_of_two_the_freer_one_is_taken():
    made = placer(a=10, b=90)
    assert {made.choose(key(n), 4096).nodes for n in range(20)} == {("b",)}


def test_what_was_given_out_counts_until_the_next_report():
    made = placer(a=50, b=51)
    for n in range(40):
        made.choose(key(n), SIZE)
    assert made.free_ratio("a") == pytest.approx(made.free_ratio("b"), abs=0.02)
    made.update(Room("a", 100 * MB, 5 * MB))
    assert made.free_ratio("a") == 0.05


def test_equal_nodes_share_equally_even_if_full():
    for free in (100, 0):
        made = placer(**{f"n{i}": free for i in range(10)})
        counts = Counter(made.choose(key(n), 4096).nodes[0] for n in range(2000))
        assert min(counts.values()) > 140
        assert max(counts.values()) < 260


def test_a_node_that_left_is_not_chosen():
    made = placer(a=1, b=1)
    made.leave("a")
    made.leave("a")
    assert made.choose(key(1), SIZE, 2).nodes == ("b",)


def test_draining_survives_that_a_node_is_lost_and_found():
    made = placer(a=1, b=1)
    made.drain("a")
    made.leave("a")
    made.update(Room("a", 100 * MB, 100 * MB))
    assert made.choose(key(1), SIZE, 2).nodes == ("b",)


names = st.sampled_from(list("abcdef"))


@given(
    free=st.dictionaries(names, st.integers(0, 100), max_size=6),
    n=st.integers(0, 10_000),
    copies=st.integers(1, 8),
    preferred=st.lists(names, max_size=3),
    exclude=st.lists(names, max_size=3),
)
def test_whatever_is_asked_the_answer_is_distinct_allowed_complete_and_repeatable(
    free, n, copies, preferred, exclude
):
    wanted = {"preferred": preferred, "exclude": exclude}
    choice = placer(**free).choose(key(n), SIZE, copies, **wanted)
    allowed = set(free) - set(exclude)
    assert len(set(choice.nodes)) == len(choice.nodes)
    assert set(choice.nodes) <= allowed
    assert len(choice.nodes) == min(copies, len(allowed))
    assert len(choice.nodes) + choice.missing == copies
    first = [node for node in dict.fromkeys(preferred) if node in allowed][:copies]
    assert list(choice.nodes[: len(first)]) == first
    assert placer(**free).choose(key(n), SIZE, copies, **wanted) == choice
