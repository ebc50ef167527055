"""Tokens go from the engine straight to each gateway: order, isolation, and nobody can block it."""

import zmq

from mooncake.worker import outputs as outputs_module
from mooncake.worker.outputs import Attach, OutputRouter

WAIT_MS = 3000


class Gateway:
    def __init__(self, context: zmq.Context) -> None:
        self.socket = context.socket(zmq.PULL)
        self.socket.linger = 0
        self.endpoint = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    def receive(self) -> list[bytes]:
        assert self.socket.poll(WAIT_MS), "nothing came"
        return self.socket.recv_multipart()

    def is_quiet(self) -> bool:
        return not self.socket.poll(50)


def pair():
    context = zmq.Context()
    return context, OutputRouter(), Gateway(context), Gateway(context)


def end(context, router, *gateways):
    for gateway in gateways:
        gateway.socket.close()
    router.close()
    context.term()


def test_every_slot_gets_its_own_outputs_in_order_and_byte_for_byte():
    context, router, a, b = pair()
    router.attach(Attach(0, a.endpoint))
    router.attach(Attach(7, b.endpoint))
    for n in range(1000):
        router.send(n % 2 * 7, [n.to_bytes(4, "big"), b"", b"aux"])
    assert [a.receive() for _ in range(500)] == [
        [n.to_bytes(4, "big"), b"", b"aux"] for n in range(0, 1000, 2)
    ]
    assert [b.receive()[0] for _ in range(500)] == [n.to_bytes(4, "big") for n in range(1, 1000, 2)]
    end(context, router, a, b)


def test_outputs_for_a_slot_without_a_gateway_are_dropped():
    context, router, a, b = pair()
    router.send(3, [b"nobody"])
    router.attach(Attach(3, a.endpoint))
    router.attach(Attach(3, None))
    router.send(3, [b"gone"])
    assert a.is_quiet()
    end(context, router, a, b)


def test_attaching_elsewhere_moves_the_outputs_and_attaching_again_changes_nothing():
    context, router, a, b = pair()
    router.attach(Attach(0, a.endpoint))
    router.attach(Attach(0, a.endpoint))
    router.send(0, [b"1"])
    assert a.receive() == [b"1"]
    router.attach(Attach(0, b.endpoint))
    router.send(0, [b"2"])
    assert b.receive() == [b"2"]
    assert a.is_quiet()
    end(context, router, a, b)


def test_a_gateway_that_does_not_read_is_cut_off_instead_of_blocking_the_engine(monkeypatch):
    monkeypatch.setattr(outputs_module, "QUEUE_MESSAGES_MAX", 4)
    context, router, a, b = pair()
    router.attach(Attach(0, "tcp://127.0.0.1:1"))  # nobody listens there
    router.attach(Attach(1, b.endpoint))
    for _ in range(100):
        router.send(0, [b"x" * 1000])
    router.send(1, [b"still served"])
    assert b.receive() == [b"still served"]
    assert 0 not in router._sockets
    end(context, router, a, b)


def test_an_address_beyond_this_host_is_not_connected():
    context, router, a, b = pair()
    router.attach(Attach(0, "tcp://198.51.100.1:9"))
    assert not router._sockets
    end(context, router, a, b)
