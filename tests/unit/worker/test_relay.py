"""The relay between fake gateways and a fake engine: real sockets, real processes, bounded waits."""

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time

import msgspec
import pytest
import zmq
from structlog.testing import capture_logs

from mooncake.core import wire
from mooncake.core.errors import ConfigError
from mooncake.core.messages import (
    RELAY_PROTOCOL,
    RELAY_SLOTS,
    EngineQueues,
    Failure,
    Hello,
    Pulse,
    RelayOp,
    RoleOrder,
    Term,
    Welcome,
)
from mooncake.worker import relay as relay_module
from mooncake.worker.pulse import Pulse as PulseFile
from mooncake.worker.relay import VLLM_ABORT, VLLM_ADD, VLLM_UTILITY, Relay, make_stop_pipe, request_stop
from mooncake.worker.spec import EngineSpec

WAIT_S = 20.0
QUIET_S = 0.05
READY = {"num_gpu_blocks": 7}


class Peer:
    """A socket whose every wait is bounded."""

    def __init__(self, context: zmq.Context, kind: int, address: str, identity: bytes | None = None) -> None:
        self.socket = context.socket(kind)
        self.socket.linger = 0
        if identity is not None:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(address)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self) -> list[bytes]:
        assert self.socket.poll(WAIT_S * 1000), "nothing came"
        return self.socket.recv_multipart()

    def is_quiet(self) -> bool:
        return not self.socket.poll(QUIET_S * 1000)


class Gateway(Peer):
    outputs = "ipc:///nowhere"

    def hello(self, name: str, protocol: int = RELAY_PROTOCOL) -> list[bytes]:
        self.send(RelayOp.HELLO, wire.encode(Hello(name, self.outputs, protocol)))
        return self.receive()

    def join(self, name: str) -> Welcome:
        operation, payload = self.hello(name)
        assert operation == RelayOp.WELCOME
        return wire.decode(payload, Welcome)

    def is_refused(self, code: str = "protocol") -> bool:
        operation, payload = self.receive()
        return operation == RelayOp.REFUSED and wire.decode(payload, Failure).code == code

    def pong(self) -> Pulse:
        self.send(RelayOp.PING, b"8 bytes!")
        operation, echo, payload = self.receive()
        assert (operation, echo) == (RelayOp.PONG, b"8 bytes!")
        return wire.decode(payload, Pulse)


class House:
    """A relay that runs in a thread, with a sleeping child in the place of the engine."""

    def __init__(self, tmp_path) -> None:
        self.spec = EngineSpec(instance_id="i", role="prefill", epoch="e", run_dir=str(tmp_path), model="m")
        self.pulse = PulseFile(self.spec.pulse_path, create=True)
        self.relay = Relay(self.spec, self.pulse)
        self.context = zmq.Context()
        self.child = subprocess.Popen(["sleep", "60"])
        self.pidfd = os.pidfd_open(self.child.pid)
        self.stop = make_stop_pipe()
        self.peers: list[Peer] = []  # a socket that the garbage collector finds would block the context
        self.is_ready = threading.Event()
        self.facts: list[dict] = []
        self.why: list[object] = []
        self.ended_s = 0.0
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.why.append(self.relay.run(self.pidfd, self.stop[0], self._ready))
        except BaseException as error:  # noqa: BLE001 - told to the test
            self.why.append(error)
        self.ended_s = time.monotonic()

    def _ready(self, answer: dict) -> None:
        self.facts.append(answer)
        self.is_ready.set()

    def gateway(self) -> Gateway:
        return self._peer(Gateway(self.context, zmq.DEALER, self.relay.endpoint))

    def _peer(self, peer):
        self.peers.append(peer)
        return peer

    def engine(self) -> Peer:
        """Connect the engine's input as vLLM does and report ready."""
        peer = self._peer(Peer(self.context, zmq.DEALER, self.spec.engine_in, b"\x00\x00"))
        peer.send(msgspec.msgpack.encode(READY))
        assert self.is_ready.wait(WAIT_S)
        return peer

    def end(self) -> object:
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        return self.why[0]

    def close(self) -> None:
        request_stop(self.stop[1])
        self.thread.join(WAIT_S)
        self.relay.close()
        for peer in self.peers:
            peer.socket.close()
        self.context.destroy(linger=0)
        self.child.kill()
        self.child.wait(WAIT_S)
        for fd in (self.pidfd, *self.stop):
            os.close(fd)
        assert not self.thread.is_alive()
        assert isinstance(self.why[0], str), self.why


@pytest.fixture
def house(tmp_path):
    house = House(tmp_path)
    yield house
    house.close()


