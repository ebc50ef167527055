"""What batch work may use: idle instances, a little of the steps, half of the room."""

import pytest

from conductor.cost import CostModel
from conductor.idle import ACTIVE_S, PACE_PRIOR, ROOM, SPARE, TBT_MORE, URGENT_ROOM, Idle, Pace
from conductor.plan import Needs
from tests.unit.conductor.make import cluster, record

NEEDS = Needs(1.0, 1.0, 1000)
SEATS = 64


class World:
    """Instances of one seat count; the cost model's prior prices steps."""

    def __init__(self, prefills: int = 4, decodes: int = 2, kv_blocks: int = 4096) -> None:
        records = [record(f"p{n}", "prefill") for n in range(prefills)]
        records += [record(f"d{n}", "decode", kv_blocks=kv_blocks) for n in range(decodes)]
        self.view = cluster(*records)
        self.cost = CostModel()
        self.idle = Idle(self.view, self.cost)
        self.decodes = decodes

    def has_room(self, now_s: float = 1000.0, needs: Needs = NEEDS, *, urgent: bool = False) -> bool:
        return self.idle.has_room(now_s, needs, urgent=urgent)

    def prompt(self, instance_id: str) -> int:
        return self.view.charge_prefill(0.0, instance_id, 1.0, 1000)

    def answers(self, count: int, kv_tokens: int = 1000, *, is_batch: bool = False) -> list[int]:
        return [
            self.view.charge_decode(f"d{n % self.decodes}", kv_tokens, is_batch=is_batch)
            for n in range(count)
        ]


def test_a_cluster_without_engines_has_room_because_others_tell_better_what_is_missing():
    assert World(0, 0).has_room()


def test_while_better_classes_are_active_some_instances_are_kept_for_who_comes_next():
    world = World()
    assert int(4 * SPARE) == 1
    for n in range(3):
        world.idle.heard(1000.0)
        assert world.has_room() == (n < 3)
        world.prompt(f"p{n}")
    assert not world.has_room(), "one is left"
    assert world.has_room(urgent=True)
    assert world.has_room(1000.0 + ACTIVE_S), "nobody was heard of for a while"
    world.prompt("p3")
    assert not world.has_room(1000.0 + ACTIVE_S, urgent=True)


def test_of_a_few_instances_none_is_kept():
    world = World(prefills=1)
    world.idle.heard(1000.0)
    assert world.has_room()


def test_batch_answers_make_steps_of_better_answers_a_little_longer_and_no_more():
    world = World()
    world.answers(20)
    taken = 0
    while world.has_room():
        world.answers(1, is_batch=True)
        taken += 1
    assert 0 < taken < SEATS
    alone_s = world.cost.tbt_s(10, 10_000)
    loads = [world.view.load(name) for name in ("d0", "d1")]
    mean = [
        sum(getattr(load, name) for load in loads) / 2 for name in ("decode_requests", "decode_kv_tokens")
    ]
    assert world.cost.tbt_s(mean[0], mean[1]) <= (1 + TBT_MORE) * alone_s
    assert world.has_room(urgent=True)


@pytest.mark.parametrize(("urgent", "share"), [(False, ROOM), (True, URGENT_ROOM)])
def test_seats_and_kv_room_are_left_for_who_comes_after_a_quiet_night(urgent, share):
    for kv_blocks, kv_tokens, most in ((4096, 100, 2 * SEATS * share), (1000, 4000, 2 * 8 * share)):
        world = World(kv_blocks=kv_blocks)
        taken = 0
        while world.has_room(needs=Needs(1.0, 1.0, kv_tokens), urgent=urgent):
            world.answers(1, kv_tokens, is_batch=True)
            taken += 1
        assert taken == int(most)


def test_batch_work_never_needs_what_better_classes_hold():
    world = World(decodes=1, kv_blocks=1000)
    world.answers(7, 4000)
    assert not world.has_room(needs=Needs(1.0, 1.0, 4001), urgent=True)
    assert world.has_room(needs=Needs(1.0, 1.0, 4000), urgent=True)


def test_what_is_given_back_is_room_again():
    world = World(prefills=1)
    ticket = world.prompt("p0")
    assert not world.has_room()
    world.view.release(1.0, ticket)
    tickets = world.answers(SEATS, is_batch=True)
    assert not world.has_room()
    for one in tickets:
        world.view.release(1.0, one)
    assert world.has_room()
    assert (world.view.load("d0").batch_requests, world.view.load("d0").batch_kv_tokens) == (0, 0)


def test_one_batch_answer_is_let_in_however_little_a_step_has_to_spare():
    world = World(prefills=1, decodes=1)
    world.cost = CostModel(tbt_prior=(1e-9, 1.0, 1e-9))  # every answer makes steps a second longer
    world.idle = Idle(world.view, world.cost)
    world.answers(4)
    assert world.has_room()
    world.answers(1, is_batch=True)
    assert not world.has_room()


def test_pace_is_what_began_per_second_while_more_waited():
    pace = Pace()
    assert pace.per_s(8) == 8 * PACE_PRIOR
    for second in range(1000):
        pace.began(float(second), 0.5, more_waits=True)
    assert pace.per_s(8) == pytest.approx(0.5, rel=0.6)
    learned = pace.per_s(8)
    pace.began(1000.0, 0.0, more_waits=False)
    pace.began(9000.0, 0.0, more_waits=True)
    assert pace.per_s(8) == pytest.approx(learned, rel=0.01), "nobody waited, so nothing is learned"
    for second in range(9000, 10000):
        pace.began(float(second), 2.0, more_waits=True)
    assert pace.per_s(8) == pytest.approx(2.0, rel=0.3)
