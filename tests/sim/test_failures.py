"""Seeded histories of kills, stalls and returns: every request completes exactly once.

A failing history prints its seed; `history(seed)` is the same again to the last event.
"""

import pytest

from conductor.cluster import ENGINE_SILENCE_S, SILENCE_S
from conductor.plan import Outcome
from conductor.scheduler import Mode, Policy, SchedulerConfig
from tests.sim.world import World, token

ROLES = {"d0": "decode", "d1": "decode", "p0": "prefill", "p1": "prefill"}
SCHEDULES = 400
QUICK_SCHEDULES = 150
"""Of `make unit`; the others carry the marker chaos, so that only a full run has them."""
BATCH = 50
FAULTS_S = 6.0
HORIZON_S = 40.0
REQUESTS = 8


def history(seed: int) -> World:
    """Run one history: one instance never fails, all others do as the seed says."""
    pick = World(seed, ROLES, SchedulerConfig()).random  # a seed decides its configuration, too
    config = SchedulerConfig(
        mode=pick.choice([Mode.DISAGGREGATED, Mode.DISAGGREGATED, Mode.AGGREGATED]),
        policy=pick.choice(list(Policy)),
        seed=seed,
    )
    world = World(seed, ROLES, config)
    steady, *fallible = pick.sample(sorted(ROLES), len(ROLES))
    for i in range(REQUESTS):
        children = pick.choice([1, 1, 1, 3])
        first = pick.random() < 0.5
        world.at(
            pick.uniform(0.01, FAULTS_S),
            lambda i=i, children=children, first=first: world.arrive(f"r{i}", children, first_token=first),
        )
    for _ in range(pick.randint(1, 6)):
        name, when_s, length_s = pick.choice(fallible), pick.uniform(0.0, FAULTS_S), pick.uniform(0.2, 5.0)
        fault = pick.choice([world.kill, world.stall])
        world.at(when_s, lambda f=fault, n=name, s=length_s: f(n, s))
    if pick.random() < 0.2:
        stall_s = pick.uniform(0.2, 4.0)
        world.at(pick.uniform(0.0, FAULTS_S), lambda: world.stall_gateway(stall_s))
    assert steady not in fallible
    world.run(HORIZON_S)
    return world


def check(seed: int, world: World) -> None:
    for name, machine in world.machines.items():
        about = f"seed {seed}: {name} {machine.state} {world.outcomes[name]}"
        assert world.outcomes[name] == [Outcome.FINISHED], about
        # children of one prompt need no token of their own here: each has its own sequence
        expected = [token(name, i) for i in range(machine.facts.max_tokens)]
        assert world.tokens[name] == expected, f"{about}: {world.tokens[name]}"
    assert world.cluster.charged == 0, f"seed {seed}: {world.cluster.charged} charges left"
    assert not any(engine.legs for engine in world.engines.values()), f"seed {seed}: orphan legs"


BATCHES = [
    pytest.param(first, marks=() if first < QUICK_SCHEDULES else pytest.mark.chaos)
    for first in range(0, SCHEDULES, BATCH)
]


@pytest.mark.parametrize("first", BATCHES)
def test_every_request_completes_exactly_once_while_one_instance_lives(first):
    moved = 0
    for seed in range(first, first + BATCH):
        world = history(seed)
        check(seed, world)
        moved += world.counts["Replan"]
    assert moved > 0, "no history lost a leg: this test proves nothing"


def test_a_seed_is_a_whole_history():
    a, b = history(7), history(7)
    assert a.counts == b.counts
    assert a.transitions == b.transitions
    assert a.tokens == b.tokens


@pytest.mark.parametrize("stall_s", [0.4, 2.0, 10.0])
def test_a_stalled_gateway_loses_nobody(stall_s):
    world = World(1, ROLES, SchedulerConfig())
    for i in range(4):
        world.at(0.5 + i / 10, lambda i=i: world.arrive(f"r{i}", 1))
    world.at(1.0, lambda: world.stall_gateway(stall_s))
    world.run(20.0)
    check(1, world)
    assert not [t for t in world.transitions if t.lost]
    assert world.counts["Replan"] == 0


def test_a_stalled_decode_instance_loses_its_streams_within_the_limit_and_its_late_tokens_are_stale():
    world = World(3, {"d0": "decode", "p0": "prefill"}, SchedulerConfig())
    world.at(0.5, lambda: world.arrive("r0", 1))
    world.run(0.5)
    while not world.tokens["r0"]:
        world.run(world.now_s + 0.01)
        world.now_s += 0.01
    stalled_s = world.now_s
    world.stall("d0", 5.0)
    world.run(20.0)
    check(3, world)
    lost = [t for t in world.transitions if t.lost]
    assert [t.instance_id for t in lost] == ["d0"]
    assert lost[0].at_s - stalled_s < max(SILENCE_S, ENGINE_SILENCE_S) + 0.5
    assert world.cluster.alive()[0][0].instance_id == "d0"  # it came back


def test_without_any_instance_clients_wait_and_are_served_when_one_returns():
    world = World(5, {"x": "both"}, SchedulerConfig())
    world.at(0.5, lambda: world.kill("x", 6.0))
    world.at(1.0, lambda: world.arrive("r0", 1))
    world.run(20.0)
    check(5, world)
    assert world.counts["rejected"] >= 5
