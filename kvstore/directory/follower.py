"""Keeps an index in step with one store node: snapshot, then its events; again after any gap.

Subscribe first, wait for the first message (so the subscription is known to work), take a snapshot,
then apply only events after the snapshot's seq. A gap, another epoch, silence or a malformed message
all lead to the same place: a new snapshot. What arrives meanwhile waits in ZMQ's queue, whose bound
turns an overflow into a gap. The index is soft state: nothing here can cost data.
"""

import asyncio
import contextlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import structlog
import zmq
import zmq.asyncio

from kvstore.directory.event_stream import Action, Apply, Distrust, EventStream, Reset, SnapshotPages
from kvstore.limits import HEARTBEAT_S, SNAPSHOT_KEYS_MAX
from mooncake.core import rpc, wire
from mooncake.core.errors import MooncakeError, PeerTimeout, ProtocolError
from mooncake.core.keys import KEY_BYTES
from mooncake.core.messages import Snapshot, SnapshotPage, StoreEvents, StoreRecord, StoreReply

log = structlog.get_logger(__name__)

STALE_S = 4 * HEARTBEAT_S
"""Silence after which a node's blocks are no longer trusted: three lost heartbeats and a half."""
PAGE_DEADLINE_S = 5.0
"""One snapshot page is 2 MB on loopback; beyond this the node is in trouble."""
RETRY_S = 0.5
"""Pause before another snapshot after a failed one."""


class StoreListener(Protocol):
    """Called on the follower's loop; must be quick. Keys come as blobs of 32-byte keys."""

    def on_snapshot(self, node: str, epoch: str, pages: Sequence[bytes]) -> None:
        """Replace everything known of `node` by these keys: it is live and in step from here on."""

    def on_events(self, node: str, stored: bytes, removed: bytes) -> None:
        """Apply a change; no key is in both blobs."""

    def on_stale(self, node: str, reason: str) -> None:
        """Stop trusting what is known of `node`; on_snapshot follows when it is back in step."""


class KeyIndex(Protocol):
    """The part of an index that a follower feeds; conductor.index.PrefixIndex is one."""

    def apply(self, node: str, stored: bytes, removed: bytes) -> None:
        """Add, then remove keys of a node."""

    def reset(self, node: str) -> None:
        """Forget what a node held."""


class IndexListener:
    """Feeds a KeyIndex; a node out of step counts as holding nothing."""

    def __init__(self, index: KeyIndex) -> None:
        """`index` is shared by the followers of all nodes."""
        self._index = index

    def on_snapshot(self, node: str, epoch: str, pages: Sequence[bytes]) -> None:  # noqa: ARG002
        """See StoreListener."""
        self._index.reset(node)
        for page in pages:
            self._index.apply(node, page, b"")

    def on_events(self, node: str, stored: bytes, removed: bytes) -> None:
        """See StoreListener."""
        self._index.apply(node, stored, removed)

    def on_stale(self, node: str, reason: str) -> None:  # noqa: ARG002
        """See StoreListener."""
        self._index.reset(node)


class _OutOfStep(Exception):
    """The stream cannot be continued; the message says why."""


