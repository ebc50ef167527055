"""A request whose blocks are on another host: the store is told where, and given the time to fetch them."""

import pytest

from mooncake.core.errors import PeerGone
from mooncake.worker import connector_scheduler
from mooncake.worker.connector_scheduler import FETCH_WAIT_S, LEASE_S, LOOKUP_WAIT_S
from tests.unit.worker.fakes import FakeRequest, step_output
from tests.unit.worker.test_connector_scheduler import Clock, Engine, prompt


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(connector_scheduler, "time", clock)
    return clock


def request_of(source: str, leg: str, target: str = "") -> FakeRequest:
    request = FakeRequest(prompt(8), leg=leg)
    ours = {"leg": leg, "prompt_len": 8, "source": source, "target": target}
    request.sampling_params.extra_args = {"kv_transfer_params": {"mooncake": ours}}
    return request


@pytest.mark.parametrize("leg", ["prefill", "decode", "whole"])
def test_the_store_is_told_which_node_has_the_blocks_and_may_take_its_time(clock, leg):
    request = request_of("n7", leg)
    engine = Engine(hold=request.full)
    assert engine.arrive(request) == (8, True)
    assert engine.pool.sources == ["n7"]
    assert engine.pool.lookups[0][1:] == (LEASE_S, FETCH_WAIT_S)


def test_a_fetch_that_takes_too_long_is_a_miss(clock):
    request = request_of("n7", "whole")
    engine = Engine(hold=request.full)
    engine.pool.answering = False
    engine.arrive(request)
    clock.now_s += FETCH_WAIT_S + LOOKUP_WAIT_S - 0.01
    assert engine.half.matched(request, 0) == (None, False)
    clock.now_s += 0.02
    assert engine.half.matched(request, 0) == (0, False)
    assert engine.pulse["lookup_timeouts"] == 1


def test_a_request_looked_up_again_still_knows_where_its_blocks_are(clock):
    request = request_of("n7", "whole")
    engine = Engine(hold=request.full)
    engine.arrive(request)
    clock.now_s += LEASE_S  # queued for long
    engine.half.matched(request, 0)
    assert engine.pool.sources == ["n7", "n7"]


def test_what_is_found_here_is_handed_over_at_once_and_what_is_computed_when_it_is_saved(clock):
    request = request_of("", "prefill", target="n9")
    engine = Engine(hold=request.full[:1])
    engine.load(request)
    assert engine.pool.handed_over == [(request.full[:1], "n9")]
    meta = engine.half.step(step_output({request.request_id: (4, 4)}))
    assert [(job.keys, job.target) for job in meta.saves] == [(request.full[1:], "n9")]


def test_a_hand_over_that_fails_is_no_failure_of_the_request(clock):
    request = request_of("", "prefill", target="n9")
    engine = Engine(hold=request.full[:1])
    engine.pool.errors["hand_over"] = PeerGone("store away")
    assert engine.arrive(request) == (4, True)
