"""Engines and hosts of the simulator break down: nobody who could be served is lost, and it is told."""

import itertools
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sim.engine import Engine, Job
from benchmarks.sim.failures import Failure, draw, parse
from benchmarks.sim.intervals import tbt_of
from benchmarks.sim.nouns import Entry, WorldConfig
from benchmarks.sim.profile import DEFAULT, read_profile
from benchmarks.sim.report import summarize
from benchmarks.sim.timeline import Timeline
from benchmarks.sim.trace import TraceRequest, synthesize
from benchmarks.sim.world import World
from conductor.planner import PlannerConfig
from kvstore.limits import ANSWER_S
from mooncake.core.errors import ConfigError
from tests.sim.hash_seeds import under_two_hash_seeds
from tests.sim.test_simulator import Listener

A800 = read_profile(DEFAULT)
BLOCKS = A800.host_kv_tokens // 512
LONG = TraceRequest(1.0, 40_000, 200, tuple(range(79)))
"""Takes 7 s to prefill and 6 s to decode."""


def simulated(requests: list[TraceRequest], **config: object) -> World:
    world = World(requests, A800, WorldConfig(**config))  # type: ignore[arg-type]
    world.run()
    return world


def check(world: World) -> None:
    """All ended, got every token once, waited as long as their TBT says, and hold nothing any more."""
    assert world.cluster.charged == 0
    assert world.active == 0
    assert len(world.gate) == 0
    for entry in world.entries:
        assert entry.done
        if entry.rejected or entry.failed:
            continue
        assert entry.given_tokens == entry.trace.output_tokens
        if entry.tbt is not None:
            answer_s = entry.ended_s - entry.trace.arrival_s - entry.ttft_s
            assert entry.tbt.mean_s * (entry.trace.output_tokens - 1) == pytest.approx(answer_s)
    for one in world.instances.values():
        assert not one.host.arriving
        if one.up:
            assert (one.engine.waiting, one.engine.batch, one.engine.kv_tokens) == (0, 0, 0)


def killed(text: str, requests: list[TraceRequest] | None = None, **config: object) -> tuple[World, Entry]:
    """Run one long request (and those) through two engines of each role, of which some break down."""
    names = ["prefill-000", "prefill-001", "decode-000", "decode-001"]
    wanted: dict[str, object] = {"prefill": 2, "decode": 2, "decode_host_blocks": BLOCKS, **config}
    world = simulated([LONG, *(requests or [])], failures=tuple(parse(text, names)), **wanted)
    check(world)
    return world, world.entries[0]


# ---------------------------------------------------------------- one request


def test_a_prompt_whose_engine_dies_is_computed_again_elsewhere() -> None:
    _, entry = killed("prefill-000@4+60")
    assert (entry.retries, entry.moves, entry.failed) == (1, 0, "")
    alone_s = A800.prefill_s(40_000, 0)
    assert 3.0 + alone_s < entry.ttft_s < 3.2 + alone_s
    # in 3 s, that share of the prompt had been computed
    assert entry.twice_tokens == pytest.approx(40_000 * 3.0 / alone_s, abs=1)
    assert entry.leg1_node == "host-prefill-001"


def test_a_stream_whose_engine_dies_goes_on_with_what_the_pool_has() -> None:
    _, entry = killed("decode-000@10+60")
    assert (entry.retries, entry.moves, entry.failed) == (0, 1, "")
    assert entry.given_tokens == 200
    # only the last, partial block and what was answered is computed again
    assert 0 < entry.twice_tokens < 512 + 200
    assert entry.tbt is not None
    assert entry.tbt.mean_s < 0.05


def test_without_its_prefill_host_a_stream_that_moves_is_computed_whole() -> None:
    """Its blocks were nowhere else: decode hosts have no store here."""
    killed_s = {}
    for text in ("decode-000@10", "host-prefill-000@9,decode-000@10"):
        _, entry = killed(text, decode_host_blocks=0)
        killed_s[text] = entry.twice_tokens
    kept, lost = killed_s.values()
    assert kept < 1000
    assert lost > 40_000


