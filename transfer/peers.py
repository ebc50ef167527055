"""Peers by name: opened once, described again when what they said no longer fits."""

import bisect
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from mooncake.core.config import is_loopback
from mooncake.core.errors import CapacityError, PeerGone
from transfer.config import split_name
from transfer.control import Dialer, Remote
from transfer.messages import BufferInfo, SegmentInfo
from transfer.model import Buffer

PEERS_MAX = 4096
THREADS_PER_PEER = 8
"""4 TCP lanes and some of RDMA; started when they are needed."""


class Route(msgspec.Struct):
    """The way of one range; the next one between the same buffers takes it too."""

    mine: Buffer
    theirs: BufferInfo
    end: int  # of the peer's buffer
    hint: str
    name: str  # of the transport
    link: Any = None  # with a mapping: of shared memory
    mapping: Any = None

    def fits(self, local: int, remote: int, size_bytes: int, hint: str) -> bool:
        """Return whether that range takes this way."""
        mine = self.mine
        return (
            local >= mine.address
            and local + size_bytes <= mine.end
            and remote >= self.theirs.address
            and remote + size_bytes <= self.end
            and hint == self.hint
        )


class RemotePeer(Remote):
    """A peer with its buffers sorted by address, and threads for what is moved to and from it."""

    def __init__(self, name: str, address: tuple[str, int], dialer: Dialer) -> None:
        """Call `refresh` before anything else."""
        super().__init__(name, address, dialer)
        self.stale = False  # to be described anew before it is used
        self.doubted = False  # one of its paths may be worse than usual
        self.threads = ThreadPoolExecutor(THREADS_PER_PEER, thread_name_prefix=f"transfer-{name}")
        self.route: Route | None = None  # the last way of a single range, while all is well
        self._grants: dict[int, dict[str, Any]] = {}
        self._starts: list[int] = []
        self._buffers: list[BufferInfo] = []

    def refresh(self, deadline_s: float) -> SegmentInfo:
        """Ask the peer for its present description; raises as Remote.refresh."""
        info = super().refresh(deadline_s)
        self._index()
        self.stale = False
        return info

    def learn(self, buffer_id: int, key: bytes, rkeys: Mapping[str, int] | None = None) -> None:
        """Use this capability of a buffer whose owner hands them out by other means (Owner.grant)."""
        self._grants[buffer_id] = {"key": key, "rkeys": dict(rkeys or {})}
        self._index()

    def _index(self) -> None:
        buffers = [
            msgspec.structs.replace(buffer, **self._grants.get(buffer.buffer_id, {}))
            for buffer in self.info.buffers
        ]
        self.route = None
        buffers.sort(key=lambda buffer: buffer.address)
        self._starts, self._buffers = [buffer.address for buffer in buffers], buffers

    def find(self, address: int, size_bytes: int) -> BufferInfo | None:
        """Return the peer's buffer that holds all of the range, as far as is known."""
        starts, buffers = self._starts, self._buffers
        at = bisect.bisect_right(starts, address) - 1
        if at < 0 or at >= len(buffers):
            return None
        buffer = buffers[at]
        return buffer if address + size_bytes <= buffer.address + buffer.size_bytes else None

    def close(self) -> None:
        """Hang up; threads end with what they do now."""
        self.hang_up()
        self.threads.shutdown(wait=False, cancel_futures=False)


class PeerTable:
    """All peers of one engine."""

    def __init__(self, dialer: Dialer) -> None:
        """`dialer` makes their connections."""
        self._dialer = dialer
        self._lock = threading.Lock()
        self._peers: dict[str, RemotePeer] = {}
        self._opening: dict[str, threading.Lock] = {}

    def get(self, name: str) -> RemotePeer | None:
        """Return the peer if it is known and was not found stale."""
        peer = self._peers.get(name)
        return None if peer is None or peer.stale else peer

    def open(self, name: str, deadline_s: float) -> tuple[RemotePeer, RemotePeer | None]:
        """Return the peer, described, and the previous start of it, whose connections are worth nothing.

        Raises:
            PeerTimeout, PeerGone: nobody there; ConfigError: a bad name, or not let in;
            ProtocolError: no engine; CapacityError: too many peers.
        """
        end_s = time.monotonic() + deadline_s
        with self._lock:
            if name not in self._peers and len(self._peers) >= PEERS_MAX:
                raise CapacityError(f"{PEERS_MAX} peers are open")
            opening = self._opening.setdefault(name, threading.Lock())
        with opening:
            known = self.get(name)
            if known:
                return known, None
            old = self._peers.get(name)
            peer = self._dial(name, end_s)
            if old and old.info.epoch == peer.info.epoch:
                peer.close()
                old.refresh(end_s - time.monotonic())
                return old, None
            self._peers[name] = peer
            return peer, old

    def _dial(self, name: str, end_s: float) -> RemotePeer:
        host, port = split_name(name)
        peer = RemotePeer(name, (host, port), self._dialer)
        try:
            peer.refresh(end_s - time.monotonic())
            return peer
        except PeerGone:
            if is_loopback(host) or not is_own_address(host):
                peer.close()
                raise
        # an engine without a secret listens on loopback only, whatever it is called
        peer.address = ("127.0.0.1", port)
        try:
            peer.refresh(end_s - time.monotonic())
        except BaseException:
            peer.close()
            raise
        return peer

    def take_all(self) -> list[RemotePeer]:
        """Return every peer and forget them."""
        with self._lock:
            peers, self._peers = list(self._peers.values()), {}
        return peers


def is_own_address(host: str) -> bool:
    """Return whether `host` is an address of this machine."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True
