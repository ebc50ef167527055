"""One link: greeting, epochs, utility calls, loss."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest
import structlog
import zmq
from conftest import make_request
from fake_engine import FakeEngine
from vllm.v1.metrics.stats import SchedulerStats

from conductor import links
from conductor.links import Link, LinkState
from conductor.vllm_seam import EngineCoreOutputs, MsgpackEncoder
from mooncake.core.errors import PeerGone, ProtocolError
from mooncake.core.messages import Failure, RelayOp


class Owner:
    """Keeps what it is told, and what its log lines would say of themselves then."""

    def __init__(self) -> None:
        self.contexts: list[dict[str, object]] = []
        self.ups: list[int] = []
        self.pulses: list[float] = []
        self.lost: list[str] = []
        self.outputs: list[object] = []

    def link_up(self, link: Link) -> None:
        self.ups.append(link.slot)
        self.contexts.append(structlog.contextvars.get_contextvars())

    def link_pulse(self, link: Link, pulse: object, round_trip_s: float) -> None:
        self.pulses.append(round_trip_s)
        self.contexts.append(structlog.contextvars.get_contextvars())

    def link_outputs(self, link: Link, outputs: object) -> None:
        self.outputs.append(outputs)

    def link_lost(self, link: Link, reason: str) -> None:
        self.lost.append(reason)
        self.contexts.append(structlog.contextvars.get_contextvars())


async def until(condition, deadline_s: float = 5.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 -- other thread
            await asyncio.sleep(0.005)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    one = FakeEngine("d0", "decode")
    yield one
    one.frozen.clear()
    one.kill()


@pytest.fixture
def context():
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


def open_link(context, engine: FakeEngine, owner: Owner, **changes) -> Link:
    link = Link(context, msgspec.structs.replace(engine.record, **changes), "gw", owner)
    link.start()
    return link


async def test_hello_is_answered_with_the_slot_and_pings_with_pulses(context, engine) -> None:
    owner = Owner()
    link = open_link(context, engine, owner)
    await until(lambda: owner.ups == [3])
    link.tick(0.0)
    await until(lambda: len(owner.pulses) == 1)
    assert 0 <= owner.pulses[0] < 1
    link.close()
    assert owner.lost == []


@pytest.mark.parametrize("reads", [True, False])
async def test_what_an_engine_says_is_heard_before_anything_was_asked_of_it(context, engine, reads) -> None:
    owner = Owner()
    link = Link(context, engine.record, "gw", owner, reads=reads)
    link.start()
    await until(lambda: bool(owner.ups))
    idle = EngineCoreOutputs(outputs=[], scheduler_stats=SchedulerStats(num_running_reqs=0))
    link._take_outputs(MsgpackEncoder().encode(idle))  # the end of what another link had sent
    assert len(owner.outputs) == int(reads)  # a decision core has no use for it, and no vLLM
    link.close()


class _Stuffed:
    """A socket whose queue is full, or that swallowed the edge of what came in."""

    def __init__(self, socket, *, full: bool) -> None:
        self._socket, self._full = socket, full

    def __getattr__(self, name):
        return getattr(self._socket, name)

    def send_multipart(self, frames, flags) -> None:
        if self._full:
            raise zmq.Again
        self._socket.send_multipart(frames, flags)

    def getsockopt(self, option):
        return zmq.POLLIN if option == zmq.EVENTS else self._socket.getsockopt(option)


async def test_what_a_link_logs_has_not_the_id_of_the_request_whose_task_made_it_or_sends(
    context, engine
) -> None:
    """A link is made anew by whoever's sending lost the last one, and lives on without that request."""
    owner = Owner()
    with structlog.contextvars.bound_contextvars(request_id="run-7"):
        link = open_link(context, engine, owner)
    await until(lambda: bool(owner.ups))
    link.tick(0.0)
    await until(lambda: bool(owner.pulses))
    read: list[dict[str, object]] = []
    drain, link._drain = link._drain, lambda: read.append(structlog.contextvars.get_contextvars())
    whole = link._socket
    link._socket = _Stuffed(whole, full=False)
    with structlog.contextvars.bound_contextvars(request_id="run-8"):
        link.abort(["x#d1"])
    await until(lambda: bool(read))
    link._drain = drain
    link._socket = _Stuffed(whole, full=True)
    with structlog.contextvars.bound_contextvars(request_id="run-9"):
        link.abort(["x#d1"])
    await until(lambda: bool(owner.lost))
    assert "wait to be sent" in owner.lost[0]
    assert [*owner.contexts, *read] == [{}] * 4


