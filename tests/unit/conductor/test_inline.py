"""Conditional disaggregation: which prompts a decode instance prefills beside its batch."""

from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.inline import STRETCH_MAX
from conductor.plan import Decision, Plan, Reason, Rejection
from conductor.pricing import split
from conductor.scheduler import Policy, Scheduler, SchedulerConfig
from tests.unit.conductor.make import BLOCK, cluster, facts, keys, record

PREFILL = (1e-6, 1e-4, 1e-12)
"""0.1 ms a token."""
TBT = (0.02, 1e-5, 1e-9)
"""20 ms a step."""


def pd_cluster(decodes: int = 2) -> ClusterView:
    return cluster(
        *(record(f"d{i}", "decode", node=f"d{i}", block_bytes=1 << 10) for i in range(decodes)),
        record("p0", "prefill", node="p0", block_bytes=1 << 10),
    )


def scheduler(view: ClusterView, index: PrefixIndex | None = None, **config: object) -> Scheduler:
    settings = SchedulerConfig(**({"inline": True} | config))  # type: ignore[arg-type]
    return Scheduler(settings, index or PrefixIndex(), CostModel(PREFILL, TBT), view)


def planned(answer: Plan | Rejection) -> Plan:
    assert isinstance(answer, Plan), answer
    return answer


def busy(view: ClusterView, instance_id: str = "p0", seconds: float = 5.0) -> ClusterView:
    view.charge_prefill(0.0, instance_id, seconds, 10_000)
    return view


def decision(view: ClusterView, index: PrefixIndex | None = None, **config: object) -> Decision:
    return planned(scheduler(view, index, **config).on_request(0.0, facts(prompt_len=200))).decision


def test_a_short_prompt_does_not_queue_behind_long_ones():
    view = busy(pd_cluster())
    plan = planned(scheduler(view).on_request(0.0, facts(prompt_len=200)))
    assert (plan.prefill, plan.decode, plan.decision) == (None, "d0", Decision.INLINED)
    assert 0.02 < plan.predicted_ttft_s < 0.1
    assert view.load("d0").decode_requests == 1
    assert view.load("d0").prefill_requests == 1
    assert view.load("p0").prefill_requests == 1  # the one that was there


def test_nothing_runs_inline_unless_it_is_asked_for():
    assert decision(busy(pd_cluster()), inline=False) is Decision.KVCACHE_CENTRIC


def test_an_idle_prefill_instance_is_faster_than_waiting_for_a_step():
    assert decision(pd_cluster()) is Decision.KVCACHE_CENTRIC


def test_the_hand_over_counts_where_the_first_token_is_decode_s():
    view = cluster(record("d0", "decode", node="d0"), record("p0", "prefill", node="p0"))
    chooser = scheduler(view)
    # 1 MiB a block at 1 GB/s: 7 ms, and a decode step
    assert planned(chooser.on_request(0.0, facts(prompt_len=200))).decision is Decision.KVCACHE_CENTRIC
    plan = planned(scheduler(busy(view, seconds=0.01)).on_request(0.0, facts(prompt_len=200)))
    assert plan.decision is Decision.INLINED
    plan = planned(
        scheduler(busy(view, seconds=0.0)).on_request(0.0, facts(prompt_len=200, first_token=True))
    )
    assert plan.decision is Decision.KVCACHE_CENTRIC


def test_a_long_prompt_runs_inline_where_its_prefix_is():
    index = PrefixIndex()
    index.apply("d1", b"".join(keys(60)), b"")
    plan = planned(scheduler(busy(pd_cluster()), index).on_request(0.0, facts(prompt_len=60 * BLOCK + 50)))
    assert (plan.prefill, plan.decode, plan.decision) == (None, "d1", Decision.APPENDED)
    assert plan.hit_blocks == 60


def test_a_prompt_that_would_be_cut_into_chunks_is_not_inlined():
    index = PrefixIndex()
    chooser = scheduler(busy(pd_cluster(), seconds=60.0), index, tbt_slo_s=10.0)
    assert planned(chooser.on_request(0.0, facts(prompt_len=2049))).decision is Decision.KVCACHE_CENTRIC
    assert planned(chooser.on_request(0.0, facts(prompt_len=2048))).decision is Decision.INLINED


