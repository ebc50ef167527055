"""The simulated world: engines keep time exactly, and production classes decide in it."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sim.engine import Engine, Job, Work
from benchmarks.sim.intervals import Tbt
from benchmarks.sim.nouns import Entry, WorldConfig
from benchmarks.sim.profile import DEFAULT, Profile, read_profile
from benchmarks.sim.report import Summary, spread, summarize, within
from benchmarks.sim.timeline import Link, Timeline
from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest, synthesize
from benchmarks.sim.world import World
from conductor.admission import AdmissionMode
from conductor.plan import Decision
from conductor.planner import PlannerConfig
from conductor.scheduler import Policy
from tests.sim.hash_seeds import under_two_hash_seeds

A800 = read_profile(DEFAULT)


def simulated(requests: list[TraceRequest], profile: Profile = A800, **config: object) -> World:
    world = World(requests, profile, WorldConfig(**config))  # type: ignore[arg-type]
    world.run()
    return world


def summary(requests: list[TraceRequest], profile: Profile = A800, **config: object) -> Summary:
    return summarize(simulated(requests, profile, **config))


class Listener:
    """An engine's world: notes when what happened."""

    def __init__(self, time: Timeline) -> None:
        self.time = time
        self.ended: dict[str, float] = {}
        self.tbt: dict[str, Tbt] = {}

    def begin(self, job: Job) -> Work:
        return Work(job.prompt_tokens, 0, 0.0)

    def prefilled(self, job: Job, work: Work, seconds: float) -> None:
        pass

    def stepped(self, batch: int, kv_tokens: int, seconds: float) -> None:
        pass

    def answered(self, job: Job, tbt: Tbt) -> None:
        self.ended[job.eid] = self.time.now_s
        self.tbt[job.eid] = tbt


def step_by_step(arrivals: list[tuple[float, int, int]]) -> dict[str, float]:
    """The same batch, one step at a time: when each answer (arrival, prompt, answer) ends."""
    waiting = sorted((at, number, prompt, left) for number, (at, prompt, left) in enumerate(arrivals))
    now_s, batch, ended = 0.0, {}, {}
    while waiting or batch:
        if not batch:
            now_s = max(now_s, waiting[0][0])
        while waiting and waiting[0][0] <= now_s + 1e-12:
            _, number, prompt, left = waiting.pop(0)
            batch[number] = [prompt + 1, left]
        now_s += A800.step_s(len(batch), sum(context for context, _ in batch.values()))
        for number, one in list(batch.items()):
            one[0] += 1
            one[1] -= 1
            if not one[1]:
                ended[str(number)] = now_s
                del batch[number]
    return ended


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.floats(0, 2, width=16), st.integers(1, 50_000), st.integers(1, 30)),
        min_size=1,
        max_size=8,
    )
)
def test_runs_in_closed_form_end_when_single_steps_would(arrivals: list[tuple[float, int, int]]) -> None:
    time = Timeline()
    listener = Listener(time)
    engine = Engine(time, A800, listener, 0, mixed=False)
    for number, (at, prompt, answer) in enumerate(arrivals):
        job = Job(str(number), prompt, answer)
        job.first_token_s = at
        time.at(at, lambda job=job: engine.add_answer(job))
    while time.step():
        pass
    expected = step_by_step(arrivals)
    assert listener.ended.keys() == expected.keys()
    for eid, at_s in expected.items():
        assert listener.ended[eid] == pytest.approx(at_s, rel=1e-9, abs=1e-9)
        at, _, answer = arrivals[int(eid)]
        assert listener.tbt[eid].mean_s == pytest.approx((at_s - at) / answer, rel=1e-6)
        assert listener.tbt[eid].tail_s >= listener.tbt[eid].mean_s * (1 - 1e-9)


def test_a_prompt_on_a_coupled_engine_stops_the_batch_unless_it_is_chunked() -> None:
    whole, chunked = ({}, {})
    for mixed, found in ((False, whole), (True, chunked)):
        time = Timeline()
        listener = Listener(time)
        engine = Engine(time, A800, listener, 512 if mixed else 0, mixed=mixed)
        engine.add_prompt(Job("a", 1000, 100))
        time.at(1.0, lambda engine=engine: engine.add_prompt(Job("b", 16_384, 2)))
        while time.step():
            pass
        found.update({eid: tbt.tail_s for eid, tbt in listener.tbt.items()})
    assert whole["a"] > 0.2  # one interval of ten holds the whole prompt of 2 s
    assert chunked["a"] < 0.2


def test_an_answer_waits_for_kv_room() -> None:
    small = msgspec.structs.replace(A800, gpu_kv_tokens=1000)
    time = Timeline()
    listener = Listener(time)
    engine = Engine(time, small, listener, 0, mixed=False)
    for eid in "ab":
        engine.add_answer(Job(eid, 600, 50))
    while time.step():
        pass
    assert listener.ended["b"] == pytest.approx(2 * listener.ended["a"])