def test_a_host_that_dies_with_a_hand_over_lets_the_decode_instance_compute_it() -> None:
    slow = msgspec.structs.replace(A800, egress_bytes_s=A800.kv_token_bytes * 2000.0)  # 20 s for the prompt
    config = WorldConfig(
        prefill=1, decode=1, decode_host_blocks=BLOCKS,
        failures=(Failure(at_s=15.0, name="prefill-000", host=True, back_s=5.0),),
    )  # fmt: skip
    world = World([LONG], slow, config)
    world.run()
    check(world)
    (entry,) = world.entries
    assert entry.twice_tokens == 40_000
    assert entry.ended_s > 20.0 + A800.prefill_s(40_000, 0)


def test_a_fetch_from_a_dead_host_costs_the_time_until_nobody_answers() -> None:
    """The Conductor does not know yet, and plans to fetch from it."""
    one = TraceRequest(1.0, 20_000, 2, tuple(range(40)))
    busy = TraceRequest(50.0, 120_000, 2, tuple(range(40)) + tuple(range(1000, 1195)))
    again = msgspec.structs.replace(one, arrival_s=51.0)
    found = {}
    for text in ("", "host-prefill-000@50.9+60"):
        world = simulated(
            [one, busy, again], prefill=2, decode=1,
            failures=tuple(parse(text, ["prefill-000", "prefill-001", "decode-000"])),
        )  # fmt: skip
        check(world)
        assert world.entries[2].plan is not None
        assert world.entries[2].plan.fetch_node == "host-prefill-000"
        found[text] = world.entries[2]
    fetched, late = found.values()
    assert fetched.hit_tokens == 19_999
    assert late.hit_tokens == 0
    assert late.ttft_s == pytest.approx(ANSWER_S + A800.prefill_s(20_000, 0))


def test_what_comes_back_is_used_again_and_empty() -> None:
    later = [msgspec.structs.replace(LONG, arrival_s=at_s) for at_s in (30.0, 60.0)]
    world, entry = killed("host-prefill-000@20+5,prefill-001@20", later, decode_host_blocks=0)
    assert entry.hit_tokens == 0
    assert [one.hit_tokens for one in world.entries] == [0, 0, 39_999]
    assert {one.plan.prefill for one in world.entries if one.plan} == {"prefill-000"}
    assert world.instances["prefill-000"].record.epoch == "2"
    assert world.instances["prefill-000"].host.lives == 2


def test_with_nobody_left_requests_fail_with_a_reason_and_the_world_ends() -> None:
    every = ",".join(f"{role}-00{number}@4" for role in ("prefill", "decode") for number in (0, 1))
    world, entry = killed(every, [msgspec.structs.replace(LONG, arrival_s=20.0)])
    assert entry.failed == "no instance alive"
    assert world.entries[1].rejected == "no instance alive"
    got = summarize(world)
    assert got.failed == {"no instance alive": 1}
    assert got.rejected == {"no instance alive": 1}
    assert got.attainment == 0


def test_an_engine_that_stops_says_how_far_everyone_had_come() -> None:
    time = Timeline()
    listener = Listener(time)
    engine = Engine(time, A800, listener, 0, mixed=False)
    job, other = Job("a", 1000, 100), Job("b", 2000, 50)
    engine.add_answer(job)
    time.at(1.0, lambda: engine.add_answer(other))
    stopped = {}
    time.at(2.0, lambda: stopped.update({one.job.eid: one for one in engine.stop()}))
    while time.step():
        pass
    assert not listener.ended
    for one, since_s in ((stopped["a"], 0.0), (stopped["b"], 1.0)):
        gaps_s = sum(gap_s * times for gap_s, times in one.gaps)
        assert sum(times for _, times in one.gaps) == one.tokens
        assert gaps_s == pytest.approx(one.last_s - (since_s if one.job is job else 0.0), abs=1.01)
        assert 2.0 - 0.03 < one.last_s <= 2.0
    assert stopped["a"].tokens == pytest.approx(2.0 / A800.step_s(1, 1000), abs=2)
    assert tbt_of(stopped["a"].gaps).mean_s == pytest.approx(A800.step_s(1, 1030), rel=0.01)