@pytest.fixture
def engine(house):
    return house.engine()


@pytest.fixture
def gateway(house, engine):
    gateway = house.gateway()
    assert gateway.join("g").slot == 0
    assert attached(engine) == (0, gateway.outputs)
    return gateway


def attached(engine) -> tuple[int, str]:
    """What the relay tells the engine when a gateway joins: (slot, where its outputs go)."""
    kind, body = engine.receive()
    slot, call_id, method, arguments = msgspec.msgpack.decode(body)
    assert (kind, call_id, method) == (VLLM_UTILITY, 0, "mooncake_attach_client")
    assert arguments[0] == slot
    return slot, arguments[1]


# ---------------------------------------------------------------- joining


def test_a_relay_listens_on_loopback_only(tmp_path):
    spec = EngineSpec(instance_id="i", role="both", epoch="e", run_dir=str(tmp_path), model="m")
    pulse = PulseFile(spec.pulse_path, create=True)
    with pytest.raises(ConfigError):
        Relay(spec, pulse, "tcp://0.0.0.0:0")


def test_a_gateway_is_welcomed_with_its_slot_and_the_engines_epoch(house):
    assert house.gateway().join("a") == Welcome(0, "i", "e")
    assert house.gateway().join("b") == Welcome(1, "i", "e")


def test_hello_again_is_harmless_and_gives_the_same_slot(house):
    first = house.gateway()
    assert first.join("a").slot == 0
    assert house.gateway().join("b").slot == 1
    assert first.join("a").slot == 0
    assert house.gateway().join("a").slot == 0  # a new connection after a loss


def test_after_a_reconnection_the_engine_sends_to_the_new_address_and_the_old_one_is_a_stranger(
    house, engine
):
    old, new = house.gateway(), house.gateway()
    new.outputs = "ipc:///elsewhere"
    old.join("a")
    assert attached(engine) == (0, old.outputs)
    new.join("a")
    assert attached(engine) == (0, new.outputs)
    old.send(RelayOp.ENGINE, VLLM_ADD, b"request")
    assert old.is_refused()
    assert engine.is_quiet()


def test_a_gateway_that_came_before_the_engine_is_attached_when_the_engine_is_ready(house):
    house.gateway().join("early")
    assert attached(house.engine()) == (0, Gateway.outputs)


def test_outputs_may_not_be_sent_beyond_this_host(house):
    gateway = house.gateway()
    gateway.outputs = "tcp://198.51.100.1:9"
    operation, payload = gateway.hello("far")
    assert (operation, wire.decode(payload, Failure).code) == (RelayOp.REFUSED, "config")


def test_the_ninth_gateway_is_refused_until_one_leaves(house):
    gateways = [house.gateway() for _ in range(RELAY_SLOTS)]
    assert [g.join(f"g{n}").slot for n, g in enumerate(gateways)] == list(range(RELAY_SLOTS))
    ninth = house.gateway()
    operation, payload = ninth.hello("ninth")
    assert (operation, wire.decode(payload, Failure).code) == (RelayOp.REFUSED, "capacity")
    gateways[3].send(RelayOp.BYE)
    gateways[3].send(RelayOp.PING, b"8 bytes!")
    assert gateways[3].is_refused()
    assert ninth.join("ninth").slot == 3


def test_one_connection_is_one_gateway(house):
    """Else its silence under the first name would end it under the second."""
    gateway = house.gateway()
    gateway.join("a")
    gateway.send(RelayOp.HELLO, wire.encode(Hello("b", gateway.outputs)))
    assert gateway.is_refused()
    assert gateway.pong().epoch == "e"


def test_another_protocol_is_refused_by_number(house):
    operation, payload = house.gateway().hello("a", RELAY_PROTOCOL + 1)
    assert operation == RelayOp.REFUSED
    assert (
        f"relay protocol {RELAY_PROTOCOL}, gateway speaks {RELAY_PROTOCOL + 1}"
        in wire.decode(payload, Failure).message
    )


# ---------------------------------------------------------------- forwarding


@pytest.mark.parametrize(
    "frames", [[b"request"], [b"request", b"", os.urandom(100_000), b"\0"]], ids=["one", "many"]
)
def test_requests_reach_the_engine_byte_for_byte(frames, gateway, engine):
    gateway.send(RelayOp.ENGINE, VLLM_ADD, *frames)
    assert engine.receive() == [VLLM_ADD, *frames]


