"""Scheduler: where requests go, why they are turned away, and what is charged."""

import subprocess
import sys

import pytest

from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import Decision, Need, Plan, Reason, Rejection
from conductor.scheduler import Mode, Policy, Scheduler, SchedulerConfig
from tests.unit.conductor.make import BLOCK, cluster, facts, keys, record, store


def scheduler(view: ClusterView, index: PrefixIndex | None = None, **config: object) -> Scheduler:
    return Scheduler(SchedulerConfig(**config), index or PrefixIndex(), CostModel(), view)  # type: ignore[arg-type]


def planned(answer: Plan | Rejection) -> Plan:
    assert isinstance(answer, Plan), answer
    return answer


def refused(answer: Plan | Rejection) -> Rejection:
    assert isinstance(answer, Rejection), answer
    return answer


def pd_cluster() -> ClusterView:
    return cluster(
        record("d0", "decode", node="n2"),
        record("d1", "decode", node="n3"),
        record("p0", "prefill", node="n0"),
        record("p1", "prefill", node="n1"),
    )


# ------------------------------------------------------------ two legs


def test_an_idle_cluster_gives_the_lowest_ids():
    plan = planned(scheduler(pd_cluster()).on_request(0.0, facts()))
    assert (plan.prefill, plan.decode, plan.decision) == ("p0", "d0", Decision.KVCACHE_CENTRIC)
    assert plan.predicted_ttft_s > 0
    assert plan.predicted_tbt_s > 0


def test_a_burst_is_spread_because_load_is_charged_at_dispatch():
    chooser = scheduler(pd_cluster())
    plans = [planned(chooser.on_request(0.0, facts(f"r{i}"))) for i in range(4)]
    assert [p.prefill for p in plans] == ["p0", "p1", "p0", "p1"]
    assert [p.decode for p in plans] == ["d0", "d1", "d0", "d1"]


def test_released_load_is_no_longer_counted():
    view = pd_cluster()
    chooser = scheduler(view)
    plan = planned(chooser.on_request(0.0, facts()))
    for ticket in (plan.prefill_ticket, plan.decode_ticket):
        chooser.release(0.0, ticket)
    assert view.charged == 0
    again = planned(chooser.on_request(0.0, facts()))
    assert (again.prefill, again.decode) == ("p0", "d0")


def test_a_prompt_goes_where_its_prefix_is():
    index = PrefixIndex()
    index.apply("n1", b"".join(keys(30)), b"")
    # small blocks: loading them is far cheaper than computing them
    view = cluster(
        *(record(f"p{i}", "prefill", node=f"n{i}", block_bytes=1 << 10) for i in range(3)),
        record("d0", "decode"),
    )
    plan = planned(scheduler(view, index, policy=Policy.CACHE_AWARE).on_request(0.0, facts()))
    assert (plan.prefill, plan.hit_blocks, plan.fetch_blocks) == ("p1", 30, 0)


def test_a_busy_holder_loses_to_an_idle_instance_that_fetches_from_it():
    index = PrefixIndex()
    index.apply("n1", b"".join(keys(30)), b"")
    view = pd_cluster()
    view.charge_prefill(0.0, "p1", 10.0, 1000)
    plan = planned(scheduler(view, index).on_request(0.0, facts()))
    assert (plan.prefill, plan.hit_blocks, plan.fetch_blocks, plan.fetch_node) == ("p0", 30, 30, "n1")


def test_a_fetch_slower_than_recomputing_is_not_planned():
    index = PrefixIndex()
    index.apply("n1", b"".join(keys(30)), b"")
    view = cluster(record("p0", "prefill", node="n0", block_bytes=1 << 30), record("d0", "decode", node="n2"))
    plan = planned(scheduler(view, index).on_request(0.0, facts()))
    assert (plan.hit_blocks, plan.fetch_blocks, plan.fetch_node) == (0, 0, None)


def test_nothing_is_fetched_from_or_to_a_store_that_serves_its_own_host_only():
    index = PrefixIndex()
    index.apply("n1", b"".join(keys(30)), b"")
    for closed in ("n0", "n1"):
        view = pd_cluster()
        view.store_up(store(closed, transfer=""))
        view.charge_prefill(0.0, "p1", 10.0, 1000)
        plan = planned(scheduler(view, index).on_request(0.0, facts()))
        assert (plan.prefill, plan.fetch_node) == ("p0", None)