# ---------------------------------------------------------------- many


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 1000),
    prefill=st.integers(1, 3),
    decode=st.integers(1, 3),
    both=st.sampled_from([0, 0, 3]),
    chunk_tokens=st.sampled_from([0, 512, 8192]),
    blocks=st.sampled_from([0, 60, 6000]),
    mtbf_s=st.sampled_from([10.0, 40.0]),
    repair_s=st.sampled_from([0.1, 2.0, 20.0]),
    event_loss=st.sampled_from([0.0, 0.1]),
    hold_s=st.sampled_from([0.0, 1.0]),
    planned=st.booleans(),
)
def test_while_one_instance_lives_every_request_is_served_exactly_once(
    seed: int, prefill: int, decode: int, both: int, chunk_tokens: int, blocks: int, mtbf_s: float,
    repair_s: float, event_loss: float, hold_s: float, planned: bool,
) -> None:  # fmt: skip
    counts = {"both": both} if both else {"prefill": prefill, "decode": decode}
    names = [f"{role}-{number:03}" for role, count in counts.items() for number in range(count)]
    requests = synthesize(60, 4.0, seed)
    steady = names.pop(seed % len(names))
    failures = draw(names, requests[-1].arrival_s, mtbf_s, repair_s, seed) if names else []
    world = simulated(
        requests, failures=tuple(failures), host_blocks=blocks, decode_host_blocks=blocks, seed=seed,
        chunk_tokens=chunk_tokens, mixed=bool(chunk_tokens and both), event_loss=event_loss, hold_s=hold_s,
        planner=PlannerConfig() if planned and not both else None, **counts,
    )  # fmt: skip
    check(world)
    assert not any(entry.failed or entry.rejected for entry in world.entries)
    assert world.instances[steady].record.epoch == "1"


def test_failures_are_told_and_cost_something() -> None:
    requests = synthesize(300, 4.0, 1)
    names = [f"{role}-{number:03}" for role in ("prefill", "decode") for number in range(3)]
    failures = tuple(draw(names, requests[-1].arrival_s, 60.0, 10.0, 1))
    quiet = summarize(simulated(requests, prefill=3, decode=3, decode_host_blocks=BLOCKS))
    world = simulated(requests, prefill=3, decode=3, decode_host_blocks=BLOCKS, failures=failures)
    check(world)
    got = summarize(world)
    assert (quiet.failures, quiet.affected, quiet.twice_tokens) == (0, 0, 0)
    assert got.failures > got.hosts > 0
    assert 0 < got.affected <= got.retries + got.moves
    assert got.retries > 0 < got.moves
    assert got.twice_tokens > 0
    assert got.affected_ttft_s.mean > quiet.ttft_s.mean
    assert got.ttft_s.mean > quiet.ttft_s.mean
    assert got.failed == {}


# ---------------------------------------------------------------- what stores tell the index


def test_late_events_cost_hits_and_nothing_else() -> None:
    requests = synthesize(300, 3.0, 4)
    rates = []
    for delay_s in (0.0, 0.01, 5.0, 100.0):
        world = simulated(requests, prefill=4, decode=2, event_delay_s=delay_s)
        check(world)
        rates.append(summarize(world).hit_rate)
    assert rates[0] == pytest.approx(rates[1], abs=0.02)
    assert rates[0] > rates[2] > rates[3]


