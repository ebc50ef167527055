"""What a gateway learns from frames of engines is what engines did, not when it found time for them."""

import pytest
from prometheus_client import CollectorRegistry

from conductor.meter import TBT_SAMPLE, Meter
from conductor.metrics import GatewayMetrics

STEP_S = 0.02


class Learning:
    """A decider, as far as steps go."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, float]] = []

    def stepped(self, requests: int, context_tokens: int, seconds: float) -> None:
        self.steps.append((requests, context_tokens, seconds))


@pytest.mark.parametrize("bunch", [1, 5, 40])
def test_frames_that_waited_for_a_busy_gateway_and_come_together_are_as_far_apart_as_the_engine_says(
    bunch: int,
):
    learning = Learning()
    meter = Meter(learning, GatewayMetrics(CollectorRegistry()))  # type: ignore[arg-type]
    for number in range(10 * TBT_SAMPLE):
        stamp_s = 1000.0 + number * STEP_S  # on another host's clock
        now_s = 5.0 + (number // bunch + 1) * bunch * STEP_S
        meter.frame("decode-0", now_s, stamp_s, 3, 300, pure=True)
    assert len(learning.steps) >= 8
    assert [seconds for _, _, seconds in learning.steps] == pytest.approx([STEP_S] * len(learning.steps))
    assert {step[:2] for step in learning.steps} == {(3, 300)}
