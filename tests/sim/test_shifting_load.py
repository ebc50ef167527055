"""The load turns from long prompts to long answers and back: the planner decides, in production classes."""

import pytest

from benchmarks.sim.nouns import WorldConfig
from benchmarks.sim.profile import DEFAULT, read_profile
from benchmarks.sim.report import within
from benchmarks.sim.shifts import Phase, shifting
from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest
from benchmarks.sim.world import World
from conductor.planner import MEMORY, REST, Planner, PlannerConfig, Switch
from mooncake.core.errors import ConfigError

A800 = read_profile(DEFAULT)
BLOCKS = A800.host_kv_tokens // BLOCK_TOKENS
PHASE_S = 120.0
SLO_S = 10.0, 0.1
INTERVAL_S = PlannerConfig().interval_s
WINDOW_S = INTERVAL_S / MEMORY
"""What the forecast remembers: half of it, and some, is the load after a shift when it has passed."""


def shifts(seed: int) -> list[TraceRequest]:
    """Nine tenths of what 3 + 1 and then 1 + 3 instances sustain: any split fails in one of the two."""
    prompts = Phase(length_s=PHASE_S, rate=1.13, prompt_tokens=16_000, answer_tokens=50)
    answers = Phase(length_s=PHASE_S, rate=20.0, prompt_tokens=250, answer_tokens=400)
    return shifting([prompts, answers, prompts], seed)


def served(world: World) -> float:
    return sum(within(entry, *SLO_S) for entry in world.entries) / len(world.entries)


class Watched:
    """A run, and what the planner believed and ordered when."""

    def __init__(self, requests: list[TraceRequest], prefill: int, planned: bool) -> None:
        planner = PlannerConfig(tbt_slo_s=SLO_S[1]) if planned else None
        config = WorldConfig(prefill=prefill, decode=4 - prefill, decode_host_blocks=BLOCKS, planner=planner)
        self.world = World(requests, A800, config)
        self.pressed: list[tuple[float, str]] = []  # when a pool was too small
        self.orders: list[tuple[float, Switch]] = []
        if self.world.planner is not None:
            self._listen(self.world.planner)
        self.world.run()

    def _listen(self, planner: Planner) -> None:
        step = planner.step

        def heard(members):
            orders = step(members)
            now_s, forecast = self.world.time.now_s, planner.forecast
            self.pressed += [(now_s, "prefill")] if forecast.prefill_pressure > 1 else []
            self.pressed += [(now_s, "decode")] if forecast.decode_pressure > 1 else []
            self.orders += [(now_s, order) for order in orders]
            return orders

        planner.step = heard  # type: ignore[method-assign]


@pytest.fixture(scope="module", params=[1, 2])
def requests(request: pytest.FixtureRequest) -> list[TraceRequest]:
    return shifts(request.param)


@pytest.fixture(scope="module")
def planned(requests: list[TraceRequest]) -> Watched:
    return Watched(requests, 2, planned=True)


def test_the_pools_follow_a_shift_within_the_window_and_a_period_and_nobody_flaps(planned: Watched) -> None:
    assert all(entry.done and not entry.failed for entry in planned.world.entries)
    orders = [(at_s, switch.role) for at_s, switch in planned.orders]
    # 2 + 2 -> 3 + 1 -> 1 + 3 -> 3 + 1, and no switch more
    assert [role for _, role in orders] == ["prefill", "decode", "decode", "prefill", "prefill"]
    for phase, at in ((0, 0), (1, 1), (2, 3)):
        after_s = orders[at][0] - phase * PHASE_S
        assert 0 < after_s <= WINDOW_S + INTERVAL_S, orders
    last: dict[str, float] = {}
    for at_s, switch in planned.orders:
        assert at_s - last.get(switch.instance_id, -PHASE_S) > REST * INTERVAL_S
        last[switch.instance_id] = at_s


def test_a_pool_that_the_forecast_finds_too_small_is_helped_within_a_period(planned: Watched) -> None:
    for phase in range(3):
        begin_s, end_s = phase * PHASE_S, (phase + 1) * PHASE_S
        ordered_s = next(at_s for at_s, _ in planned.orders if begin_s < at_s < end_s)
        pressed_s = next((at_s for at_s, _ in planned.pressed if begin_s < at_s < end_s), end_s)
        assert ordered_s <= pressed_s + INTERVAL_S


def test_no_split_that_stays_serves_as_many_in_time(requests: list[TraceRequest], planned: Watched) -> None:
    fixed = [served(Watched(requests, prefill, planned=False).world) for prefill in (1, 2, 3)]
    assert served(planned.world) > max(fixed)


def test_a_shifting_load_is_its_phases_one_after_the_other() -> None:
    phases = [Phase(50.0, 4.0, 5000, 100, shared=0.5), Phase(50.0, 2.0, 600, 900)]
    requests = shifting(phases, 1)
    assert requests == shifting(phases, 1)
    early = [one for one in requests if one.arrival_s < 50]
    late = requests[len(early) :]
    assert len(early) == pytest.approx(200, rel=0.2)
    assert min(one.input_tokens for one in early) >= 2500
    assert max(one.input_tokens for one in late) <= 900
    assert {one.hash_ids[:4] for one in early} == {(0, 1, 2, 3)}
    assert all(len(one.hash_ids) == -(-one.input_tokens // BLOCK_TOKENS) for one in requests)
    with pytest.raises(ConfigError, match="positive"):
        shifting([Phase(1.0, 0.0, 1, 1)], 1)
