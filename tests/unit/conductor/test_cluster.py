"""ClusterView: health from links and pulses, its own stalls, and load given back exactly."""

import msgspec
import pytest

from conductor.cluster import FORGIVEN_MAX, PULSE_S, SILENCE_S, Charge, ClusterView, Health
from mooncake.core.messages import StoreRecord
from tests.unit.conductor.make import cluster, record


def says(transitions):
    return [(t.instance_id, str(t.before), str(t.after), t.lost) for t in transitions]


def run_ticks(view: ClusterView, start_s: float, end_s: float, pulsing: tuple[str, ...] = ()):
    """Tick every PULSE_S in (start_s, end_s]; `pulsing` instances answer before each tick."""
    transitions = []
    for step in range(1, round((end_s - start_s) / PULSE_S) + 1):
        now_s = start_s + step * PULSE_S
        for one in pulsing:
            transitions += view.pulse(now_s, one, 0.0)
        transitions += view.tick(now_s)
    return transitions


def test_an_instance_is_alive_only_with_record_link_and_pulse():
    view = ClusterView()
    assert view.pulse(0.0, "p", 0.0) == []
    assert view.instance_up(0.0, record("p")) == []
    assert view.pulse(0.0, "p", 0.0) == []  # no link yet
    assert view.alive() == []
    assert says(view.link_up(0.1, "p")) == [("p", "dead", "suspect", False)]
    assert view.link_up(0.1, "p") == []
    assert says(view.pulse(0.2, "p", 0.0)) == [("p", "suspect", "alive", False)]
    assert [r.instance_id for r, _ in view.alive()] == ["p"]


def test_silence_makes_suspect_and_a_fresh_pulse_makes_alive_again():
    view = cluster(record("p"), record("d"))
    lost = run_ticks(view, 0.0, SILENCE_S + PULSE_S, pulsing=("d",))
    assert says(lost) == [("p", "alive", "suspect", True)]
    assert lost[0].at_s == pytest.approx(SILENCE_S + PULSE_S)
    assert run_ticks(view, 1.75, 3.0, pulsing=("d",)) == []  # said once
    assert says(view.pulse(3.1, "p", 0.0)) == [("p", "suspect", "alive", False)]


def test_regular_pulses_keep_an_instance_alive():
    view = cluster(record("p"))
    assert run_ticks(view, 0.0, 60.0, pulsing=("p",)) == []


def test_a_relay_that_answers_for_a_silent_engine_does_not_hide_it():
    view = cluster(record("p"))
    assert view.pulse(0.5, "p", 1.4) == []
    assert says(view.pulse(0.75, "p", 1.6)) == [("p", "alive", "suspect", True)]
    assert says(view.pulse(1.0, "p", 0.1)) == [("p", "suspect", "alive", False)]


def test_link_down_is_death_at_once_and_late_pulses_do_not_revive():
    view = cluster(record("p"))
    assert says(view.link_down(0.3, "p")) == [("p", "alive", "dead", True)]
    assert view.pulse(0.4, "p", 0.0) == []
    assert view.link_down(0.5, "p") == []
    view.link_up(0.6, "p")
    assert says(view.pulse(0.7, "p", 0.0)) == [("p", "suspect", "alive", False)]


def test_another_epoch_is_another_engine():
    view = cluster(record("p", epoch="e1"))
    ticket = view.charge_decode("p", 100)
    assert says(view.instance_up(1.0, record("p", epoch="e2"))) == [("p", "alive", "dead", True)]
    view.link_up(1.1, "p")
    assert view.pulse(1.2, "p", 0.0, epoch="e1") == []  # the old one, late
    assert view.health("p") is Health.SUSPECT
    view.pulse(1.3, "p", 0.0, epoch="e2")
    view.charge_decode("p", 7)
    view.release(1.4, ticket)  # charged to the old start: the new one's load is untouched
    assert view.load("p").decode_requests == 1
    assert view.load("p").decode_kv_tokens == 7


def test_the_same_epoch_again_is_a_role_switch():
    view = cluster(record("p", "prefill"))
    view.charge_decode("p", 5)
    assert view.instance_up(1.0, record("p", "decode")) == []
    assert view.health("p") is Health.ALIVE
    assert view.record("p") == record("p", "decode")
    assert view.load("p").decode_requests == 1


def test_a_removed_record_is_lost_and_forgotten():
    view = cluster(record("p"))
    ticket = view.charge_prefill(0.0, "p", 1.0, 100)
    assert says(view.instance_removed(1.0, "p")) == [("p", "alive", "dead", True)]
    assert view.instance_removed(1.0, "p") == []
    assert view.record("p") is None
    assert view.health("p") is Health.DEAD
    view.release(1.0, ticket)
    assert view.charged == 0