def test_a_leg_is_told_where_its_blocks_are():
    index = PrefixIndex()
    index.apply("n1", b"".join(keys(30)), b"")
    index.apply("n0", b"".join(keys(10)), b"")
    view = pd_cluster()
    made = scheduler(view, index)
    assert made.source(facts(), "n0", "n1") == "n1", "as planned"
    assert made.source(facts(), "n1", "n1") == "", "they are at home"
    assert made.source(facts(), "n0", "") == "n1", "the index knows more of them"
    assert made.source(facts(), "n1", "") == "", "nobody has more"
    assert made.source(facts(), "n0", "gone") == "n1", "the one who had them is gone"
    assert scheduler(view, index, policy=Policy.CACHE_AWARE).source(facts(), "n0", "") == ""
    view.store_up(store("n0", transfer=""))
    assert made.source(facts(), "n0", "n1") == "", "its store fetches nothing"


def test_a_whole_prompt_hit_still_computes_its_last_token():
    index = PrefixIndex()
    index.apply("n0", b"".join(keys(4)), b"")
    plan = planned(scheduler(pd_cluster(), index).on_request(0.0, facts(prompt_len=4 * BLOCK)))
    assert plan.hit_blocks == 4
    assert plan.predicted_ttft_s > 0


def test_a_decode_instance_without_kv_room_comes_last():
    view = cluster(
        record("p0", "prefill"),
        record("d0", "decode", kv_blocks=10),
        record("d1", "decode"),
    )
    view.charge_decode("d1", 50_000)  # slower, but it has room
    assert planned(scheduler(view).on_request(0.0, facts())).decode == "d1"


def test_one_instance_of_both_roles_is_not_asked_to_hand_over_to_itself():
    plan = planned(scheduler(cluster(record("x", "both"))).on_request(0.0, facts()))
    assert (plan.prefill, plan.decode, plan.decision) == (None, "x", Decision.AGGREGATED)


# ------------------------------------------------------------ fall-backs are named


def test_aggregated_mode_uses_one_instance_of_any_role():
    plan = planned(scheduler(pd_cluster(), mode=Mode.AGGREGATED).on_request(0.0, facts()))
    assert (plan.prefill, plan.decode, plan.decision) == (None, "d0", Decision.AGGREGATED)


@pytest.mark.parametrize(
    ("role", "decision"),
    [("decode", Decision.NO_PREFILL_ALIVE), ("prefill", Decision.NO_DECODE_ALIVE)],
)
def test_with_one_side_gone_the_other_does_all(role, decision):
    plan = planned(scheduler(cluster(record("x", role))).on_request(0.0, facts()))
    assert (plan.prefill, plan.decode, plan.decision) == (None, "x", decision)


def test_a_single_token_is_answered_by_a_prefill_instance():
    plan = planned(scheduler(pd_cluster()).on_request(0.0, facts(single_leg=True, max_tokens=1)))
    assert (plan.prefill, plan.decode, plan.decision) == (None, "p0", Decision.SINGLE_TOKEN)


def test_suspects_get_nothing():
    view = pd_cluster()
    view.pulse(1.0, "p0", 9.0)
    view.link_down(1.0, "d0")
    plan = planned(scheduler(view).on_request(1.0, facts()))
    assert (plan.prefill, plan.decode) == ("p1", "d1")


# ------------------------------------------------------------ rejections


def test_nobody_alive_is_a_rejection_that_says_when_to_come_back():
    rejection = refused(scheduler(ClusterView()).on_request(0.0, facts()))
    assert rejection.reason is Reason.NO_INSTANCE_ALIVE
    assert rejection.retry_after_s > 0


def test_prefill_and_decode_of_different_contexts_are_not_paired():
    view = cluster(record("p0", "prefill"), record("d0", "decode", context_root="bb" * 32))
    rejection = refused(scheduler(view).on_request(0.0, facts()))
    assert rejection.reason is Reason.NO_COMMON_CONTEXT
    assert "p0 (prefill) aaaaaaaaaaaa" in rejection.detail
    assert "d0 (decode) bbbbbbbbbbbb" in rejection.detail


def test_a_rejection_says_in_what_the_closest_two_differ():
    """Nobody can read it off two hashes."""
    view = cluster(
        record("p0", "prefill", context={"dtype": "a", "max_model_len": "1", "engine": "v"}),
        record("p1", "prefill", context={"dtype": "b", "max_model_len": "1", "engine": "v"}),
        record("d0", "decode", context_root="bb" * 32, context={"dtype": "b", "max_model_len": "2"}),
    )
    detail = refused(scheduler(view).on_request(0.0, facts())).detail
    assert detail.endswith("; the closest two differ in engine, max_model_len")