def test_a_link_serves_one_transfer_after_the_other() -> None:
    link = Link(100.0)
    assert [link.book(0.0, 100), link.book(0.5, 100), link.book(10.0, 100)] == [1.0, 2.0, 11.0]


# ---------------------------------------------------------------- the world


def test_one_request_alone_takes_what_the_profile_says() -> None:
    world = simulated([TraceRequest(1.0, 8000, 11, tuple(range(16)))], prefill=1, decode=1)
    (entry,) = world.entries
    assert entry.ttft_s == pytest.approx(A800.prefill_s(8000, 0))
    assert entry.tbt is not None
    assert entry.tbt.mean_s == pytest.approx(A800.step_s(1, 8006), rel=1e-3)
    assert entry.hit_tokens == 0


def test_a_prompt_that_was_seen_costs_its_last_token_only() -> None:
    one = TraceRequest(0.0, 8192, 2, tuple(range(16)))
    world = simulated([one, msgspec.structs.replace(one, arrival_s=100.0)], prefill=1, decode=1)
    assert [entry.hit_tokens for entry in world.entries] == [0, 8191]
    assert world.entries[1].ttft_s < 0.1


def test_a_busy_holder_gives_its_blocks_to_an_idle_host() -> None:
    """Hot-spot migration: the fetch is quicker than the queue, and leaves a copy behind."""
    one = TraceRequest(0.0, 60 * BLOCK_TOKENS, 2, tuple(range(60)))
    long = TraceRequest(100.0, 120_000, 2, tuple(range(1000, 1235)))
    requests = [one, msgspec.structs.replace(long, hash_ids=tuple(range(60)) + long.hash_ids[60:])]
    requests += [msgspec.structs.replace(one, arrival_s=101.0)]
    world = simulated(requests, prefill=2, decode=1)
    first, _, third = world.entries
    assert first.plan is not None
    assert third.plan is not None
    assert third.plan.prefill != first.plan.prefill
    assert third.plan.fetch_node == f"host-{first.plan.prefill}"
    assert third.hit_tokens == one.input_tokens - 1
    assert third.ttft_s < 0.5
    assert world.index.longest_prefix(third.keys).keys() == {"host-prefill-000", "host-prefill-001"}


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 100),
    policy=st.sampled_from(list(Policy)),
    prefill=st.integers(0, 3),
    decode=st.integers(0, 3),
    blocks=st.sampled_from([0, 40, 6000]),
    coupled=st.booleans(),
)
def test_every_request_ends_and_gives_all_its_load_back(
    seed: int, policy: Policy, prefill: int, decode: int, blocks: int, coupled: bool
) -> None:
    requests = synthesize(40, 3.0, seed)
    both = 2 if coupled or not (prefill or decode) else 0
    world = simulated(
        requests, policy=policy, prefill=prefill, decode=decode, both=both, host_blocks=blocks,
        chunk_tokens=512, mixed=coupled, decode_host_blocks=blocks,
    )  # fmt: skip
    assert all(entry.done and (entry.ttft_s > 0) is not bool(entry.rejected) for entry in world.entries)
    assert world.cluster.charged == 0
    assert world.active == 0
    for host in world.instances.values():
        assert (host.engine.waiting, host.engine.batch, host.engine.kv_tokens) == (0, 0, 0)
        assert not host.host.arriving
        assert host.host.node is None or host.host.node.stats().leases == 0


def test_a_pool_that_is_too_small_hits_less() -> None:
    requests = synthesize(300, 2.0, 1)
    rates = [summary(requests, host_blocks=blocks).hit_rate for blocks in (0, 50, 6000)]
    assert rates[0] == 0 < rates[1] < rates[2]


def test_under_load_the_policies_stand_in_the_papers_order() -> None:
    requests = synthesize(250, 5.0, 1, new_tokens=6000)
    ttft = {
        policy: summary(requests, policy=policy, prefill=6, decode=4).ttft_s.mean
        for policy in (Policy.RANDOM, Policy.LEAST_LOAD, Policy.CACHE_AWARE, Policy.KVCACHE)
    }
    assert ttft[Policy.RANDOM] > ttft[Policy.LEAST_LOAD] > ttft[Policy.CACHE_AWARE] > ttft[Policy.KVCACHE]


def test_an_objective_turns_requests_away_with_a_reason() -> None:
    got = summary(synthesize(200, 10.0, 1), prefill=1, decode=1, reject_ttft_s=5.0)
    assert sum(got.rejected.values()) > 50
    assert got.ttft_s.p99 < 6.0
    assert got.attainment == pytest.approx(1 - sum(got.rejected.values()) / 200)


RUN = """
from benchmarks.sim import nouns, profile, report, trace, world
config = nouns.WorldConfig(prefill=3, decode=2, eviction="tail", host_blocks=200)
run = world.World(trace.synthesize(80, 4.0, 3), profile.read_profile(profile.DEFAULT), config)
run.run()
print(report.digest(run.entries))
"""


def test_the_same_seed_gives_the_same_run_whatever_the_hash_seed() -> None:
    digests = under_two_hash_seeds(RUN)
    assert len(digests[0].strip()) == 16
    assert digests[0] == digests[1]


