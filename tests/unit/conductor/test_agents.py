"""Turns of agents, from their arrival to what stores are told."""

from conductor.agents import Agents
from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.gate import PATIENCE, patient_until
from conductor.keeps import Order
from conductor.programs import TTL_PRIOR_S
from conductor.terms import Terms
from mooncake.core.messages import StoreRecord
from tests.unit.conductor.make import BLOCK, facts, keys, plan, record

BLOCK_BYTES = 1 << 10
RUN = Terms(tenant="t", program="run", tools=True)


def site() -> Agents:
    view = ClusterView()
    for node, instance_id in (("n0", "p0"), ("n1", "d0")):
        view.store_up(StoreRecord(node, "e", "tcp://x", "", "", 400 * BLOCK_BYTES, 1))
        view.instance_up(0.0, record(instance_id, node=node, block_bytes=BLOCK_BYTES))
    return Agents(CostModel(), view)


def turn(
    agents: Agents,
    blocks: int,
    terms: Terms = RUN,
    *,
    calls: bool = True,
    served: bool = True,
    prefill: str | None = "p0",
) -> list[Order]:
    """Let a turn come, run and end; return what stores are told when it has ended."""
    one = agents.came(0.0, terms)
    assert one is not None
    one.planned(0.0, facts(prompt_len=blocks * BLOCK + 1), plan(prefill, "d0"))
    agents.orders(0.0)
    one.calls_tools = calls
    one.ended(1.0, served=served)
    return agents.orders(1.0)


def test_the_context_of_an_answer_that_calls_a_tool_is_kept_where_it_was_computed():
    for prefill, node in (("p0", "n0"), (None, "n1")):
        (order,) = turn(site(), 10, prefill=prefill)
        assert (order.node, order.keys) == (node, keys(10))
        assert order.ttl_s > TTL_PRIOR_S


def test_nothing_is_kept_of_other_answers():
    assert turn(site(), 10, calls=False) == []
    assert turn(site(), 10, served=False) == []
    assert site().came(0.0, Terms(tools=True)) is None  # of no program, nothing comes back


def test_what_asks_for_it_is_kept_for_as_long_as_it_asks():
    (order,) = turn(site(), 10, Terms(session="s", cache_ttl_s=300.0), calls=False)
    assert order.keys == keys(10)
    assert order.ttl_s > 300


def test_the_last_turn_lets_go_of_what_it_went_on_with():
    agents = site()
    turn(agents, 10)
    assert turn(agents, 14, calls=False) == [Order("n0", keys(10), 0.0)]


def test_a_turn_that_is_never_planned_lets_go_of_nothing():
    agents = site()
    turn(agents, 10)
    one = agents.came(2.0, RUN)
    assert one is not None
    one.ended(3.0, served=False)
    assert agents.orders(3.0) == []
    assert len(agents.kept) == 1


def test_of_several_answers_to_one_prompt_the_first_one_s_place_counts():
    agents = site()
    one = agents.came(0.0, RUN)
    assert one is not None
    one.planned(0.0, facts(prompt_len=10 * BLOCK + 1), plan("p0", "d0"))
    one.planned(0.0, facts(prompt_len=10 * BLOCK + 1), plan(None, "d0"))
    one.calls_tools = True
    one.ended(1.0, served=True)
    assert [order.node for order in agents.orders(1.0)] == ["n0"]


def test_a_store_keeps_no_more_than_half_of_its_memory():
    assert turn(site(), 200) != []
    assert turn(site(), 201) == []


def test_without_a_store_nothing_is_kept():
    agents = Agents(CostModel(), ClusterView())
    assert turn(agents, 10) == []


def test_a_turn_is_as_patient_as_if_it_had_come_with_the_first_one_and_overtakes_nobody_out_of_patience():
    agents, wait_s = site(), 10.0
    first = agents.came(100.0, RUN)
    later = agents.came(105.0, RUN)
    late = agents.came(500.0, RUN)
    assert first is not None
    assert later is not None
    assert late is not None
    own_s = 100.0 + wait_s * PATIENCE
    assert patient_until(100.0, wait_s, first.terms) == own_s
    assert patient_until(105.0, wait_s, later.terms) == own_s
    assert patient_until(500.0, wait_s, late.terms) == 500.0
    assert patient_until(105.0, wait_s, Terms()) == 105.0 + wait_s * PATIENCE