class StoreFollower:
    """Follows one StoreRecord until closed; a restarted store at another address is a new follower."""

    def __init__(self, record: StoreRecord, listener: StoreListener, stale_s: float = STALE_S) -> None:
        """Nothing is opened before `start`."""
        self._record = record
        self._listener = listener
        self._stale_s = stale_s
        self._task: asyncio.Task[None] | None = None
        self._live = asyncio.Event()
        self.snapshots = 0
        self.gaps = 0

    def start(self) -> "StoreFollower":
        """Begin on the running loop."""
        self._task = asyncio.create_task(self._run(), name=f"follow {self._record.node}")
        self._task.add_done_callback(self._ended)
        return self

    @property
    def live(self) -> bool:
        """Whether the listener is in step with the node."""
        return self._live.is_set()

    async def wait_live(self, deadline_s: float) -> None:
        """Return once the listener is in step.

        Raises:
            PeerTimeout: not within `deadline_s`.
        """
        try:
            async with asyncio.timeout(deadline_s):
                await self._live.wait()
        except TimeoutError:
            raise PeerTimeout(f"no snapshot of store {self._record.node} within {deadline_s:g} s") from None

    async def close(self) -> None:
        """Stop (idempotent); the listener is not called any more."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        context = zmq.asyncio.Context()
        socket = context.socket(zmq.SUB)
        socket.set_hwm(rpc.HWM_MESSAGES)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MESSAGE_BYTES_MAX)
        socket.setsockopt(zmq.LINGER, 0)
        rpc.connect(socket, self._record.events)
        socket.subscribe(b"")
        client = rpc.RpcClient(self._record.endpoint, StoreReply)
        try:
            while True:
                with contextlib.suppress(_OutOfStep):
                    await self._follow(socket, client)
        finally:
            self._live.clear()
            await client.close()
            context.destroy(linger=0)

    async def _follow(self, socket: "zmq.asyncio.Socket", client: rpc.RpcClient) -> None:
        """One life: first message, snapshot, events; ends with _OutOfStep."""
        stream = EventStream(0.0, math.inf)  # silence is noticed by `_receive`
        stream.on_message(0.0, await self._receive(socket))
        try:
            taken = await self._take_snapshot(client)
        except MooncakeError as error:
            self._out_of_step(f"no snapshot: {error}")
            await asyncio.sleep(RETRY_S)
            raise _OutOfStep from error
        self.snapshots += 1
        self._live.set()
        self._act(stream.on_snapshot(0.0, taken.epoch, taken.seq, taken.pages))
        while True:
            self._act(stream.on_message(0.0, await self._receive(socket)))

    def _act(self, actions: Sequence[Action]) -> None:
        """Do what the stream decides, or raise _OutOfStep."""
        for action in actions:
            match action:
                case Reset(epoch, pages):
                    self._listener.on_snapshot(self._record.node, epoch, pages)
                case Apply(stored, removed):
                    self._listener.on_events(self._record.node, stored, removed)
                case Distrust(reason):
                    raise self._gap(reason)

    async def _receive(self, socket: "zmq.asyncio.Socket") -> StoreEvents:
        """Return the next well-formed message of our node, or raise _OutOfStep after silence."""
        try:
            async with asyncio.timeout(self._stale_s):
                while True:
                    event = _decode(await socket.recv_multipart())
                    if event.node == self._record.node:
                        return event
        except TimeoutError:
            self._out_of_step(f"silent for {self._stale_s:g} s")
        except ProtocolError as error:
            self._out_of_step(str(error))
        raise _OutOfStep

    async def _take_snapshot(self, client: rpc.RpcClient) -> SnapshotPages:
        taken, cursor = SnapshotPages(SNAPSHOT_KEYS_MAX), 0
        while True:
            page = await client.call(Snapshot(cursor), PAGE_DEADLINE_S)
            if not isinstance(page, SnapshotPage):
                raise ProtocolError(f"{client.endpoint}: not a snapshot page")
            cursor = taken.add(page)
            if cursor == 0:
                return taken

    def _ended(self, task: asyncio.Task[None]) -> None:
        # a listener that raises is a bug; say so now, not when the task is collected
        if not task.cancelled() and (error := task.exception()):
            log.error("follower.died", node=self._record.node, exc_info=error)

    def _gap(self, reason: str) -> _OutOfStep:
        self.gaps += 1
        self._out_of_step(reason)
        return _OutOfStep(reason)

    def _out_of_step(self, reason: str) -> None:
        if self.live:  # told once per life, not once per second of silence
            self._live.clear()
            log.warning("follower.out_of_step", node=self._record.node, reason=reason)
            self._listener.on_stale(self._record.node, reason)


def _decode(frames: list[Any]) -> StoreEvents:
    if len(frames) != 1:
        raise ProtocolError(f"an event of {len(frames)} frames")
    event = wire.decode(frames[0], StoreEvents)
    if len(event.stored) % KEY_BYTES or len(event.removed) % KEY_BYTES:
        raise ProtocolError(f"an event whose blobs are not whole keys of {KEY_BYTES} bytes")
    return event