def test_aborts_and_utility_calls_reach_the_engine_as_they_are(gateway, engine):
    for kind, body in [(VLLM_ABORT, ["r1", "r2"]), (VLLM_UTILITY, [0, 2**63, "reset_prefix_cache", []])]:
        raw = msgspec.msgpack.encode(body)
        gateway.send(RelayOp.ENGINE, kind, raw)
        assert engine.receive() == [kind, raw]


def test_the_engines_ready_message_is_handed_on(house, engine):
    assert house.facts == [READY]


# ---------------------------------------------------------------- refusing


def test_an_engine_request_before_hello_is_refused(house, engine):
    stranger = house.gateway()
    stranger.send(RelayOp.ENGINE, VLLM_ADD, b"request")
    assert stranger.is_refused()
    assert engine.is_quiet()


def test_a_refused_request_is_named_in_the_log(house):
    gateway = house.gateway()
    gateway.join("g")
    with capture_logs() as lines:
        gateway.send(RelayOp.ENGINE, VLLM_ADD, msgspec.msgpack.encode(["cmpl-run-7-0-ab12#p1", [1, 2], None]))
        assert gateway.is_refused("capacity")
        gateway.send(RelayOp.ENGINE, VLLM_ADD, b"no struct at all")
        assert gateway.is_refused("capacity")
    named, unnamed = (line for line in lines if line["event"] == "relay.refused")
    assert named["request_id"] == "cmpl-run-7-0-ab12"
    assert "request_id" not in unnamed


def test_a_request_while_the_engine_loads_is_refused_for_lack_of_capacity(house):
    gateway = house.gateway()
    gateway.join("g")
    gateway.send(RelayOp.ENGINE, VLLM_ADD, b"request")
    assert gateway.is_refused("capacity")


