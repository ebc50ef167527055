"""The open loop against an endpoint that answers, refuses, fails, breaks off and hangs."""

import asyncio

import pytest

from benchmarks.replay.client import BROKEN_OFF, LATE, NOT_SENT, Target, replay, served
from benchmarks.replay.prompts import Shape
from benchmarks.replay.run import headers_of, ready
from benchmarks.sim.trace import TraceRequest
from mooncake.core.errors import ConfigError, PeerGone

SHAPE = Shape(scale=1 / 16)


def trace(count: int, apart_s: float = 0.0) -> list[TraceRequest]:
    return [TraceRequest(n * apart_s, 600, 64, (0, n + 1)) for n in range(count)]


async def run(endpoint, requests, tell=lambda _: None, headers=(), stop=None, shape=SHAPE, **target):
    to = Target(url=endpoint.url, model="m", **target)
    async with asyncio.timeout(60):
        return await replay(requests, shape, to, tell, headers, stop or asyncio.Event())


async def test_an_answer_is_timed_and_its_tokens_counted(endpoint):
    (one,) = await run(endpoint, trace(1), api_key="secret")
    assert (one.error, one.status, one.output_tokens) == ("", 200, 4)
    assert (one.input_tokens, one.cached_tokens) == (38, 19)
    assert 0 < one.answered_s <= one.ttft_s <= one.end_s
    assert len(one.gaps_s) == 3
    assert endpoint.headers[0]["authorization"] == "Bearer secret"
    assert endpoint.bodies[0]["ignore_eos"] is True


async def test_a_chat_is_a_message_of_words_and_does_not_ask_for_what_others_do_not_know(endpoint):
    text = Shape(scale=1 / 16, text=True)
    (one,) = await run(endpoint, trace(1), shape=text, chat=True, ignore_eos=False)
    assert (one.error, len(one.gaps_s)) == ("", 3)
    assert len(endpoint.bodies[0]["messages"][0]["content"].split()) == 38
    assert "ignore_eos" not in endpoint.bodies[0]


@pytest.mark.parametrize(
    ("what", "status", "error"),
    [
        ("refuse", 429, "queue full"),
        ("fail", 500, "oh"),
        ("garbage", 200, "no JSON"),
        ("error", 200, "engine lost"),
        ("broken", 200, "broke off"),
        ("unfinished", 200, "without a finish reason"),
    ],
)
async def test_what_goes_wrong_is_told_apart(endpoint, what, status, error):
    endpoint.plan = {0: what}
    (one,) = await run(endpoint, trace(1))
    assert one.status == status
    assert error in one.error
    assert one.is_refused == (what == "refuse")
    assert one.retry_after_s == (7 if what == "refuse" else -1)


async def test_a_dead_endpoint_fails_every_request_and_nothing_hangs(endpoint):
    endpoint.close()
    outcomes = await run(endpoint, trace(3))
    assert [one.status for one in outcomes] == [0, 0, 0]
    assert all("ConnectError" in one.error for one in outcomes)


async def test_requests_are_sent_at_their_times_whatever_became_of_those_before(endpoint):
    endpoint.plan = {0: "hang"}
    ended = []

    def tell(outcome):
        if outcome is not None:
            ended.append(outcome.number)
            if len(ended) == 4:
                endpoint.hang.set()

    outcomes = await run(endpoint, trace(5, 0.01), tell)
    assert sorted(ended[:4]) == [1, 2, 3, 4]  # all others went on beside the one that hung
    assert "broke off" in outcomes[0].error


async def test_what_exceeds_the_bound_is_not_sent_and_counted(endpoint):
    endpoint.plan = dict.fromkeys(range(2), "hang")
    told = []

    def tell(outcome):
        told.append(outcome)
        if outcome is not None and outcome.error == NOT_SENT:
            endpoint.hang.set()

    outcomes = await run(endpoint, trace(3, 0.001), tell, in_flight_max=2)
    assert outcomes[2].error == NOT_SENT
    assert outcomes[2].late_s < 0
    assert told.count(None) == 2  # sent
    assert len(endpoint.bodies) == 2


async def test_no_request_lasts_longer_than_it_may(endpoint):
    endpoint.plan = {0: "hang"}
    (one,) = await run(endpoint, trace(1), timeout_s=0.2)
    assert one.error == LATE or "ReadTimeout" in one.error


async def test_a_stop_breaks_off_what_runs_and_returns_what_was_due(endpoint):
    endpoint.plan = {1: "hang"}
    stop = asyncio.Event()
    answered = []

    def tell(outcome):
        if outcome is not None:
            answered.append(outcome)
            stop.set()

    outcomes = await run(endpoint, [*trace(2), TraceRequest(3600.0, 10, 5, (9,))], tell, stop=stop)
    assert sorted(one.error for one in outcomes) == ["", BROKEN_OFF]  # which of them hangs is open
    assert len(answered) == 2


async def test_sessions_of_the_trace_are_named_in_a_header(endpoint):
    two = [
        TraceRequest(0.0, 512, 16, (1,)),
        TraceRequest(0.0, 512, 16, (2,)),
        TraceRequest(0.0, 600, 16, (1, 3)),
    ]
    names = headers_of(two)
    assert names[0] == names[2] != names[1]
    await run(endpoint, two, headers=names)
    sent = [headers["x-session-id"] for headers in endpoint.headers]
    assert sorted(sent) == sorted(one["x-session-id"] for one in names)


class TestBefore:
    """What is asked before anything is sent."""

    def test_the_first_model_is_taken_and_its_context_must_hold_the_longest_request(self, endpoint):
        assert ready(Target(url=endpoint.url), trace(1), SHAPE).model == "m"
        with pytest.raises(ConfigError, match=r"takes 4096: try --scale"):
            ready(Target(url=endpoint.url), [TraceRequest(0.0, 20 * 512, 9, tuple(range(20)))], Shape())

    def test_a_model_that_is_not_there_is_named_with_those_that_are(self, endpoint):
        with pytest.raises(ConfigError, match="no model 'other'; there are m"):
            served(Target(url=endpoint.url, model="other"))

    def test_nobody_there_is_said_with_the_address(self, endpoint):
        endpoint.close()
        with pytest.raises(PeerGone, match=endpoint.url):
            served(Target(url=endpoint.url))

    @pytest.mark.parametrize("status", [401, 403])
    def test_a_refused_key_is_said(self, endpoint, status):
        endpoint.models_status = status
        with pytest.raises(ConfigError, match="MOONCAKE_API_KEY"):
            served(Target(url=endpoint.url))

    @pytest.mark.parametrize("models", [[], {"data": None}, "nothing"])
    def test_something_else_than_openais_api_is_said(self, endpoint, models):
        endpoint.models = models
        with pytest.raises(ConfigError, match="OpenAI"):
            served(Target(url=endpoint.url))
