"""Engines as the RDMA transport sees them, in one process: fake verbs, real handlers, no sockets."""

import itertools
from collections import Counter

import numpy as np

from mooncake.core.errors import MooncakeError
from transfer.messages import BufferInfo, RdmaDisconnect, SegmentInfo
from transfer.model import Buffer, Call, Opcode, Slice
from transfer.rdma import RdmaConfig, open_rdma
from transfer.rdma.mover import Clock
from transfer.topology import Topology
from transfer.verbs import Loaded
from transfer.verbs.fake import Fabric, FakeVerbs

PIECE = 4096


class FakeClock:
    """Time passes only by napping."""

    def __init__(self):
        self.time_s = 100.0
        self.on_nap = None

    def now_s(self):
        return self.time_s

    def nap(self, nap_s):
        self.time_s += nap_s
        if self.on_nap:
            self.on_nap()


class FakeSession:
    """A control connection at its owner."""

    def __init__(self, epoch):
        self.epoch = epoch
        self.callbacks = []

    def on_close(self, callback):
        self.callbacks.append(callback)

    def end(self):
        for callback in self.callbacks:
            callback()


class FakePeer:
    """How one engine knows another."""

    def __init__(self, me, owner):
        self.owner = owner
        self.session = FakeSession(me.epoch)
        self.info = owner.info()
        self.unanswered = {}  # class of message -> error to raise instead of asking
        self.asked = []

    def ask(self, message, kind, deadline_s):
        assert deadline_s > 0
        self.asked.append(message)
        if error := self.unanswered.get(type(message)) or self.unanswered.get(object):
            raise error
        answer = self.owner.transport.handle(self.session, message)
        assert isinstance(answer, kind)
        return answer

    def disconnected(self):
        return [
            link for message in self.asked if isinstance(message, RdmaDisconnect) for link in message.links
        ]


class Engine:
    """One start of one engine."""

    numbers = itertools.count(1)

    def __init__(
        self,
        fabric,
        name,
        devices=("mlx0", "mlx1"),
        places=None,
        ports=(),
        export_dmabuf=None,
        verbs=None,
        **settings,
    ):
        self.name = name
        self.epoch = f"{next(self.numbers):032x}"
        self.verbs = verbs or FakeVerbs(fabric, devices)
        self.clock = Clock() if verbs else FakeClock()
        self.events = Counter()
        self.bytes = Counter()
        self.moved_over = Counter()  # bytes by link
        self.places = Topology(places or {})
        settings.setdefault("slice_bytes", PIECE)
        config = RdmaConfig(devices=ports, **settings)
        self.transport = open_rdma(
            Loaded(self.verbs, ""), config, self.places, export_dmabuf, meter=self.meter, clock=self.clock
        )
        self.ids = itertools.count(1)
        self.buffers = []

    def meter(self, link, event, size_bytes, elapsed_s):
        assert elapsed_s >= 0
        self.events[event] += 1
        self.bytes[event] += size_bytes
        if event == "moved":
            self.moved_over[link] += size_bytes

    @property
    def nics(self):
        return self.verbs.nics

    def buffer(self, size_bytes, location="cpu:0"):
        """Register a numpy array; `.array` is it."""
        array = np.random.default_rng(size_bytes).integers(0, 256, size_bytes, dtype=np.uint8)
        buffer = Buffer(next(self.ids), array.ctypes.data, size_bytes, location, bytes(16), None, array)
        self.transport.register(buffer)
        self.buffers.append(buffer)
        return buffer

    def info(self):
        fields = {}
        self.transport.describe(fields)
        buffers = [self.describe(buffer) for buffer in self.buffers]
        return SegmentInfo(
            self.name, self.epoch, 1, "host", 1, buffers, topology=self.places.to_json(), **fields
        )

    def describe(self, buffer):
        return BufferInfo(
            buffer.buffer_id,
            buffer.address,
            buffer.size_bytes,
            buffer.location,
            rkeys=self.transport.rkeys(buffer),
        )

    def run(self, peer, op, slices, call=None):
        return self.transport.run(peer, op, slices, call or Call(60.0))

    def move(self, peer, op, mine, theirs):
        """Move all of one buffer; raise what failed."""
        failures = self.run(peer, op, [whole(mine, peer.owner.describe(theirs))])
        if failures:
            raise failures[0].error
        assert (mine.owner == theirs.owner).all()

    def close(self):
        for buffer in self.buffers:
            self.transport.unregister(buffer, 1.0)
        self.transport.close()


def whole(mine, theirs, index=0):
    return Slice(index, mine.address, theirs.address, min(mine.size_bytes, theirs.size_bytes), mine, theirs)


def part(mine, theirs, offset, size_bytes, index=0):
    return Slice(index, mine.address + offset, theirs.address + offset, size_bytes, mine, theirs)


def pair(size_bytes=16 * PIECE, location="cpu:0", **settings):
    """Two engines that have one buffer each; returns (a, b, a's view of b, a's buffer, b's buffer)."""
    fabric = Fabric()
    a, b = Engine(fabric, "a:1", **settings), Engine(fabric, "b:1", **settings)
    theirs = b.buffer(size_bytes, location)
    mine = a.buffer(size_bytes, location)
    mine.owner[:] = 0
    return a, b, FakePeer(a, b), mine, theirs


def errors(failures):
    return {failure.slice.index: type(failure.error) for failure in failures}


__all__ = [
    "PIECE",
    "Call",
    "Engine",
    "Fabric",
    "FakePeer",
    "MooncakeError",
    "Opcode",
    "errors",
    "pair",
    "part",
    "whole",
]