def pack(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


@pytest.mark.parametrize(
    "frames",
    [
        [b"?"],
        [b""],
        [RelayOp.WELCOME, b""],
        [b"E" * 1000],
        [RelayOp.HELLO],
        [RelayOp.HELLO, b"\xc1"],
        [RelayOp.HELLO, b"\x91" * 50_000],
        [RelayOp.HELLO, pack(["g", 1]), b"more"],
        [RelayOp.PING],
        [RelayOp.PING, b"7 bytes"],
        [RelayOp.ENGINE],
        [RelayOp.ENGINE, VLLM_ADD],
        [RelayOp.ENGINE, b"\x02", b"start wave"],
        [RelayOp.ENGINE, b"\x04", b"executor failed"],
        [RelayOp.ENGINE, b"", b""],
        [RelayOp.ENGINE, VLLM_ABORT, b""],
        [RelayOp.ENGINE, VLLM_ABORT, b"\xc1"],
        [RelayOp.ENGINE, VLLM_ABORT, b"\x91" * 50_000],
        [RelayOp.ENGINE, VLLM_ABORT, pack("r1")],
        [RelayOp.ENGINE, VLLM_ABORT, pack([["unhashable"]])],
        [RelayOp.ENGINE, VLLM_UTILITY, b"\xc1"],
        [RelayOp.ENGINE, VLLM_UTILITY, b"\x94" * 50_000],
        [RelayOp.ENGINE, VLLM_UTILITY, pack([0, 1, "method"])],
        [RelayOp.ENGINE, VLLM_UTILITY, pack([0, 1, 2, []])],
        [RelayOp.ENGINE, VLLM_UTILITY, pack([0, "call", "method", []])],
        [RelayOp.ENGINE, VLLM_UTILITY, pack([99, 1, "method", []])],  # the engine has no such output
        [RelayOp.ENGINE, VLLM_UTILITY, pack([1, 1, "method", []])],  # another gateway's output
    ],
    ids=lambda frames: repr(frames)[:60],
)
def test_what_could_harm_the_engine_is_refused_and_the_relay_lives(frames, gateway, engine):
    gateway.send(*frames)
    assert gateway.is_refused()
    assert engine.is_quiet()
    assert gateway.pong().epoch == "e"


def test_a_message_without_an_operation_is_ignored(house, gateway):
    stranger = house.gateway()
    stranger.send(b"")
    assert gateway.pong().epoch == "e"


# ---------------------------------------------------------------- health and leaving


def test_a_pong_tells_how_old_the_engines_pulse_is(house, gateway):
    house.pulse.beat()
    assert gateway.pong().engine_age_s < 1.0
    house.pulse._slots[0] -= 100
    assert 100 <= gateway.pong().engine_age_s < 101


def test_a_pong_tells_what_the_engine_has_now(house, gateway):
    named = {"requests_running": 3, "requests_waiting": 2, "requests_deferred": 1, "kv_use_ratio": 0.25}
    for name, value in named.items():
        house.pulse.set(name, value)
    assert gateway.pong().queues == EngineQueues(3, 2, 1, 0.25)


def abort_call(slot: int) -> list[bytes]:
    return [VLLM_UTILITY, pack([slot, 0, "mooncake_abort_client", [slot]])]


def test_a_gateway_that_says_bye_has_its_requests_aborted(house, gateway, engine):
    gateway.send(RelayOp.BYE)
    assert engine.receive() == abort_call(0)
    assert house.gateway().join("next").slot == 0


def test_a_silent_gateway_is_released_and_aborted_and_a_pinging_one_is_not(
    house, gateway, engine, monkeypatch
):
    alive = house.gateway()
    alive.join("alive")
    assert attached(engine)[0] == 1
    monkeypatch.setattr(relay_module, "GATEWAY_SILENT_S", 0.3)
    end_s = time.monotonic() + WAIT_S
    while not engine.socket.poll(50):
        assert time.monotonic() < end_s
        alive.pong()
    assert engine.receive() == abort_call(0)
    alive.pong()
    gateway.send(RelayOp.PING, b"8 bytes!")
    assert gateway.is_refused()  # so it knows that it has to say HELLO
    assert gateway.join("g").slot == 0


def test_a_gateway_that_leaves_while_the_engine_loads_needs_no_abort(house):
    gateway = house.gateway()
    gateway.join("g")
    gateway.send(RelayOp.BYE)
    assert house.gateway().join("next").slot == 0
    engine = house.engine()
    assert attached(engine)[0] == 0  # the next one
    assert engine.is_quiet()


# ---------------------------------------------------------------- the end


def test_the_engines_death_ends_the_relay_at_once_and_every_gateway_hears_of_it(house, gateway, engine):
    other = house.gateway()
    other.join("other")
    started_s = time.monotonic()
    os.kill(house.child.pid, signal.SIGKILL)
    assert house.end() == "died"
    assert house.ended_s - started_s < 5.0
    house.relay.announce_death("engine of i ended with code -9")
    for peer in (gateway, other):
        operation, payload = peer.receive()
        assert operation == RelayOp.DIED
        assert wire.decode(payload, Failure) == Failure("gone", "engine of i ended with code -9")


def test_a_stop_ends_the_relay_at_once(house, gateway):
    started_s = time.monotonic()
    request_stop(house.stop[1])
    assert house.end() == "stop"
    assert house.ended_s - started_s < 5.0


def test_many_stop_requests_never_block_a_signal_handler():
    readable, writable = make_stop_pipe()
    with contextlib.closing(os.fdopen(readable, "rb")), contextlib.closing(os.fdopen(writable, "wb")):
        for _ in range(70_000):
            request_stop(writable)


class TestRole:
    """Orders of roles are handed to whoever keeps the record."""

    def test_an_order_is_handed_on(self, house):
        orders: queue.SimpleQueue[RoleOrder] = queue.SimpleQueue()
        house.relay.on_role = orders.put
        gateway = house.gateway()
        gateway.join("a")
        gateway.send(RelayOp.ROLE, wire.encode(RoleOrder("draining", 45.0)))
        assert orders.get(timeout=WAIT_S) == RoleOrder("draining", 45.0)

    @pytest.mark.parametrize(
        "order", [RoleOrder("king"), RoleOrder("decode", -1.0), RoleOrder("decode", 1e9)]
    )
    def test_an_order_that_makes_no_sense_is_refused(self, house, order):
        house.relay.on_role = lambda _: pytest.fail("handed on")
        gateway = house.gateway()
        gateway.join("a")
        gateway.send(RelayOp.ROLE, wire.encode(order))
        assert gateway.is_refused()

    def test_a_core_whose_term_is_over_orders_nothing(self, house):
        orders: queue.SimpleQueue[RoleOrder] = queue.SimpleQueue()
        house.relay.on_role = orders.put
        gateway = house.gateway()
        gateway.join("a")
        said = [("decode", 1), ("prefill", 2), ("decode", 1), ("both", 2), ("prefill", None)]
        for role, number in said:
            term = None if number is None else Term("life", number, f"core-{number}")
            gateway.send(RelayOp.ROLE, wire.encode(RoleOrder(role, 0.0, term)))
        heard = [orders.get(timeout=WAIT_S).role for _ in range(4)]
        assert heard == ["decode", "prefill", "both", "prefill"]

    def test_nobody_orders_before_hello(self, house):
        gateway = house.gateway()
        gateway.send(RelayOp.ROLE, wire.encode(RoleOrder("decode")))
        assert gateway.is_refused()
