"""The gateway's link against the production relay, with a stub where the engine would be."""

import os
import threading
from collections.abc import Iterator

import pytest
import zmq
from conftest import make_request
from test_links import Owner, until

from conductor.links import Link, LinkState
from conductor.vllm_seam import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    MsgpackDecoder,
    MsgpackEncoder,
)
from mooncake.core.messages import InstanceRecord
from mooncake.worker.outputs import Attach, OutputRouter
from mooncake.worker.pulse import Pulse
from mooncake.worker.relay import Relay, make_stop_pipe, request_stop
from mooncake.worker.spec import EngineSpec
from tests.unit.conductor.make import record


class Rig:
    """A relay in a thread and the engine's side of its sockets."""

    def __init__(self, run_dir) -> None:
        self.spec = EngineSpec(instance_id="d0", role="decode", epoch="e1", run_dir=str(run_dir), model="m")
        self.pulse = Pulse(self.spec.pulse_path, create=True)
        self.pulse.beat()
        self.relay = Relay(self.spec, self.pulse)
        self._stop_read, self._stop_write = make_stop_pipe()
        self._pidfd = os.pidfd_open(os.getpid())
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self.relay.run, args=(self._pidfd, self._stop_read, lambda _: ready.set()), daemon=True
        )
        self.context = zmq.Context()
        self.engine = self.context.socket(zmq.DEALER)
        self.engine.setsockopt(zmq.IDENTITY, (0).to_bytes(2, "little"))
        self.engine.connect(self.spec.engine_in)
        self.router = OutputRouter()
        self._thread.start()
        self.engine.send_multipart([b"\x80"])  # the ready message: an empty map
        assert ready.wait(5)

    def push(self, slot: int, outputs: EngineCoreOutputs) -> None:
        self.router.send(slot, MsgpackEncoder().encode(outputs))

    def attached(self) -> int:
        """The engine is told where a slot's outputs go; do it, and return the slot."""
        kind, body = self.got()
        _, _, method, (slot, endpoint) = MsgpackDecoder().decode([body])
        assert (kind, method) == (b"\x03", "mooncake_attach_client")
        self.router.attach(Attach(slot, endpoint))
        return int(slot)

    def got(self) -> list[bytes]:
        assert self.engine.poll(5000)
        return self.engine.recv_multipart()

    @property
    def record(self) -> InstanceRecord:
        return record("d0", "decode", endpoint=self.relay.endpoint)

    def stop(self) -> None:
        request_stop(self._stop_write)
        self._thread.join(5)

    def close(self) -> None:
        self.stop()
        self.relay.close()
        self.router.close()
        self.context.destroy(linger=0)
        for descriptor in (self._pidfd, self._stop_read, self._stop_write):
            os.close(descriptor)


@pytest.fixture
def rig(tmp_path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


async def test_requests_pass_to_the_engine_and_outputs_come_back(rig, context) -> None:
    owner = Owner()
    link = Link(context, rig.record, "gw", owner)
    link.start()
    await until(lambda: link.state is LinkState.UP)
    assert rig.attached() == link.slot
    rig.pulse.beat()
    link.tick(0.0)
    await until(lambda: bool(owner.pulses))
    link.add(make_request([1, 2, 3], rid="r#d1"))
    kind, *body = rig.got()
    assert kind == b"\x00"
    assert MsgpackDecoder(EngineCoreRequest).decode(body).request_id == "r#d1"
    link.abort(["r#d1"])
    assert rig.got()[0] == b"\x01"
    rig.push(link.slot, EngineCoreOutputs(outputs=[EngineCoreOutput("r#d1", [9])]))
    await until(lambda: bool(owner.outputs))
    assert owner.outputs[0].outputs[0].new_token_ids == [9]
    link.close()


async def test_a_pulse_carries_what_the_engine_loaded_and_its_store_fetched(rig, context) -> None:
    pulses = []

    class Listening(Owner):
        def link_pulse(self, link, pulse, round_trip_s) -> None:
            pulses.append(pulse)

    link = Link(context, rig.record, "gw", Listening())
    link.start()
    await until(lambda: link.state is LinkState.UP)
    moved = {"load_bytes": 7, "load_seconds": 0.5, "fetch_bytes": 9, "fetch_seconds": 1.5}
    for name, amount in moved.items():
        rig.pulse.add(name, amount)
    link.tick(0.0)
    await until(lambda: bool(pulses))
    pulse = pulses[-1]
    assert (pulse.load_bytes, pulse.load_s, pulse.fetch_bytes, pulse.fetch_s) == (7, 0.5, 9, 1.5)
    link.close()


async def test_linking_again_aborts_what_the_lost_link_sent(rig, context) -> None:
    owner = Owner()
    for gateway_id in ("other", "gw"):  # so that the lowest slot is free later
        link = Link(context, rig.record, gateway_id, owner)
        link.start()
        await until(lambda link=link: link.state is LinkState.UP)
        assert rig.attached() == link.slot
    again = Link(context, rig.record, "gw", owner, relink=True)
    again.start()
    await until(lambda: again.state is LinkState.UP)
    said = []
    while "mooncake_abort_client" not in said:  # its first HELLO attaches the old slot once more
        kind, body = rig.got()
        assert kind == b"\x03"
        said.append(MsgpackDecoder().decode([body])[2])
    assert rig.attached() == again.slot
    again.add(make_request([1], rid="r#d2"))
    assert rig.got()[0] == b"\x00"
    rig.push(again.slot, EngineCoreOutputs(outputs=[EngineCoreOutput("r#d2", [9])]))
    await until(lambda: bool(owner.outputs))
    again.close()


async def test_a_dead_engine_is_announced_by_its_relay(rig, context) -> None:
    owner = Owner()
    link = Link(context, rig.record, "gw", owner)
    link.start()
    await until(lambda: link.state is LinkState.UP)
    rig.stop()
    rig.relay.announce_death("exit code -9")
    await until(lambda: bool(owner.lost))
    assert "exit code -9" in owner.lost[0]
