"""Serves a decision core to gateways while it leads (DESIGN 4): election, connections, fencing.

A standby's Core follows instances and blocks all the time, so that what it knows is there when it takes over;
what gateways have in flight they hand in when they join. It says nothing but NotLeader before its term and
after it, and what it says in its term carries the term, so that gateways refuse what comes too late.
"""

import asyncio

import structlog
import zmq

from conductor.cluster import PULSE_S
from conductor.core import Core
from conductor.core_desk import CoreDesk
from conductor.core_messages import CORE_KEY, NUMBER_BYTES, FromCore, FromGateway, NotLeader, Refused
from conductor.core_metrics import CoreCollector
from conductor.core_socket import CoreSocket
from mooncake.core import rpc, wire
from mooncake.core.election import Election
from mooncake.core.errors import MooncakeError
from mooncake.core.metadata import MetadataStore

log = structlog.get_logger(__name__)

CORE_TTL_S = 1.0
"""Of the leader's lease: another one leads about as long after it has died (benchmarks/LOG.md). etcd gives no
lease shorter than one and a half of its election time-outs: two seconds, unless it is told otherwise."""


LINGER_MS = 200
"""Answers that were given before we resigned still reach their gateways."""


class CoreService:
    """One candidate: `start`, `close`."""

    def __init__(
        self, core: Core, metadata: MetadataStore, bind: str, name: str, ttl_s: float = CORE_TTL_S
    ) -> None:
        """Bind at once; nothing else happens before `start`.

        Args:
            core: not started; it is started and closed here.
            metadata: for the election; not closed here.
            bind: where gateways reach it, tcp://HOST:PORT (port 0 = any) or ipc://PATH.
            name: differs between all candidates, also between two starts of one.
            ttl_s: of the lease, the same for all candidates.

        Raises:
            ConfigError: `bind` cannot be used.
        """
        self.core = core
        self.name = name
        self._socket = CoreSocket(zmq.ROUTER, self._take, LINGER_MS)
        try:
            self._endpoint = rpc.bind(self._socket.socket, bind)
        except Exception:
            self._socket.close()
            raise
        self._election = Election(metadata, CORE_KEY, name, self._endpoint, ttl_s)
        self._desk: CoreDesk | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        core.metrics.registry.register(CoreCollector(self))

    @property
    def endpoint(self) -> str:
        """Where gateways reach it."""
        return self._endpoint

    @property
    def leads(self) -> bool:
        """Whether it may decide at this moment."""
        return self._acting() is not None

    @property
    def term(self) -> int:
        """Number of the term in which it leads; 0 = it does not."""
        desk = self._acting()
        return 0 if desk is None else desk.term.number

    @property
    def gateways(self) -> list[str]:
        """Names of those that have joined."""
        desk = self._acting()
        return [] if desk is None else desk.gateways

    async def start(self) -> None:
        """Follow the cluster, stand for election, serve."""
        self.core.start()
        self._socket.start()
        self._election.start()
        self._tasks = [
            asyncio.create_task(self._lead(), name="core leads"),
            asyncio.create_task(self._tick_forever(), name="core tick"),
        ]

    async def close(self) -> None:
        """Resign first, so that another one leads at once; then end everything (idempotent)."""
        if self._closed:
            return
        self._closed = True
        await self._election.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end()
        self._socket.close()
        rpc.remove_socket_file(self._endpoint)
        await self.core.close()

    # ------------------------------------------------------------ terms

    async def _lead(self) -> None:
        while True:
            term = await self._election.wait_leading()
            log.info("core.leads", name=self.name, endpoint=self._endpoint, term=term.number)
            self.core.members.term = term
            self._desk = CoreDesk(self.core, term, self._say)
            self.core.act()
            await self._election.wait_over(term)
            log.warning("core.leads_no_more", name=self.name, term=term.number)
            await self._end()

    async def _end(self) -> None:
        desk, self._desk = self._desk, None
        if desk is not None:
            desk.close()
            await self.core.rest()

    def _acting(self) -> CoreDesk | None:
        """Return the desk if its term lasts at this moment: the clock is asked before each deed."""
        desk = self._desk
        return desk if desk is not None and self._election.term == desk.term else None

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(PULSE_S)
            self._socket.drain()
            if (desk := self._acting()) is not None:
                desk.tick()

    # ------------------------------------------------------------ messages

    def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != NUMBER_BYTES:
            log.warning("core.bad_frames", frames=len(frames))
            return
        identity, number = frames[0], int.from_bytes(frames[1], "little")
        try:
            message: FromGateway = wire.decode(frames[2], FromGateway)  # type: ignore[arg-type]  # a union
        except MooncakeError as error:
            log.warning("core.bad_message", error=str(error))
            self._send(identity, number, Refused(error.code, str(error)))
            return
        desk = self._acting()
        if desk is None:
            self._send(identity, number, NotLeader())
            return
        try:
            desk.take(identity, number, message)
        except Exception:  # one message must not end the core
            log.exception("core.message_failed", message=type(message).__name__)
            self._send(identity, number, Refused(MooncakeError.code, "the core failed: see its log"))

    def _say(self, identity: bytes, number: int, message: FromCore) -> None:
        """Send for a desk, as long as it acts."""
        if self._acting() is not None:
            self._send(identity, number, message)

    def _send(self, identity: bytes, number: int, message: FromCore) -> None:
        frames = [identity, number.to_bytes(NUMBER_BYTES, "little"), wire.encode(message)]
        self._socket.send(frames)  # nobody waits for what cannot be sent: the gateway is gone, or asks again
