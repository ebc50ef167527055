"""The directory answers with what nodes said, trusts it as far as their streams are whole, and forgets."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.directory.directory import DEAD_BITS_MAX, Directory, Mode
from mooncake.core.errors import ProtocolError, RequestError


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def blob(*numbers: int) -> bytes:
    return b"".join(key(n) for n in numbers)


def keys(*numbers: int) -> list[bytes]:
    return [key(n) for n in numbers]


def directory(**held: tuple[int, ...]) -> Directory:
    """A directory whose nodes are in step and hold these."""
    made = Directory()
    made.members_known = True
    for node, numbers in held.items():
        made.join(0.0, node, "e1")
        made.on_snapshot(0.0, node, "e1", [blob(*numbers)])
    return made


def test_every_key_is_answered_with_all_its_holders():
    made = directory(a=(1, 2), b=(2, 3))
    assert made.replicas(keys(1, 2, 3, 4)) == [("a",), ("a", "b"), ("b",), ()]


def test_a_prefix_may_be_covered_by_several_nodes_together():
    prefix = directory(a=(1, 2, 5), b=(1, 3), c=(2, 3)).longest_prefix(keys(1, 2, 3, 4, 5))
    assert prefix.covered == 3
    assert prefix.by_node == {"a": 2, "b": 1}


def test_the_prefix_of_nothing_is_nothing():
    assert directory().longest_prefix(keys(1)).covered == 0
    assert directory(a=(2,)).longest_prefix(keys(1, 2)).by_node == {}
    assert directory(a=(1,)).longest_prefix([]).by_node == {}


def test_events_change_one_node_only():
    made = directory(a=(1, 2), b=(1,))
    made.on_events(1.0, "a", blob(3), blob(1, 2))
    assert made.replicas(keys(1, 2, 3)) == [("b",), (), ("a",)]


def test_keys_that_differ_in_one_bit_are_different_keys():
    base = bytearray(range(32))
    made = directory()
    made.join(0.0, "a", "e1")
    made.on_snapshot(0.0, "a", "e1", [bytes(base)])
    for position in range(256):
        other = bytearray(base)
        other[position // 8] ^= 1 << position % 8
        assert made.replicas([bytes(other)]) == [()]
    assert made.keys_of("a") == [bytes(base)]


@pytest.mark.parametrize("wrong", [b"", key(1)[:31], key(1) + b"\0"])
def test_a_key_of_another_length_is_refused_not_confused(wrong):
    made = directory(a=(1,))
    with pytest.raises(RequestError, match="32 bytes"):
        made.replicas([wrong])
    with pytest.raises(RequestError, match="32 bytes"):
        made.longest_prefix([wrong])


def test_half_a_key_changes_nothing():
    made = directory(a=(1,))
    with pytest.raises(ProtocolError, match="whole number"):
        made.on_events(1.0, "a", blob(2), blob(1)[:-1])
    with pytest.raises(ProtocolError, match="whole number"):
        made.on_snapshot(1.0, "a", "e1", [blob(2), b"x"])
    assert made.replicas(keys(1, 2)) == [("a",), ()]
    assert made.mode() is Mode.EXACT


def test_it_is_exact_only_when_members_are_known_and_all_in_step():
    made = Directory()
    assert made.mode() is Mode.DEGRADED
    made.members_known = True
    assert made.mode() is Mode.EXACT
    made.join(3.0, "a", "e1")
    assert made.mode() is Mode.DEGRADED
    assert made.lag_s(5.0) == 2.0
    assert [made.is_exact(node) for node in "ab"] == [False, True]
    made.on_snapshot(5.0, "a", "e1", [])
    assert (made.mode(), made.lag_s(9.0)) == (Mode.EXACT, 0.0)


def test_a_node_out_of_step_is_a_hint_behind_the_exact_ones():
    made = directory(a=(1,), b=(1,))
    made.on_stale(4.0, "a", "gap")
    assert made.replicas(keys(1)) == [("b", "a")]
    assert made.replicas(keys(1), exact_only=True) == [("b",)]
    (status, _) = made.status(6.5)
    assert (status.node, status.mode, status.lag_s, status.reason) == ("a", Mode.DEGRADED, 2.5, "gap")
    made.on_stale(6.0, "a", "silent")  # said again: the lag counts from the first time
    assert made.lag_s(6.5) == 2.5
    made.on_snapshot(7.0, "a", "e1", [blob(1)])
    assert made.replicas(keys(1)) == [("a", "b")]


def test_a_snapshot_replaces_everything_known_of_its_node():
    made = directory(a=(1, 2), b=(2,))
    made.on_snapshot(1.0, "a", "e1", [blob(3), blob(4)])
    assert made.replicas(keys(1, 2, 3, 4)) == [(), ("b",), ("a",), ("a",)]


def test_a_snapshot_in_pieces_is_trusted_at_its_end():
    made = directory(a=(1,), b=(1,))
    made.begin_snapshot(1.0, "a", "e1")
    made.add_page("a", blob(2))
    assert made.replicas(keys(1, 2)) == [("b",), ("a",)]
    assert (made.is_exact("a"), made.lag_s(1.5)) == (False, 0.5)
    with pytest.raises(ProtocolError):
        made.add_page("a", b"half")
    made.add_page("a", blob(3))
    made.end_snapshot("a")
    assert made.replicas(keys(1, 2, 3)) == [("b",), ("a",), ("a",)]
    assert made.mode() is Mode.EXACT


def test_a_snapshot_that_was_overtaken_by_distrust_is_not_trusted():
    made = directory(a=(1,))
    made.begin_snapshot(1.0, "a", "e1")
    made.add_page("a", blob(1))
    made.on_stale(1.0, "a", "gap")
    made.end_snapshot("a")
    assert (made.mode(), made.status(1.0)[0].reason) == (Mode.DEGRADED, "gap")


def test_a_restarted_node_holds_nothing_until_it_says_so():
    made = directory(a=(1,))
    made.join(1.0, "a", "e1")  # its record was written again
    assert made.replicas(keys(1)) == [("a",)]
    made.join(2.0, "a", "e2")
    assert made.replicas(keys(1)) == [()]
    assert made.mode() is Mode.DEGRADED


def test_a_node_that_left_is_gone_and_late_words_of_it_are_ignored():
    made = directory(a=(1,), b=(1,))
    assert made.leave("a")
    assert not made.leave("a")
    made.on_events(1.0, "a", blob(2), b"")
    made.on_snapshot(1.0, "a", "e1", [blob(2)])
    made.on_stale(1.0, "a", "late")
    assert made.replicas(keys(1, 2)) == [("b",), ()]
    assert made.keys_of("a") == []
    assert made.mode() is Mode.EXACT


def test_dead_bits_are_swept_and_free_their_keys():
    made = directory(a=(1,), b=(1,))
    for n in range(DEAD_BITS_MAX - 2):  # joining and a first snapshot cost each a bit, too
        made.on_snapshot(1.0, "a", "e1", [blob(10 + n)])
    assert made.sweeps == 1
    assert len(made) == 2  # key 1 of b, and the last of a
    assert made.replicas(keys(1, 10, 10 + DEAD_BITS_MAX - 3)) == [("b",), (), ("a",)]


def test_more_nodes_than_bits_of_a_machine_word_are_told_apart():
    made = directory(**{f"n{i}": (i, 1000) for i in range(200)})
    assert made.replicas(keys(0, 63, 64, 199)) == [("n0",), ("n63",), ("n64",), ("n199",)]
    assert len(made.replicas(keys(1000))[0]) == 200


def test_a_full_directory_says_so_and_recovers_with_a_snapshot_that_fits():
    made = Directory(blocks_max=2)
    made.members_known = True
    made.join(0.0, "a", "e1")
    made.on_snapshot(0.0, "a", "e1", [blob(1)])
    made.on_events(1.0, "a", blob(2, 3), b"")
    assert len(made) == 2
    assert made.overflows == 1
    assert (made.mode(), made.status(1.0)[0].reason) == (Mode.DEGRADED, "directory full")
    made.on_snapshot(2.0, "a", "e1", [blob(4, 5)])  # what was there before does not take room
    assert made.replicas(keys(1, 4, 5)) == [(), ("a",), ("a",)]
    assert made.mode() is Mode.EXACT


def test_keys_of_a_node_are_those_it_holds():
    assert sorted(directory(a=(1, 2), b=(2, 3)).keys_of("b")) == keys(2, 3)


NODES = ("a", "b", "c")
nodes = st.sampled_from(NODES)
numbers = st.lists(st.integers(0, 7), max_size=6, unique=True)


class Model(RuleBasedStateMachine):
    """Against a plain dict of sets; what a stream in step could say, in any order."""

    def __init__(self):
        super().__init__()
        self.directory = Directory()
        self.directory.members_known = True
        self.held: dict[str, set[int]] = {}
        self.exact: dict[str, bool] = {}
        self.epochs: dict[str, int] = {}

    @rule(node=nodes, restart=st.booleans())
    def join(self, node, restart):
        if node not in self.held or restart:
            self.epochs[node] = self.epochs.get(node, 0) + 1
            self.held[node], self.exact[node] = set(), False
        self.directory.join(0.0, node, str(self.epochs[node]))

    @rule(node=nodes)
    def leave(self, node):
        assert self.directory.leave(node) == (node in self.held)
        self.held.pop(node, None)
        self.exact.pop(node, None)

    @rule(node=nodes, held=numbers, pages=st.integers(1, 3))
    def snapshot(self, node, held, pages):
        parts = [blob(*held[i::pages]) for i in range(pages)]
        self.directory.on_snapshot(0.0, node, str(self.epochs.get(node)), parts)
        if node in self.held:
            self.held[node], self.exact[node] = set(held), True

    @rule(node=nodes, changed=numbers)
    def change(self, node, changed):
        before = self.held.get(node, set())
        self.directory.on_events(
            0.0,
            node,
            blob(*(n for n in changed if n not in before)),
            blob(*(n for n in changed if n in before)),
        )
        if node in self.held:
            self.held[node] = before ^ set(changed)

    @rule(node=nodes)
    def stale(self, node):
        self.directory.on_stale(0.0, node, "test")
        if node in self.exact:
            self.exact[node] = False

    @invariant()
    def every_answer_is_the_models(self):
        for n, found in zip(range(8), self.directory.replicas(keys(*range(8))), strict=True):
            assert set(found) == {node for node, held in self.held.items() if n in held}
            assert [self.exact[node] for node in found] == sorted(
                (self.exact[x] for x in found), reverse=True
            )
        assert (self.directory.mode() is Mode.EXACT) == all(self.exact.values())

    @invariant()
    def every_prefix_is_the_models(self):
        wanted = [3, 1, 4, 0, 5]
        depth = {}
        for node, held in self.held.items():
            depth[node] = next((i for i, n in enumerate(wanted) if n not in held), len(wanted))
        anywhere = set().union(*self.held.values())
        prefix = self.directory.longest_prefix(keys(*wanted))
        assert prefix.by_node == {node: n for node, n in depth.items() if n}
        assert prefix.covered == next((i for i, n in enumerate(wanted) if n not in anywhere), len(wanted))


TestDirectoryAgainstModel = Model.TestCase
TestDirectoryAgainstModel.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