@pytest.mark.parametrize("mode", list(AdmissionMode))
def test_whoever_is_refused_whenever_all_load_comes_back(mode: AdmissionMode) -> None:
    small = msgspec.structs.replace(A800, gpu_kv_tokens=40_000)
    requests = synthesize(120, 8.0, 2)
    world = simulated(
        requests, small, prefill=4, decode=2, admission=mode, reject_ttft_s=10.0, reject_tbt_s=0.0285
    )
    rejected = [entry for entry in world.entries if entry.rejected]
    wasted = [entry for entry in rejected if entry.ttft_s >= 0]
    assert 0 < len(rejected) < len(requests)
    assert all(entry.done for entry in world.entries)
    assert world.cluster.charged == 0
    if mode is AdmissionMode.LATE:
        assert len(wasted) == len(rejected)
    if mode is AdmissionMode.OBJECTIVES:
        assert not wasted


def test_instances_change_roles_when_prompts_outgrow_their_pool_and_nothing_is_lost() -> None:
    requests = synthesize(1500, 11.0, 1)
    fixed = simulated(requests, prefill=3, decode=5)
    planned = simulated(requests, prefill=3, decode=5, planner=PlannerConfig())
    for world in (fixed, planned):
        assert all(entry.done and not entry.rejected for entry in world.entries)
        assert world.cluster.charged == 0
    roles = [one.record.role for one in planned.instances.values()]
    assert roles.count("prefill") > 3
    assert planned.switches
    assert summarize(planned).attainment > summarize(fixed).attainment


def test_under_overload_higher_classes_are_served_where_requests_wait_by_class() -> None:
    mix = ("premium", "default")
    requests = synthesize(400, 12.0, 2)
    attained = {}
    for hold_s in (0.0, 1.0):
        world = simulated(requests, prefill=2, decode=2, hold_s=hold_s, classes=mix, reject_ttft_s=10.0)
        assert all(entry.done for entry in world.entries)
        assert world.cluster.charged == 0
        assert len(world.gate) == 0
        for name in mix:
            own = [within(e, 10.0, 0.1) for e in world.entries if e.terms.slo_class.name == name]
            attained[hold_s, name] = sum(own) / len(own)
    assert attained[1.0, "premium"] > attained[0.0, "premium"]
    assert attained[1.0, "premium"] > attained[1.0, "default"]


def test_batch_work_fills_what_is_idle_and_the_others_hardly_notice() -> None:
    alone = synthesize(100, 2.0, 2)
    last = max(max(one.hash_ids) for one in alone)
    work = [
        TraceRequest(
            one.arrival_s, one.input_tokens, one.output_tokens, tuple(last + 1 + n for n in one.hash_ids)
        )
        for one in synthesize(600, 12.0, 7, new_tokens=2000, output_tokens=20)
    ]
    mixed = sorted(alone + work, key=lambda one: one.arrival_s)
    names = tuple("batch" if one.hash_ids[0] > last else "interactive" for one in mixed)
    without = spread([e.ttft_s for e in simulated(alone, prefill=4, decode=4).entries])
    ungated = simulated(mixed, prefill=4, decode=4, classes=tuple("default" for _ in mixed))
    world = simulated(mixed, prefill=4, decode=4, classes=names)
    assert all(entry.done and not entry.rejected for entry in world.entries)
    assert world.cluster.charged == 0

    def ours(of: World) -> list[Entry]:
        return [entry for entry, name in zip(of.entries, names, strict=True) if name == "interactive"]

    assert spread([e.ttft_s for e in ours(world)]).p90 <= 1.05 * without.p90
    assert spread([e.ttft_s for e in ours(ungated)]).p90 > 1.05 * without.p90


def test_short_prompts_inline_come_sooner_and_cost_the_batch_little() -> None:
    requests = synthesize(400, 9.0, 5)
    base = simulated(requests, prefill=2, decode=4, decode_host_blocks=5000)
    world = simulated(
        requests, prefill=2, decode=4, decode_host_blocks=5000, inline=True, chunk_tokens=8192, mixed=True
    )
    beside = {Decision.INLINED, Decision.APPENDED}  # the latter where decode holds most of it already
    inlined = [one for one in world.entries if one.plan and one.plan.decision in beside]
    assert len(inlined) > 20
    same = [base.entries[entry.number].ttft_s for entry in inlined]
    assert sum(entry.ttft_s for entry in inlined) < 0.5 * sum(same)
    assert summarize(world).tbt_tail_s.p90 < 2 * summarize(base).tbt_tail_s.p90
    assert all(entry.done for entry in world.entries)
    assert world.cluster.charged == 0


def test_sessions_find_blocks_that_the_index_has_not_heard_of() -> None:
    requests = synthesize(400, 3.0, 5)
    blind = summary(requests, prefill=4, decode=2, blind=True)
    told = summary(requests, prefill=4, decode=2, blind=True, session_bonus_s=2.0)
    assert told.hit_rate > 1.3 * blind.hit_rate
