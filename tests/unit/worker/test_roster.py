"""A leader knows who is there, and that an engine cannot exchange a node."""

import pytest

from mooncake.core.errors import CapacityError, ConfigError, PeerGone
from mooncake.worker.node_messages import NodeBeat
from mooncake.worker.roster import SILENT_S, Roster

VERSION = "1.0"


def beat(rank: int, life: str = "a", **changes) -> NodeBeat:
    return NodeBeat(rank, life, changes.pop("version", VERSION), **changes)


@pytest.fixture
def roster() -> Roster:
    roster = Roster(3, VERSION)
    for rank in (1, 2):
        roster.beat(0.0, beat(rank))
    return roster


def test_all_are_missing_until_they_were_heard():
    roster = Roster(3, VERSION)
    assert roster.missing(0.0) == [1, 2]
    roster.beat(0.0, beat(2))
    assert roster.missing(0.0) == [1]
    roster.beat(0.0, beat(1))
    assert roster.missing(0.0) == []


@pytest.mark.parametrize("rank", [-1, 0, 3, 100])
def test_a_rank_that_the_engine_does_not_have_is_refused(roster: Roster, rank: int):
    with pytest.raises(ConfigError, match=f"node_rank = {rank}: an engine of 3 nodes has followers 1 to 2"):
        roster.beat(0.0, beat(rank))


def test_another_version_is_refused(roster: Roster):
    with pytest.raises(ConfigError, match=r"follower 1 has version 2\.0, its leader 1\.0"):
        roster.beat(0.0, beat(1, version="2.0"))


def test_two_with_one_rank_are_refused_until_the_first_is_gone(roster: Roster):
    with pytest.raises(CapacityError, match="node_rank = 1: another follower has it"):
        roster.beat(SILENT_S, beat(1, "b"))
    roster.beat(SILENT_S + 0.1, beat(1, "b"))
    assert roster.missing(SILENT_S + 0.1) == [2]


def test_one_that_says_goodbye_before_the_engine_starts_can_be_replaced_at_once(roster: Roster):
    roster.beat(1.0, beat(1, gone="was told to go"))
    assert roster.missing(1.0) == [1]
    roster.beat(1.0, beat(1, "b"))
    assert roster.missing(1.0) == []
    assert roster.lost(1.0) == ""


def test_before_the_engine_starts_nobody_can_be_lost(roster: Roster):
    assert roster.missing(SILENT_S + 1) == [1, 2]
    assert roster.lost(SILENT_S + 1) == ""


def test_silence_loses_a_follower_of_an_engine_that_runs(roster: Roster):
    roster.seal("e")
    roster.beat(1.0, beat(1))
    assert roster.lost(SILENT_S) == ""
    assert roster.lost(SILENT_S + 0.1) == f"follower 2 has been silent for {SILENT_S:g} s"


def test_a_goodbye_loses_it_at_once_with_its_reason(roster: Roster):
    roster.seal("e")
    roster.beat(1.0, beat(2, gone="lost its ranks, code -9"))
    assert roster.lost(1.0) == "follower 2 lost its ranks, code -9"


def test_a_second_life_loses_the_engine_and_is_told_to_wait(roster: Roster):
    roster.seal("e")
    with pytest.raises(PeerGone):
        roster.beat(1.0, beat(1, "b"))
    assert roster.lost(1.0) == "follower 1 has started again"


def test_the_first_loss_is_the_one_that_is_told(roster: Roster):
    roster.seal("e")
    roster.beat(1.0, beat(2, gone="lost its ranks, code 1"))
    roster.beat(2.0, beat(1, gone="ends with its leader"))
    assert roster.lost(99.0) == "follower 2 lost its ranks, code 1"


def test_one_that_was_told_to_go_is_named(roster: Roster):
    assert roster.leaves == ""
    roster.seal("e")
    roster.beat(1.0, beat(2, leaves=True))
    assert roster.leaves == "follower 2 was told to go"
    assert roster.lost(1.0) == ""


def test_ranks_of_an_engine_that_has_ended_are_no_followers_of_the_next(roster: Roster):
    """Its leader was killed and is back before they have noticed."""
    with pytest.raises(PeerGone, match="follower 1 runs ranks of an engine that has ended"):
        Roster(2, VERSION).beat(0.0, beat(1, epoch="e"))
    roster.seal("e")
    roster.beat(1.0, beat(1, epoch="e"))
    with pytest.raises(PeerGone):
        roster.beat(1.0, beat(2, epoch="another"))
