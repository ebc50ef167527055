"""Every answer of the scheduler explains itself by what it compared, not by what the request holds."""

from functools import partial

import msgspec
import pytest

from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import Need, Plan, Reason, Rejection
from conductor.pricing import Trail
from conductor.scheduler import Mode, Policy, Scheduler, SchedulerConfig
from conductor.why import OPTIONS_MAX, REJECTED, Decided, Decisions, Why, explain
from tests.unit.conductor.make import BLOCK, cluster, facts, keys, record

N_BLOCKS = 1000 // BLOCK


class Listened:
    """A scheduler somebody listens to."""

    def __init__(self, *records, index=None, **config):
        self.view = cluster(*records)
        self.scheduler = Scheduler(SchedulerConfig(**config), index or PrefixIndex(), CostModel(), self.view)
        self.trail = Trail()
        self.scheduler.listen(self.trail)

    def ask(self, one=None, now_s=5.0) -> tuple[Plan | Rejection, Why]:
        one = one or facts()
        self.trail.clear()
        answer = self.scheduler.on_request(now_s, one)
        return answer, explain(now_s, one, answer, self.trail)


def pools(prefills=2, decodes=2):
    return [record(f"p{i}", "prefill", node=f"n{i}") for i in range(prefills)] + [
        record(f"d{i}", "decode", node=f"m{i}") for i in range(decodes)
    ]


def test_a_plan_is_the_best_of_the_prefill_options_in_its_record():
    index = PrefixIndex()
    index.apply("n1", b"".join(keys(N_BLOCKS)), b"")
    plan, why = Listened(*pools(), index=index).ask()
    assert (why.prefill, why.decode) == (plan.prefill, plan.decode)
    assert (why.kind, why.reason) == (str(plan.decision), "")
    assert why.prefills[0].instance == plan.prefill == "p1"
    assert why.prefills[0].ttft_s == why.ttft_s == plan.predicted_ttft_s
    assert {one.instance: one.hit_blocks for one in why.prefills}["p1"] == N_BLOCKS
    assert {one.instance for one in why.prefills} == {"p0", "p1"}
    assert {one.instance for one in why.decodes} == {"d0", "d1"}


@pytest.mark.parametrize("policy", list(Policy))
def test_under_every_policy_the_chosen_instances_are_in_the_record(policy):
    _, why = Listened(*pools(), policy=policy).ask()
    assert why.prefill in {one.instance for one in why.prefills}
    assert why.decode in {one.instance for one in why.decodes}


def test_queue_and_work_add_up_to_the_predicted_time_to_first_token():
    world = Listened(*pools(prefills=1))
    for _ in range(3):
        _, why = world.ask()
    (option,) = why.prefills
    assert option.queue_s > 0
    assert option.queue_s + option.work_s == pytest.approx(option.ttft_s)


def test_a_fetch_names_the_node_it_comes_from():
    index = PrefixIndex()
    index.apply("m0", b"".join(keys(N_BLOCKS)), b"")
    _, why = Listened(*pools(), index=index).ask()
    assert (why.prefills[0].fetch_node, why.prefills[0].fetch_blocks) == ("m0", N_BLOCKS)


def test_decode_options_count_the_request_itself_and_not_twice():
    world = Listened(*pools(decodes=1))
    _, first = world.ask()
    _, second = world.ask()
    assert [why.decodes[0].requests for why in (first, second)] == [1, 2]
    assert second.decodes[0].kv_tokens == 2 * first.decodes[0].kv_tokens
    assert second.decodes[0].kv_tokens_max == 4096 * BLOCK


def test_a_rejection_says_why_and_shows_what_was_compared():
    answer, why = Listened(*pools(), ttft_slo_s=1e-6).ask()
    assert isinstance(answer, Rejection)
    assert (why.kind, why.reason, why.detail) == (REJECTED, str(Reason.TTFT_SLO), answer.detail)
    assert why.prefill is None
    assert len(why.prefills) == 2


def test_a_rejection_before_any_comparison_shows_none():
    _, why = Listened().ask()
    assert why.reason == str(Reason.NO_INSTANCE_ALIVE)
    assert (why.prefills, why.decodes, why.prefill_count) == ([], [], 0)


def test_a_leg_placed_again_is_explained_too():
    world = Listened(*pools())
    world.trail.clear()
    one = facts()
    answer = world.scheduler.replan(5.0, one, 7, ["d0"], Need.DECODE)
    why = explain(5.0, one, answer, world.trail, emitted_tokens=7)
    assert (why.kind, why.decode, why.emitted_tokens) == ("migrated", "d1", 7)


def test_nobody_listening_changes_no_plan():
    config = SchedulerConfig(mode=Mode.DISAGGREGATED)
    alone = Scheduler(config, PrefixIndex(), CostModel(), cluster(*pools()))
    assert Listened(*pools()).ask()[0] == alone.on_request(5.0, facts())


def test_no_token_and_no_block_key_is_in_a_record():
    index = PrefixIndex()
    index.apply("n1", b"".join(keys(N_BLOCKS)), b"")
    one = facts(tail_key=keys(1, "tail")[0])
    _, why = Listened(*pools(), index=index).ask(one)
    text = msgspec.json.encode(why).decode()
    for key in [*one.keys, one.tail_key]:
        assert key.hex() not in text
        assert key.hex()[:12] not in text


def test_a_large_cluster_is_listed_by_its_best_and_counted_whole():
    _, why = Listened(*pools(prefills=OPTIONS_MAX + 9)).ask()
    assert (len(why.prefills), why.prefill_count) == (OPTIONS_MAX, OPTIONS_MAX + 9)
    assert why.prefills == sorted(why.prefills, key=lambda one: (one.ttft_s, one.instance))
    assert why.prefill == why.prefills[0].instance


def test_records_are_kept_newest_first_bounded_and_found_by_either_id():
    world = Listened(*pools())
    kept = Decisions(records_max=3)
    for number in range(5):
        one = facts(f"c{number}-x")
        answer = world.scheduler.on_request(5.0, one)
        why = partial(explain, 5.0, one, answer, world.trail, client_id=f"c{number}")
        kept.add(Decided(one.request_id, f"c{number}", why))
    assert [why.client_id for why in kept.last()] == ["c4", "c3", "c2"]
    assert (
        [why.client_id for why in kept.last("c3")] == [why.client_id for why in kept.last("c3-x")] == ["c3"]
    )
    assert kept.last("c0") == kept.last("nobody's") == []