def test_pairs_are_formed_within_a_context():
    view = cluster(
        record("p0", "prefill"),
        record("p1", "prefill", context_root="bb"),
        record("d0", "decode", context_root="bb"),
    )
    plan = planned(scheduler(view).on_request(0.0, facts()))
    assert (plan.prefill, plan.decode) == ("p1", "d0")


def test_a_request_of_an_unknown_context_is_rejected():
    rejection = refused(scheduler(pd_cluster()).on_request(0.0, facts(context_root="cc" * 32)))
    assert rejection.reason is Reason.NO_COMMON_CONTEXT
    assert "request has cccccccccccc" in rejection.detail


def test_a_prompt_longer_than_every_context_is_rejected():
    rejection = refused(scheduler(pd_cluster()).on_request(0.0, facts(prompt_len=32_768, keys=[])))
    assert rejection.reason is Reason.NO_INSTANCE_FITS


@pytest.mark.parametrize("mode", list(Mode))
def test_queues_are_bounded(mode):
    view = pd_cluster()
    chooser = scheduler(view, mode=mode, waiting_max=3)
    answers = [chooser.on_request(0.0, facts(f"r{i}")) for i in range(20)]
    accepted = [a for a in answers if isinstance(a, Plan)]
    assert len(accepted) == (6 if mode is Mode.DISAGGREGATED else 12)
    assert refused(answers[-1]).reason is Reason.QUEUE_FULL
    assert view.charged == 2 * len(accepted)


def test_decode_queues_are_bounded_too():
    view = cluster(record("p0", "prefill"), record("d0", "decode", max_num_seqs=2))
    chooser = scheduler(view, waiting_max=3)
    for i in range(5):
        chooser.release(0.0, planned(chooser.on_request(0.0, facts(f"r{i}"))).prefill_ticket)
    rejection = refused(chooser.on_request(0.0, facts()))
    assert rejection.reason is Reason.QUEUE_FULL
    assert "decode" in rejection.detail


def test_a_prediction_beyond_the_first_token_objective_is_rejected_and_charges_nothing():
    view = pd_cluster()
    for one in ("p0", "p1"):
        view.charge_prefill(0.0, one, 8.0, 100)
    before = view.charged
    rejection = refused(scheduler(view, ttft_slo_s=5.0).on_request(0.0, facts()))
    assert rejection.reason is Reason.TTFT_SLO
    assert 3.0 < rejection.retry_after_s < 4.0
    assert view.charged == before


def test_a_prediction_beyond_the_token_gap_objective_is_rejected():
    rejection = refused(scheduler(pd_cluster(), tbt_slo_s=1e-4).on_request(0.0, facts()))
    assert rejection.reason is Reason.TBT_SLO


# ------------------------------------------------------------ replans


def test_a_prefill_retry_avoids_what_failed_and_leaves_the_decode_side_alone():
    view = pd_cluster()
    plan = planned(scheduler(view).replan(0.0, facts(), 0, ["p0"], Need.PREFILL))
    assert (plan.prefill, plan.decode, plan.decode_ticket) == ("p1", None, 0)
    assert view.load("p1").prefill_requests == 1


def test_what_failed_is_used_again_when_nobody_else_is_alive():
    view = cluster(record("p0", "prefill"), record("d0", "decode"))
    assert planned(scheduler(view).replan(0.0, facts(), 0, ["p0", "d0"], Need.PREFILL)).prefill == "p0"


def test_a_prefill_retry_without_prefill_instances_skips_leg_1():
    plan = planned(scheduler(cluster(record("d0", "decode"))).replan(0.0, facts(), 0, [], Need.PREFILL))
    assert (plan.prefill, plan.decode, plan.decision) == (None, None, Decision.NO_PREFILL_ALIVE)
    assert (plan.prefill_ticket, plan.decode_ticket) == (0, 0)


def test_a_migration_goes_to_another_decode_instance_and_counts_what_was_emitted():
    view = pd_cluster()
    plan = planned(scheduler(view).replan(0.0, facts(max_tokens=100), 40, ["d0"], Need.DECODE))
    assert (plan.prefill, plan.decode, plan.decision) == (None, "d1", Decision.MIGRATED)
    assert view.load("d1").decode_kv_tokens == 1000 + 40 + 60


def test_a_migration_without_decode_instances_goes_to_a_prefill_instance():
    view = cluster(record("p0", "prefill"))
    plan = planned(scheduler(view).replan(0.0, facts(), 3, ["d0"], Need.DECODE))
    assert (plan.decode, plan.decision) == ("p0", Decision.NO_DECODE_ALIVE)


