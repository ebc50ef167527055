"""vLLM's gauges of engines are right whoever told last, however many share a number, and when one is gone."""

from conductor.engine_gauges import NOTHING, EngineGauges, as_stats, fill, queues_of
from conductor.vllm_seam import SchedulerStats
from mooncake.core.messages import EngineQueues

LAST = 7


def queues(running: int, waiting: int = 0, deferred: int = 0, kv: float = 0.0) -> EngineQueues:
    return EngineQueues(running, waiting, deferred, kv)


def test_engines_that_share_a_number_show_their_sum_and_the_mean_of_their_kv_use():
    gauges = EngineGauges()
    assert gauges.stepped(LAST, "a", queues(3, 2, 1, 0.2)) == queues(3, 2, 1, 0.2)
    assert gauges.stepped(LAST, "b", queues(4, 1, 0, 0.4)) == queues(7, 3, 1, (0.2 + 0.4) / 2)
    assert gauges.stepped(LAST, "a", queues(0, 0, 0, 0.0)) == queues(4, 1, 0, 0.2)
    assert gauges.stepped(0, "c", queues(9)) == queues(9)


def test_what_pulses_say_is_shown_once_and_only_what_changed():
    gauges = EngineGauges()
    there = {"a", "b"}
    gauges.heard(0, "a", NOTHING)
    assert gauges.changed(there) == []
    gauges.heard(0, "a", queues(2))
    gauges.heard(LAST, "b", queues(1))
    assert gauges.changed(there) == [(0, queues(2)), (LAST, queues(1))]
    gauges.heard(0, "a", queues(2))
    assert gauges.changed(there) == []
    gauges.stepped(0, "a", queues(5))  # vLLM saw it with the step
    assert gauges.changed(there) == []
    gauges.heard(0, "a", NOTHING)
    assert gauges.changed(there) == [(0, NOTHING)]


def test_an_engine_that_is_gone_counts_nothing_and_its_number_may_be_another_s():
    gauges = EngineGauges()
    gauges.stepped(0, "a", queues(5, 3))
    gauges.stepped(LAST, "b", queues(1))
    gauges.stepped(LAST, "c", queues(2))
    assert gauges.changed({"c"}) == [(0, NOTHING), (LAST, queues(2))]
    assert gauges.changed({"c"}) == []
    gauges.heard(0, "d", queues(4))
    assert gauges.changed({"c", "d"}) == [(0, queues(4))]


def test_an_engine_that_comes_back_under_another_number_counts_once():
    gauges = EngineGauges()
    gauges.stepped(0, "a", queues(5))
    gauges.heard(1, "a", queues(6))
    assert gauges.changed({"a"}) == [(0, NOTHING), (1, queues(6))]


def test_only_gauges_are_replaced_and_what_vllm_adds_up_is_told_as_it_was():
    stats = SchedulerStats(num_running_reqs=1, num_waiting_reqs=4, num_skipped_waiting_reqs=2)
    stats.prefix_cache_stats.queries = 64
    assert queues_of(stats) == queues(1, 6, 2)
    fill(stats, queues(10, 9, 3, 0.5))
    assert (stats.num_running_reqs, stats.num_waiting_reqs, stats.num_skipped_waiting_reqs) == (10, 6, 3)
    assert (stats.kv_cache_usage, stats.prefix_cache_stats.queries) == (0.5, 64)
    assert queues_of(as_stats(queues(10, 9, 3, 0.5))) == queues(10, 9, 3, 0.5)
    assert as_stats(queues(1)).prefix_cache_stats.queries == 0
