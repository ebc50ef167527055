"""Hot prefixes are copied ahead in the simulated world, over its links, by the classes of production."""

import msgspec
import pytest

from benchmarks.sim.nouns import Entry, WorldConfig
from benchmarks.sim.profile import DEFAULT, read_profile
from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest, crowd, synthesize
from benchmarks.sim.world import World
from mooncake.core.errors import ConfigError

SLOW = msgspec.structs.replace(read_profile(DEFAULT), egress_bytes_s=3e9)
PROMPT_TOKENS = 16_384
FIRST = "host-prefill-000"


def simulated(requests: list[TraceRequest], **config: object) -> World:
    world = World(requests, SLOW, WorldConfig(**config))  # type: ignore[arg-type]
    world.run()
    return world


def late(world: World) -> list[Entry]:
    return [entry for entry in world.entries if entry.trace.arrival_s >= 300.0]


def mean_ttft_s(entries: list[Entry]) -> float:
    return sum(entry.ttft_s for entry in entries) / len(entries)


def holders(world: World) -> int:
    """Hosts that have nearly all of what everybody begins with."""
    shared = world.entries[0].keys[: PROMPT_TOKENS // BLOCK_TOKENS * 4 // 5]
    return sum(one.host.held(shared) == len(shared) for one in world.instances.values())


@pytest.fixture(scope="module")
def known() -> list[TraceRequest]:
    return [one for one in crowd(PROMPT_TOKENS, 1) if one.arrival_s < 300.0]


def test_what_is_asked_for_now_and_then_is_on_many_hosts_before_a_crowd_comes(known):
    without, ahead = simulated(known), simulated(known, hot_copies=8)
    assert holders(without) < 4 <= holders(ahead)
    copied_blocks = ahead.hot.copied_bytes / ahead.block_bytes
    assert copied_blocks == pytest.approx((holders(ahead) - 1) * ahead.hot.wished_max, rel=0.3)


def test_a_crowd_is_served_sooner_on_a_slow_network():
    requests = crowd(PROMPT_TOKENS, 1, count=100)
    without, ahead = simulated(requests), simulated(requests, hot_copies=8)
    assert mean_ttft_s(late(ahead)) < 0.5 * mean_ttft_s(late(without))


def test_copies_outlive_the_store_that_had_the_first_one():
    requests = crowd(PROMPT_TOKENS, 2, count=100)
    lost = ((299.0, FIRST),)
    without, ahead = (simulated(requests, hot_copies=copies, restarts=lost) for copies in (0, 8))
    assert sum(entry.new_tokens for entry in late(ahead)) < 0.8 * sum(e.new_tokens for e in late(without))
    assert holders(ahead) == 8  # the one that came back, too


def test_copies_take_their_time_on_the_link_they_leave_by(known):
    world = simulated(known, hot_copies=8)
    sent = sum(one.host.egress.sent_bytes for one in world.instances.values())
    assert sent == world.hot.copied_bytes + world.fetched_bytes


@pytest.mark.parametrize("config", [{"hot_copies": 0}, {"hot_copies": 8, "prefill": 1}])
def test_switched_off_or_alone_it_changes_nothing(known, config):
    world = simulated(known, **config)
    assert (world.hot.copied_bytes, world.hot.wished_max) == (0, 0)


def test_prompts_that_share_little_are_not_copied():
    requests = synthesize(150, 2.0, seed=3)
    without, ahead = simulated(requests), simulated(requests, hot_copies=8)
    assert ahead.hot.wished_max <= 10  # the system prompt of two blocks, and a long conversation
    assert mean_ttft_s(ahead.entries) == pytest.approx(mean_ttft_s(without.entries), rel=0.05)


def test_a_restarted_store_is_empty_and_its_leases_are_nobodys():
    world = simulated(crowd(PROMPT_TOKENS, 3, count=50), restarts=((305.0, FIRST),))
    assert all(entry.done for entry in world.entries)


def test_a_crowd_is_the_same_for_the_same_seed_and_behind_one_prompt():
    assert crowd(PROMPT_TOKENS, 5) == crowd(PROMPT_TOKENS, 5) != crowd(PROMPT_TOKENS, 6)
    begin = {one.hash_ids[: PROMPT_TOKENS // BLOCK_TOKENS] for one in crowd(PROMPT_TOKENS, 5)}
    assert len(begin) == 1
    with pytest.raises(ConfigError, match="rate=0"):
        crowd(PROMPT_TOKENS, 5, rate=0)