def test_our_own_stall_is_not_our_peers_silence():
    view = cluster(record("p"), record("d"))
    run_ticks(view, 0.0, 1.0, pulsing=("p", "d"))
    assert view.tick(11.0) == []  # this process was stopped for 10 s
    lost = run_ticks(view, 11.0, 13.0, pulsing=("d",))
    assert says(lost) == [("p", "alive", "suspect", True)]  # p really is silent: a full limit later
    assert lost[0].at_s == pytest.approx(11.0 + SILENCE_S + PULSE_S)


def test_a_gateway_that_is_always_late_judges_in_the_end():
    view = cluster(record("p"))
    now_s, lost, ticks = 0.0, [], 0
    view.tick(now_s)
    while not lost:
        now_s, ticks = now_s + 1.0, ticks + 1
        lost = view.tick(now_s)
        assert ticks < 20
    assert ticks == FORGIVEN_MAX + 2


def test_a_slightly_late_tick_is_judged_as_usual():
    view = cluster(record("p"))
    view.tick(0.0)
    for step in range(1, 4):
        assert view.tick(step * 0.5) == []
    assert says(view.tick(2.0)) == [("p", "alive", "suspect", True)]


def test_queue_time_falls_as_the_head_runs_but_not_below_what_waits_behind():
    view = cluster(record("p"))
    load = view.load("p")
    first = view.charge_prefill(0.0, "p", 2.0, 100)
    second = view.charge_prefill(0.0, "p", 3.0, 200)
    assert load.queue_s(0.0) == 5.0
    assert load.queue_s(1.5) == 3.5
    assert load.queue_s(10.0) == 3.0  # the head overruns its prediction: it ends now, one hopes
    view.release(10.0, first)
    assert load.queue_s(11.0) == 2.0  # the second began at 10
    view.release(11.0, second)
    assert load.queue_s(11.0) == 0.0
    assert load.prefill_tokens == 0
    assert load.prefill_requests == 0


def test_leaving_the_middle_of_the_queue_does_not_restart_the_head():
    view = cluster(record("p"))
    view.charge_prefill(0.0, "p", 2.0, 1)
    middle = view.charge_prefill(0.0, "p", 3.0, 1)
    view.release(1.0, middle)
    assert view.load("p").queue_s(1.0) == 1.0


def test_releasing_twice_or_nothing_is_harmless():
    view = cluster(record("p"))
    ticket = view.charge_decode("p", 10)
    for _ in range(2):
        view.release(0.0, ticket)
    view.release(0.0, 0)
    assert view.load("p").decode_requests == 0
    assert view.charged == 0


def test_store_nodes_come_and_go():
    view = ClusterView()
    store = StoreRecord("n1", "e", "tcp://x", "tcp://y", "/fd", 1 << 20, 1)
    view.store_up(store)
    view.store_up(msgspec.structs.replace(store, node="n0"))
    assert [s.node for s in view.stores()] == ["n0", "n1"]
    view.store_removed("n1")
    view.store_removed("n1")
    assert [s.node for s in view.stores()] == ["n0"]


def test_events_about_strangers_are_ignored():
    view = ClusterView()
    for transitions in (view.link_up(0.0, "x"), view.link_down(0.0, "x"), view.tick(0.0)):
        assert transitions == []
    assert view.load("x").queue_s(0.0) == 0.0


def test_what_somebody_else_has_planned_is_charged_under_its_ticket_and_given_back_once():
    view = cluster(record("p0", "prefill"), record("d0", "decode"))
    view.adopt(0.0, Charge(1 << 62, "p0", True, 2.0, 100))
    view.adopt(0.0, Charge(1 << 62 | 1, "d0", False, 0.0, 70))
    assert (view.load("p0").queue_s(0.0), view.load("p0").prefill_tokens) == (2.0, 100)
    assert (view.load("d0").decode_requests, view.load("d0").decode_kv_tokens) == (1, 70)
    assert [charge.instance_id for charge in view.charges()] == ["p0", "d0"]
    for _ in range(2):
        view.release(1.0, 1 << 62)
        view.release(1.0, 1 << 62 | 1)
    assert (view.charged, view.load("p0").queue_s(1.0), view.load("d0").decode_kv_tokens) == (0, 0.0, 0)


def test_what_is_taken_over_has_a_ticket_of_our_own_and_none_on_an_unknown_instance():
    view = cluster(record("p0", "prefill"))
    view.number_from(100)
    foreign = Charge(7, "p0", True, 2.0, 100)
    ticket = view.take_over(0.0, foreign)
    assert ticket == 101
    assert view.charge(ticket) == msgspec.structs.replace(foreign, ticket=ticket)
    assert view.take_over(0.0, Charge(8, "gone", True, 2.0, 100)) == 0
    assert view.charge_prefill(0.0, "p0", 1.0, 10) == 102


def test_charges_of_an_earlier_start_are_handed_to_nobody():
    view = cluster(record("p0", "prefill"))
    ticket = view.charge_prefill(0.0, "p0", 1.0, 10)
    view.instance_up(1.0, record("p0", "prefill", epoch="e2"))
    assert view.charges() == []
    view.release(1.0, ticket)
    assert view.load("p0").queue_s(1.0) == 0.0