def test_after_lost_events_the_index_is_in_step_again() -> None:
    requests = synthesize(200, 3.0, 4)
    world = simulated(requests, prefill=3, decode=2, host_blocks=300, event_loss=0.2)
    check(world)
    feeds = [one.feed for name, one in world.instances.items() if name.startswith("prefill")]
    assert all(feed.lost > 0 < feed.gaps for feed in feeds)
    keys = list(dict.fromkeys(key for entry in world.entries for key in entry.keys))
    for one in world.instances.values():
        if one.host.node is not None:
            told = [key for key in keys if one.host.name in world.index.holders(key)]
            assert set(told) == set(one.host.keys())


def test_a_store_that_died_is_not_in_the_index() -> None:
    world, _ = killed("host-prefill-000@10", [msgspec.structs.replace(LONG, arrival_s=20.0)])
    assert world.index.longest_prefix(world.entries[0].keys).keys() <= {"host-prefill-001", "host-decode-000"}
    assert not world.cluster.is_open("host-prefill-000")


# ---------------------------------------------------------------- written down, drawn, repeated


def test_failures_are_written_down_one_by_one() -> None:
    names = ["prefill-000", "decode-000"]
    found = parse("host-prefill-000@120+30, decode-000@60.5", names)
    assert found == [
        Failure(at_s=60.5, name="decode-000", back_s=math.inf),
        Failure(at_s=120.0, name="prefill-000", host=True, back_s=30.0),
    ]
    assert parse("", names) == []


@pytest.mark.parametrize(
    "text", ["prefill-000", "prefill-000@", "prefill-000@x", "@5", "p@5+", "decode-009@5"]
)
def test_what_is_wrongly_written_down_is_refused_with_its_words(text: str) -> None:
    with pytest.raises(ConfigError, match="kill="):
        parse(text, ["prefill-000", "decode-000"])


@pytest.mark.parametrize(("mtbf_s", "repair_s"), [(-1.0, 5.0), (10.0, -1.0), (1e-6, 0.0)])
def test_failures_without_sense_are_refused(mtbf_s: float, repair_s: float) -> None:
    with pytest.raises(ConfigError, match="mtbf_s"):
        draw(["prefill-000"], 3600.0, mtbf_s, repair_s, 1)


def test_drawn_failures_of_one_instance_do_not_overlap_and_are_as_frequent_as_asked() -> None:
    found = draw(["a", "b"], 1e6, 900.0, 100.0, 7)
    assert len(found) == pytest.approx(2000, rel=0.1)
    for name in "ab":
        own = [one.at_s for one in found if one.name == name]
        assert min(right - left for left, right in itertools.pairwise(own)) >= 100.0
    assert sum(one.host for one in found) == pytest.approx(500, rel=0.2)


RUN = """
from benchmarks.sim import failures, nouns, profile, report, trace, world
from conductor.planner import PlannerConfig
names = [f"{role}-{n:03}" for role in ("prefill", "decode") for n in range(3)]
requests = trace.synthesize(150, 6.0, 3)
config = nouns.WorldConfig(
    prefill=3, decode=3, eviction="tail", host_blocks=400, decode_host_blocks=400, seed=3,
    planner=PlannerConfig(), hold_s=0.5, classes=("premium", "default", "batch"), reject_ttft_s=20.0,
    session_bonus_s=0.05, inline=True, chunk_tokens=4096, mixed=True,
    event_delay_s=0.2, event_loss=0.05, failures=tuple(failures.draw(names, 25.0, 20.0, 4.0, 3)),
)
run = world.World(requests, profile.read_profile(profile.DEFAULT), config)
run.run()
got = report.summarize(run)
print(got.digest, got.failures, got.affected, got.gaps, sum(got.rejected.values()))
"""


def test_with_everything_on_the_same_seed_gives_the_same_run_whatever_the_hash_seed() -> None:
    """Failures, planner, gate, classes, sessions, inlining, late and lost events together."""
    told = [one.split() for one in under_two_hash_seeds(RUN)]
    assert told[0] == told[1]
    assert len(told[0][0]) == 16
    assert all(int(count) > 0 for count in told[0][1:])