async def test_another_epoch_behind_the_endpoint_is_refused(context, engine) -> None:
    owner = Owner()
    link = open_link(context, engine, owner, epoch="older")
    await until(lambda: bool(owner.lost))
    assert "epoch" in owner.lost[0]
    assert link.state is LinkState.LOST


async def test_a_broken_connection_is_noticed_at_once_and_told_once(context, engine) -> None:
    owner = Owner()
    link = open_link(context, engine, owner)
    await until(lambda: bool(owner.ups))
    call = asyncio.create_task(link.call("slow", deadline_s=5.0))
    await asyncio.sleep(0)
    engine.kill()
    await until(lambda: bool(owner.lost), 0.5)
    link.lose("again")
    assert len(owner.lost) == 1
    await asyncio.gather(call, return_exceptions=True)
    with pytest.raises(PeerGone):
        await link.call("any", deadline_s=1.0)


async def test_hello_is_repeated_until_somebody_listens(context, engine, monkeypatch) -> None:
    monkeypatch.setattr(links, "HELLO_RETRY_S", 0.0)
    owner = Owner()
    engine.freeze()
    link = open_link(context, engine, owner)
    for _ in range(3):
        link.tick(link._began_s + 1.0)
    engine.frozen.clear()
    await until(lambda: engine.hellos == 4 and bool(owner.ups))  # the answer comes after the count
    assert owner.ups == [3]
    link.close()


async def test_a_relay_that_never_answers_is_given_up(context, engine) -> None:
    owner = Owner()
    engine.freeze()
    link = open_link(context, engine, owner)
    link.tick(link._began_s + links.CONNECT_S_MAX + 1)
    assert "no welcome" in owner.lost[0]


async def test_a_refusal_after_the_welcome_means_that_the_relay_forgot_us(context, engine) -> None:
    owner = Owner()
    link = open_link(context, engine, owner)
    await until(lambda: bool(owner.ups))
    link._drain()
    refusal = msgspec.msgpack.encode(Failure("protocol", "say HELLO first"))
    with pytest.raises(PeerGone, match="say HELLO first"):
        link._receive([RelayOp.REFUSED, refusal])
    link.close()


async def test_utility_calls_return_results_and_failures(context, engine) -> None:
    owner = Owner()
    link = open_link(context, engine, owner)
    await until(lambda: bool(owner.ups))
    assert await link.call("reset_prefix_cache", True, deadline_s=5.0) == ["reset_prefix_cache", [True]]
    with pytest.raises(ProtocolError, match="no such method"):
        await link.call("broken", deadline_s=5.0)
    link.close()


async def test_a_new_link_to_the_same_engine_ends_what_the_old_one_sent(context, engine) -> None:
    engine.step_s = 0.05
    owner = Owner()
    link = open_link(context, engine, owner)
    await until(lambda: bool(owner.ups))
    request = make_request([1, 2, 3], max_tokens=1000)
    request.sampling_params.extra_args = {"kv_transfer_params": {"mooncake": {"leg": "whole"}}}
    request.client_index = link.slot
    link.add(request)
    await until(lambda: bool(engine.jobs))
    again = Link(context, engine.record, "gw", owner, relink=True)
    again.start()
    await until(lambda: not engine.jobs and len(owner.ups) == 2)
    link.close()
    again.close()


async def test_garbage_from_a_relay_loses_the_link_and_nothing_else(context, engine) -> None:
    owner = Owner()
    link = open_link(context, engine, owner)
    await until(lambda: bool(owner.ups))
    for frames in ([b"?"], [RelayOp.PONG, b"1"], [RelayOp.WELCOME, b"\xff"]):
        with pytest.raises(ProtocolError):
            link._receive(frames)
    with pytest.raises(ProtocolError):
        link._take_outputs([b"\xff\xff"])
    link.close()