def test_the_longest_step_is_the_objective_of_the_request_or_of_the_conductor():
    # 200 tokens take 20 ms beside a step of 20 ms
    assert decision(busy(pd_cluster()), tbt_slo_s=0.045) is Decision.INLINED
    assert decision(busy(pd_cluster()), tbt_slo_s=0.035) is Decision.KVCACHE_CENTRIC
    chooser = scheduler(busy(pd_cluster()), tbt_slo_s=0.045)
    plan = planned(chooser.on_request(0.0, facts(prompt_len=200, tbt_slo_s=0.035)))
    assert plan.decision is Decision.KVCACHE_CENTRIC


def test_prompts_that_are_inlined_and_have_not_begun_count_as_one_step():
    view = busy(pd_cluster(decodes=1))
    chooser = scheduler(view, tbt_slo_s=0.07)

    def ask(now_s: float, name: str):
        own = keys(200 // BLOCK, name)
        return planned(chooser.on_request(now_s, facts(name, prompt_len=200, keys=own)))

    plans = [ask(0.0, f"r{i}") for i in range(3)]
    inline, wide = Decision.INLINED, Decision.KVCACHE_CENTRIC
    assert [plan.decision for plan in plans] == [inline, inline, wide]
    chooser.release(0.1, plans[0].prefill_ticket)
    assert ask(0.1, "r3").decision is inline


def test_a_full_decode_instance_gets_none():
    view = busy(pd_cluster(decodes=1))
    view.charge_decode("d0", 4096 * BLOCK)
    assert decision(view) is Decision.KVCACHE_CENTRIC


def test_policies_that_predict_nothing_never_inline():
    for policy in (Policy.LEAST_LOAD, Policy.ROUND_ROBIN, Policy.RANDOM):
        assert decision(busy(pd_cluster()), policy=policy) is not Decision.INLINED
    assert decision(busy(pd_cluster()), policy=Policy.CACHE_AWARE) is Decision.INLINED


def test_an_objective_is_judged_by_the_plan_that_is_taken():
    view = busy(pd_cluster())
    assert decision(view, ttft_slo_s=1.0) is Decision.INLINED
    refused = scheduler(view, inline=False, ttft_slo_s=1.0).on_request(0.0, facts(prompt_len=200))
    assert isinstance(refused, Rejection)
    assert refused.reason is Reason.TTFT_SLO


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 100), st.booleans()), min_size=1, max_size=30),
    st.sampled_from([None, 0.03, 0.06, 0.2]),
)
def test_an_inlined_prompt_fits_one_step_and_keeps_its_objective(requests, tbt_slo_s):
    view, index = busy(pd_cluster(), seconds=30.0), PrefixIndex()
    index.apply("d0", b"".join(keys(40)), b"")
    cost = CostModel(PREFILL, TBT)
    chooser = Scheduler(SchedulerConfig(inline=True), index, cost, view)
    now_s = 0.0
    for number, (prompt_len, gap_ms, known) in enumerate(requests):
        now_s += gap_ms / 1000
        own = keys(prompt_len // BLOCK) if known else keys(prompt_len // BLOCK, f"{number}")
        before = {name: view.load(name).queue_s(now_s) for name in ("d0", "d1")}
        wanted = facts(f"{number}", prompt_len=prompt_len, keys=own, tbt_slo_s=tbt_slo_s)
        plan = chooser.on_request(now_s, wanted)
        if isinstance(plan, Rejection) or plan.decision is not Decision.INLINED:
            continue
        assert plan.prefill is None
        assert plan.decode is not None
        new_tokens, known_tokens = split(prompt_len, plan.hit_blocks, BLOCK)
        assert new_tokens <= 2048
        prompts_s = before[plan.decode] + cost.prefill_s(new_tokens, known_tokens)
        limit_s = plan.predicted_tbt_s * STRETCH_MAX if tbt_slo_s is None else tbt_slo_s
        assert plan.predicted_tbt_s + prompts_s <= limit_s + 1e-9
