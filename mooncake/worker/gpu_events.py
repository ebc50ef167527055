"""Tells gateways which blocks an engine's own prefix cache holds, as a store node tells of its segment.

    engine --vLLM's KV events, ipc--> relay: GpuBlocks --StoreEvents, snapshots--> gateways' StoreFollower

So a gateway follows an engine by the means by which it follows a store: epochs, sequence numbers, snapshots.
A message of vLLM's that is missing is asked for again; what cannot be had or read costs all that is known of
the cache, which then is learned anew from what is stored next. That costs hits, never correctness.
"""

import asyncio
import time
from collections.abc import Sequence

import structlog
import zmq
import zmq.asyncio

from kvstore.limits import HEARTBEAT_S
from kvstore.node.changes import NodeEvents
from kvstore.node.events import EventPublisher, Snapshots
from mooncake.core.errors import ProtocolError
from mooncake.core.messages import Snapshot, SnapshotPage, gpu_node
from mooncake.core.rpc import RpcServer
from mooncake.worker.gpu_blocks import GpuBlocks, decode_batch
from mooncake.worker.spec import EngineSpec

log = structlog.get_logger(__name__)

PUBLISH_S = 0.1
"""Changes are told together, this often: a busy engine has some in every step, a gateway many engines."""
QUIET_S = 1.0
"""After so long vLLM is asked once for more: that the last message was lost, no later one would show."""
REPLAY_S = 2.0
"""vLLM looks for requests to replay ten times a second, between its batches."""
REPLAYS_MAX = 3
"""In a row for one gap, as long as each brings something: vLLM's socket drops what does not fit its queue."""
QUEUE_MESSAGES_MAX = 100_000
"""As vLLM's publisher keeps: minutes of steps."""
SEQ_BYTES = 8
END_OF_REPLAY = b"\xff" * SEQ_BYTES


class EventReader:
    """vLLM's messages in their order; no socket is known here."""

    def __init__(self, blocks: GpuBlocks) -> None:
        """Expect message 0."""
        self.blocks = blocks
        self.expected = 0
        self.undecodable = 0
        self.gaps = 0
        self.lost = 0  # gaps that could not be filled

    def take(self, frames: Sequence[bytes]) -> bool:
        """Apply a message; False = others are missing before it, and it has to come again."""
        if len(frames) != 3 or len(frames[1]) != SEQ_BYTES:
            self._distrust(f"a message of {len(frames)} frames")  # the next one shows what was missed
            return True
        seq = int.from_bytes(frames[1], "big")
        if seq > self.expected:
            return False
        if seq == self.expected:
            self.expected += 1
            try:
                self.blocks.apply(decode_batch(frames[2]))
            except ProtocolError as error:
                self._distrust(str(error))
        return True

    def skip_to(self, frames: Sequence[bytes]) -> None:
        """Go on with a message before which others are missing for good."""
        self.lost += 1
        self.blocks.forget()
        self.expected = int.from_bytes(frames[1], "big")
        self.take(frames)

    def _distrust(self, reason: str) -> None:
        self.undecodable += 1
        log.warning("gpu_events.undecodable", reason=reason, blocks_forgotten=len(self.blocks))
        self.blocks.forget()


class GpuEvents:
    """Of one start of an engine: begins before its first request and ends with it."""

    def __init__(self, spec: EngineSpec, blocks: GpuBlocks, address: str) -> None:
        """Bind what gateways connect to.

        Args:
            spec: the engine's; it says where vLLM publishes.
            blocks: empty.
            address: of this host, where gateways find us.

        Raises:
            ConfigError: `address` may not be bound without a secret of the cluster.
        """
        self._spec = spec
        self.reader = EventReader(blocks)
        self._snapshots = Snapshots(spec.epoch)
        self._publisher = EventPublisher(f"tcp://{address}:0", gpu_node(spec.instance_id), spec.epoch)
        try:
            self._server = RpcServer(f"tcp://{address}:0", Snapshot, self._answer)
        except BaseException:
            self._publisher.close()
            raise
        self._context = zmq.asyncio.Context()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def endpoints(self) -> tuple[str, str]:
        """Where snapshots are to be had, and where changes are told."""
        return self._server.endpoint, self._publisher.endpoint

    def start(self) -> None:
        """Begin on the running loop."""
        self._server.start()
        self._tasks = [
            asyncio.create_task(self._read(), name="read KV events"),
            asyncio.create_task(self._publish(), name="publish GPU blocks"),
        ]
        for task in self._tasks:
            task.add_done_callback(_ended)

    async def close(self) -> None:
        """Stop (idempotent)."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.close()
        self._publisher.close()
        self._context.destroy(linger=0)

    # ------------------------------------------------------------ from the engine

    async def _read(self) -> None:
        socket = self._context.socket(zmq.SUB)
        socket.set_hwm(QUEUE_MESSAGES_MAX)
        socket.connect(self._spec.kv_events)
        socket.subscribe(b"")
        asked = False
        while True:
            try:
                async with asyncio.timeout(None if asked else QUIET_S):
                    frames = await socket.recv_multipart()
            except TimeoutError:
                await self._replay()
                asked = True
                continue
            asked = False
            if not self.reader.take(frames):
                await self._fill_gap(frames)

    async def _fill_gap(self, frames: Sequence[bytes]) -> None:
        """Bring the reader past a message before which others are missing."""
        self.reader.gaps += 1
        for _ in range(REPLAYS_MAX):
            before = self.reader.expected
            await self._replay()
            if self.reader.take(frames):
                return
            if self.reader.expected == before:
                break
        log.warning("gpu_events.lost", first=self.reader.expected, blocks_forgotten=len(self.reader.blocks))
        self.reader.skip_to(frames)

    async def _replay(self) -> None:
        """Take what vLLM still has from the expected message on."""
        socket = self._context.socket(zmq.DEALER)
        socket.set_hwm(QUEUE_MESSAGES_MAX)
        socket.connect(self._spec.kv_replay)
        try:
            async with asyncio.timeout(REPLAY_S):
                await socket.send_multipart([b"", self.reader.expected.to_bytes(SEQ_BYTES, "big")])
                while True:
                    _, *frames = await socket.recv_multipart()
                    if len(frames) == 3 and frames[1] == END_OF_REPLAY:
                        return
                    if not self.reader.take(frames):
                        return  # it has forgotten what we need
        except TimeoutError:
            log.warning("gpu_events.no_replay", seconds=REPLAY_S)
        finally:
            socket.close(linger=0)

    # ------------------------------------------------------------ to gateways

    async def _publish(self) -> None:
        beat_s = time.monotonic()
        while True:
            self._tell()
            if time.monotonic() >= beat_s:
                beat_s = time.monotonic() + HEARTBEAT_S
                self._publisher.heartbeat()
            await asyncio.sleep(PUBLISH_S)

    def _tell(self) -> None:
        self._publisher.publish(NodeEvents(*self.reader.blocks.drain()))

    async def _answer(self, request: Snapshot) -> SnapshotPage:
        self._tell()  # a snapshot is of the moment of the last message
        return self._snapshots.page(request.cursor, self._publisher.seq, self.reader.blocks.keys)


def _ended(task: asyncio.Task[None]) -> None:
    # followers hear no heartbeat any more and trust nothing; this says why
    if not task.cancelled() and (error := task.exception()):
        log.error("gpu_events.died", task=task.get_name(), exc_info=error)