def test_an_accepted_request_is_moved_whatever_queues_and_objectives_say():
    view = cluster(record("d0", "decode"))
    chooser = scheduler(view, waiting_max=0, ttft_slo_s=0.0, tbt_slo_s=0.0)
    assert planned(chooser.replan(0.0, facts(), 3, [], Need.DECODE)).decode == "d0"
    gone = scheduler(ClusterView()).replan(0.0, facts(), 3, [], Need.DECODE)
    assert refused(gone).reason is Reason.NO_INSTANCE_ALIVE


# ------------------------------------------------------------ policies and determinism


def test_round_robin_takes_turns_on_both_sides():
    chooser = scheduler(pd_cluster(), policy=Policy.ROUND_ROBIN)
    plans = [planned(chooser.on_request(0.0, facts(f"r{i}"))) for i in range(4)]
    assert [(p.prefill, p.decode) for p in plans] == [("p0", "d0"), ("p1", "d1")] * 2
    assert plans[0].decision is Decision.ROUND_ROBIN


@pytest.mark.parametrize("policy", [Policy.LEAST_LOAD, Policy.CACHE_AWARE, Policy.KVCACHE])
def test_among_idle_instances_that_do_both_the_one_with_fewest_streams_is_next(policy: Policy) -> None:
    """By id alone, an unloaded cluster would decode everything on its first instance."""
    one = scheduler(cluster(*(record(name) for name in "abc")), mode=Mode.AGGREGATED, policy=policy)
    chosen = []
    for number in range(6):
        plan = planned(one.on_request(0.0, facts(f"r{number}")))
        one.release(0.0, plan.prefill_ticket)  # its prompt is done, its answer goes on
        chosen.append(plan.decode)
    assert chosen == ["a", "b", "c"] * 2


def test_least_load_ignores_the_cache():
    index = PrefixIndex()
    index.apply("n1", b"".join(keys(30)), b"")
    view = pd_cluster()
    view.charge_prefill(0.0, "p1", 0.001, 10)
    plan = planned(scheduler(view, index, policy=Policy.LEAST_LOAD).on_request(0.0, facts()))
    assert (plan.prefill, plan.hit_blocks) == ("p0", 0)


def test_random_is_seeded_and_reaches_everybody():
    def draw(seed: int) -> list[str | None]:
        chooser = scheduler(pd_cluster(), policy=Policy.RANDOM, seed=seed)
        return [planned(chooser.on_request(0.0, facts(f"r{i}"))).prefill for i in range(40)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert 10 < draw(3).count("p0") < 30


SCRIPT = """
from tests.unit.conductor.test_scheduler import *
index = PrefixIndex()
index.apply("n1", b"".join(keys(10)), b""); index.apply("n0", b"".join(keys(10)), b"")
for policy in Policy:
    chooser = scheduler(pd_cluster(), index, policy=policy)
    for i in range(8):
        print(chooser.on_request(i / 10, facts(f"r{i}")))
"""


def test_plans_do_not_depend_on_the_hash_seed():
    outputs = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("Plan(") == 8 * len(Policy)


# ------------------------------------------------------------ what is being computed


def ask(chooser: Scheduler, name: str, blocks: int = 1000) -> Plan:
    own = [*keys(blocks), *keys(2, name)]  # all share the first blocks
    return planned(chooser.on_request(0.0, facts(name, prompt_len=len(own) * BLOCK + 1, keys=own)))


def test_who_shares_a_prompt_that_is_being_computed_is_priced_by_the_rest():
    chooser = scheduler(pd_cluster())
    first, second, third = (ask(chooser, name) for name in "abc")
    assert first.prefill != second.prefill  # an idle instance computes it as soon as the other one
    assert third.predicted_prefill_s < 0.2 * first.predicted_prefill_s
    assert third.predicted_ttft_s < 1.2 * first.predicted_ttft_s
    assert third.hit_blocks == 1000


def test_it_goes_elsewhere_when_waiting_there_takes_longer():
    view = pd_cluster()
    chooser = scheduler(view)
    first = ask(chooser, "a")
    view.charge_prefill(0.0, str(first.prefill), 60.0, 1)
    second = ask(chooser, "b")
    assert (second.prefill != first.prefill, second.hit_blocks) == (True, 0)


def test_what_was_given_up_is_not_waited_for():
    chooser = scheduler(pd_cluster())
    first = ask(chooser, "a")
    chooser.release(0.0, first.prefill_ticket)
    chooser.release(0.0, first.decode_ticket)
    assert ask(chooser, "b").hit_blocks == 0
