"""Policy that changes while requests run: new values hold at once, what is in flight stays as it is."""

import pytest
from prometheus_client import CollectorRegistry

from conductor.admission import Admission, AdmissionMode
from conductor.core import Core
from conductor.cost import CostModel
from conductor.gate import GateConfig
from conductor.heat import COPIES_MIN, USES_MIN, Heat
from conductor.index import PrefixIndex
from conductor.plan import Decision, Plan, Reason, Rejection
from conductor.planner import Planner, PlannerConfig, member_of
from conductor.remote_core import RemoteCore
from conductor.scheduler import Mode, Policy, Scheduler, SchedulerConfig
from mooncake.core.errors import ConfigError
from mooncake.core.metadata_memory import MemoryMetadata
from mooncake.core.options import GatewayOptions
from tests.unit.conductor.make import BLOCK, cluster, facts, keys, record
from tests.unit.conductor.test_gate import BATCH, World


def test_objectives_hold_from_the_next_request_on_and_charges_stay():
    view = cluster(record("p", "prefill"), record("d", "decode"))
    scheduler = Scheduler(SchedulerConfig(), PrefixIndex(), CostModel(), view)
    first = scheduler.on_request(0.0, facts("a"))
    scheduler.change(SchedulerConfig(ttft_slo_s=1e-6))
    refused = scheduler.on_request(0.0, facts("b"))
    assert isinstance(refused, Rejection)
    assert refused.reason is Reason.TTFT_SLO
    assert view.load("p").prefill_requests == 1
    scheduler.change(SchedulerConfig())
    assert isinstance(scheduler.on_request(0.0, facts("c")), Plan)
    scheduler.release(1.0, first.prefill_ticket)
    assert view.load("p").prefill_requests == 1  # its own was given back, the other one's is there


def test_another_policy_decides_and_an_aggregated_cluster_stays_one():
    view = cluster(record("a"), record("b"))
    scheduler = Scheduler(SchedulerConfig(mode=Mode.AGGREGATED), PrefixIndex(), CostModel(), view)
    scheduler.change(SchedulerConfig(policy=Policy.ROUND_ROBIN))
    chosen = [scheduler.on_request(0.0, facts(str(n))) for n in range(2)]
    assert {plan.decision for plan in chosen} == {Decision.AGGREGATED}
    assert {plan.decode for plan in chosen} == {"a", "b"}


def test_only_the_policy_that_counts_fetches_counts_them_after_a_change():
    view = cluster(record("p", "prefill"), record("d", "decode"))
    scheduler = Scheduler(SchedulerConfig(policy=Policy.LEAST_LOAD), PrefixIndex(), CostModel(), view)
    for policy in Policy:
        scheduler.change(SchedulerConfig(policy=policy))
        assert scheduler._pricing.fetches is (policy is Policy.KVCACHE)


def test_admission_counts_what_was_taken_before_it_was_switched_on():
    one = Admission(AdmissionMode.OBJECTIVES, None, 10.0, CostModel())
    one.planned(1, 2, "d", 1.0, 300)
    one.released(1.5, 1)
    one.change(AdmissionMode.EARLY, None, 10.0)
    assert one.load_on_arrival(2.0, 3.0, "d", 100, {"d": 1000}) == 0.4
    one.released(9.0, 2)
    assert one.load_on_arrival(9.0, 9.5, "d", 100, {"d": 1000}) == 0.1


def test_a_gate_that_no_longer_holds_lets_everybody_in_in_their_order():
    world = World()
    world.fill()
    for name in ("a", "b", "c"):
        assert world.offer(name) == (None, [])
    world.gate.change(GateConfig())
    assert [outcome.request_id for outcome in world.gate.pump(world.now_s)] == ["a", "b", "c"]
    assert isinstance(world.offer("d")[0], Plan)
    world.gate.change(GateConfig(hold_s=1.0))
    assert world.offer("e") == (None, [])
    assert world.offer("f", BATCH) == (None, [])


def test_the_gates_bounds_stay_as_they_are_over_a_change():
    world = World(waiting_max=1)
    world.fill()
    world.gate.change(GateConfig(hold_s=1.0))
    assert world.offer("a") == (None, [])
    answer, _ = world.offer("b")
    assert isinstance(answer, Rejection)


def test_copies_of_hot_prefixes_follow_the_new_limit_and_counts_stay():
    heat = Heat(CostModel(), 8)
    for _ in range(int(USES_MIN) * 4):
        heat.planned(0.0, keys(8), 8, 1 << 20, BLOCK)
    assert heat.step(0.0, 8)[0].copies > COPIES_MIN
    heat.change(COPIES_MIN)
    assert heat.step(0.0, 8)[0].copies == COPIES_MIN
    heat.change(0)
    assert heat.step(0.0, 8) == []
    heat.change(8)
    assert heat.step(0.0, 8)[0].copies > COPIES_MIN


def test_the_planner_judges_by_the_new_objective_what_it_has_measured():
    view = cluster(record("p", "prefill"), record("d", "decode"))
    for _ in range(8):
        view.charge_decode("d", 1000)
    planner = Planner(PlannerConfig(tbt_slo_s=10.0), CostModel())
    members = [member_of(0.0, one, load) for one, load in view.alive()]
    planner.step(members)
    before = planner.forecast.decode_pressure
    planner.change(PlannerConfig(tbt_slo_s=0.001))
    planner.step(members)
    assert planner.forecast.decode_pressure > before > 0


@pytest.mark.parametrize("kind", [Core, RemoteCore])
async def test_a_core_takes_all_of_it_or_nothing(kind, tmp_path):
    tenants = tmp_path / "t.toml"
    tenants.write_text("[tenants.a]\nconcurrent = 1\n")
    options = GatewayOptions(model="m", run_dir=str(tmp_path), tenants=str(tenants))
    metadata = MemoryMetadata()
    core = kind(options, metadata, gateway_metrics())
    quotas = core.quotas
    decider = core._local if kind is RemoteCore else core.decider
    assert quotas.admit(0.0, "r", "a", 1, 1) is None
    assert quotas.admit(0.0, "s", "a", 1, 1) is not None
    tenants.write_text("[tenants.a]\nconcurrent = -1\n")
    with pytest.raises(ConfigError, match="concurrent = -1"):
        core.prepare(options.replace(ttft_slo_s=1))
    assert decider.scheduler._config.ttft_slo_s is None
    tenants.write_text("[tenants.a]\nconcurrent = 2\n")
    change = core.prepare(options.replace(ttft_slo_s=1, hold_s=3, admission="early", plan_roles=True))
    assert decider.scheduler._config.ttft_slo_s is None, "nothing holds before it is asked to"
    change()
    assert decider.scheduler._config.ttft_slo_s == 1
    assert decider.gate._config.hold_s == 3
    assert core.quotas is quotas
    assert quotas.admit(0.0, "s", "a", 1, 1) is None
    assert quotas.admit(0.0, "t", "a", 1, 1) is not None, "the first one still counts"
    if kind is Core:
        assert core.roles.acts
        core.prepare(options)()
        assert not core.roles.acts
    await metadata.close()


def gateway_metrics():
    from conductor.metrics import GatewayMetrics

    return GatewayMetrics(CollectorRegistry())
