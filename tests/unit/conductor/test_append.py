"""A decode instance computes what is new of a prompt it holds, if that is sooner and its batch keeps pace."""

from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import Decision, Plan
from conductor.scheduler import Scheduler, SchedulerConfig
from mooncake.core.messages import gpu_node
from tests.unit.conductor.make import BLOCK, cluster, facts, keys, record

PREFILL = (1e-6, 1e-4, 1e-12)
"""0.1 ms a token: 204.8 ms for a whole step of 2,048."""
TBT = (0.02, 1e-5, 1e-9)
"""20 ms a step."""
CONTEXT = 200
"""Blocks of the conversation so far."""


def pd_cluster(prefill_s: float = 60.0) -> ClusterView:
    """Two decode instances, and one that prefills and has so much to do already."""
    view = cluster(
        *(record(f"d{i}", "decode", node=f"d{i}", block_bytes=1 << 10) for i in range(2)),
        record("p0", "prefill", node="p0", block_bytes=1 << 10),
    )
    view.charge_prefill(0.0, "p0", prefill_s, 10_000)
    return view


def holding(holder: str, blocks: int = CONTEXT) -> PrefixIndex:
    index = PrefixIndex()
    index.apply(holder, b"".join(keys(blocks)), b"")
    return index


def planned(
    view: ClusterView, index: PrefixIndex, new_tokens: int, tbt_slo_s: float | None = 0.25, **config: object
) -> Plan:
    settings = SchedulerConfig(**({"append": True, "tbt_slo_s": tbt_slo_s} | config))  # type: ignore[arg-type]
    scheduler = Scheduler(settings, index, CostModel(PREFILL, TBT), view)
    plan = scheduler.on_request(0.0, facts(prompt_len=CONTEXT * BLOCK + new_tokens))
    assert isinstance(plan, Plan), plan
    return plan


def test_a_next_turn_is_computed_where_its_context_is_decoded():
    for holder in (gpu_node("d1"), "d1"):  # the engine's own cache, or the store beside it
        plan = planned(pd_cluster(), holding(holder), 500)
        assert (plan.prefill, plan.decode, plan.decision) == (None, "d1", Decision.APPENDED)
        assert plan.hit_blocks == CONTEXT
        assert plan.fetch_node is None


def test_a_stranger_is_not_computed_there_however_short():
    assert planned(pd_cluster(), PrefixIndex(), 500).decision is Decision.KVCACHE_CENTRIC
    less_than_half = holding("d1", CONTEXT // 4)
    assert planned(pd_cluster(), less_than_half, 500).decision is Decision.KVCACHE_CENTRIC


def test_what_takes_several_steps_is_appended_if_each_of_them_keeps_the_objective():
    index = holding(gpu_node("d1"))
    long = 5000  # three steps
    plan = planned(pd_cluster(), index, long, tbt_slo_s=0.25)
    assert plan.decision is Decision.APPENDED
    assert plan.predicted_ttft_s > 3 * 0.02 + 0.1e-3 * long  # its steps decode the batch, too
    assert planned(pd_cluster(), index, long, tbt_slo_s=0.2).decision is Decision.KVCACHE_CENTRIC


def test_nothing_is_appended_where_another_instance_is_sooner():
    index = holding(gpu_node("d1"))
    index.apply("p0", b"".join(keys(CONTEXT)), b"")
    assert planned(pd_cluster(0.0), index, 500).decision is Decision.KVCACHE_CENTRIC
    assert planned(pd_cluster(60.0), index, 500).decision is Decision.APPENDED


def test_nothing_is_appended_unless_it_is_asked_for_nor_where_there_is_no_room():
    index = holding(gpu_node("d1"))
    assert planned(pd_cluster(), index, 500, append=False).decision is Decision.KVCACHE_CENTRIC
    full = pd_cluster()
    for _ in range(64):
        full.charge_decode("d1", 10)
    assert planned(full, index, 500).decision is Decision.KVCACHE_CENTRIC


@settings(max_examples=60, deadline=None)
@given(new_tokens=st.integers(1, 8000), batch=st.integers(0, 70), tbt_slo_s=st.floats(0.001, 0.5))
def test_the_longest_step_of_an_append_keeps_the_objective(new_tokens, batch, tbt_slo_s):
    view, cost = pd_cluster(), CostModel(PREFILL, TBT)
    for _ in range(batch):
        view.charge_decode("d1", 10)
    settings = SchedulerConfig(append=True)
    scheduler = Scheduler(settings, holding("d1"), cost, view)
    load = view.load("d1")
    asked = facts(prompt_len=CONTEXT * BLOCK + new_tokens, tbt_slo_s=tbt_slo_s)
    plan = scheduler.on_request(0.0, asked)
    if isinstance(plan, Plan) and plan.decision is Decision.APPENDED:
        step_tokens = min(new_tokens, 2048 - load.decode_requests)
        step_s = cost.prefill_s(step_tokens, 0) + cost.tbt_s(batch + 1, load.decode_kv_tokens)
        assert step_s <= tbt_slo_s
