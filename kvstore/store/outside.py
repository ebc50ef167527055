"""A store's side towards other hosts: it serves them, and copies from them what is asked for."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import structlog

from kvstore.engine.remote import RemoteStore
from kvstore.limits import ANSWER_S, PULL_WAIT_S_MAX, SERVICE
from kvstore.node.names import Names
from kvstore.node.node import Node
from kvstore.store.peers import Peers
from kvstore.store.pulls import CLOSE_S, Clock, Pulls, PullStats
from mooncake.core import wire
from mooncake.core.errors import MooncakeError, PeerGone, PeerTimeout
from mooncake.core.messages import StoreRequest
from mooncake.core.metadata import MetadataStore
from transfer.config import EngineConfig
from transfer.engine import TransferEngine
from transfer.file_segment import FileSegment
from transfer.segment import Segment

log = structlog.get_logger(__name__)

HANDOVERS_MAX = 16
"""Other stores being told at once; a millisecond each."""

Handle = Callable[[Any], Awaitable[Any]]


class Outside:
    """The transfer engine of one store, and what hangs on it: `open`, `serve`, `close`."""

    def __init__(self, engine: TransferEngine, address: int) -> None:
        """Of `open`."""
        self.engine = engine
        self.address = address
        self.pulls: Pulls | None = None
        self._peers: Peers | None = None
        self._name = ""
        self._handing: set[asyncio.Task[None]] = set()

    @classmethod
    def open(cls, config: EngineConfig, segment: Segment) -> "Outside":
        """Start the engine and register the segment with it; waits, so call it in a thread.

        Raises:
            ConfigError: the address cannot be bound.
        """
        engine = TransferEngine(config).start()
        # a view has no descriptor that peers of this host could be given
        shared = not isinstance(segment, FileSegment)
        memory = segment if shared else segment.view(0, segment.size_bytes)
        return cls(engine, engine.register(memory, location="cpu:0").address)

    def serve(
        self,
        node: Node,
        name: str,
        handle: Handle,
        metadata: MetadataStore | None,
        clock: Clock,
        names: Names | None = None,
    ) -> None:
        """Answer the same requests as the rpc server, for peers that the engine has let in.

        Args:
            node: where blocks of other stores go.
            name: of this store.
            handle: answers a request, on the loop that calls this.
            metadata: where the other stores register; None: nothing is copied from them.
            clock: monotonic seconds.
            names: see Pulls.
        """
        self._name = name
        loop = asyncio.get_running_loop()

        def answer(body: bytes) -> bytes:  # in the peer's own thread
            request: Any = wire.decode(body, StoreRequest)  # type: ignore[arg-type]
            handled = asyncio.run_coroutine_threadsafe(_awaited(handle, request), loop)
            wait_s = min(getattr(request, "wait_s", 0.0), PULL_WAIT_S_MAX)
            try:
                return wire.encode(handled.result(ANSWER_S + wait_s))
            except TimeoutError:
                handled.cancel()
                raise PeerTimeout(f"store {name}: too busy to answer") from None

        self.engine.serve(SERVICE, answer)
        if metadata is not None:
            self._peers = Peers(metadata, self.engine, name).start()
            self.pulls = Pulls(node, self.address, self._peers, clock, names)

    def hand_over(self, keys: Sequence[bytes], target: str) -> None:
        """Let the store of `target` copy blocks from here; if it cannot, it will when it needs them."""
        if self._peers is None or self.pulls is None:
            return
        stats = self.pulls.stats
        if len(self._handing) >= HANDOVERS_MAX:
            stats.handovers_failed += 1
            return
        try:
            remote = self._peers.remote(target)
        except PeerGone as error:
            stats.handovers_failed += 1
            log.debug("handover.no_peer", target=target, reason=str(error))
            return
        task = asyncio.create_task(self._hand_over(remote, list(keys), stats), name="store handover")
        self._handing.add(task)
        task.add_done_callback(self._handing.discard)

    async def _hand_over(self, remote: RemoteStore, keys: list[bytes], stats: PullStats) -> None:
        try:
            await asyncio.to_thread(remote.pull, keys, self._name)
        except MooncakeError as error:
            stats.handovers_failed += 1
            log.info("handover.failed", reason=str(error))
        else:
            stats.handed_over += len(keys)

    async def close(self) -> None:
        """Close the engine and end what is under way (idempotent)."""
        if self._peers:
            await self._peers.close()
        await asyncio.to_thread(self.engine.close)
        if self.pulls:
            await self.pulls.close()
        if self._handing:
            await asyncio.wait(self._handing, timeout=CLOSE_S)


async def _awaited(handle: Handle, request: Any) -> Any:
    return await handle(request)
