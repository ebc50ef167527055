"""The shell of `mooncake directory`: look-ups by any of them, tasks and orders by the one that leads.

Startup: directory with its rpc socket, admin HTTP, election, then the record by which others find it.
Main loop: while it leads, a LeaderTerm acts. Shutdown in reverse; resigning lets another lead at once.
"""

import asyncio
import os
import time
from collections.abc import Callable

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from kvstore.directory.directory import BLOCKS_MAX, Directory
from kvstore.directory.messages import (
    DIRECTORIES_PREFIX,
    LEADER_KEY,
    DirectoryRecord,
    TaskReply,
    TaskRequest,
)
from kvstore.directory.metrics import DirectoryMetrics
from kvstore.directory.service import DirectoryService
from kvstore.leader.admin_api import AdminApi
from kvstore.leader.admin_http import AdminServer, check_admin
from kvstore.leader.store_clients import StatsPoll, StoreClients
from kvstore.leader.term import LeaderTerm
from mooncake.core.election import TTL_S, Election
from mooncake.core.errors import ConfigError, MooncakeError, NotLeader
from mooncake.core.messages import Term
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_registration import Registration

log = structlog.get_logger(__name__)


class CoordinatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one directory process.

    Args:
        name: unique among directories.
        endpoint: where rpc requests are answered; port 0 = any. Off loopback it needs the cluster's secret.
        admin_host: of the admin HTTP; beyond loopback only with a token.
        admin_port: 0 = any; None = no HTTP.
        admin_token: shown by whoever uses the admin HTTP; "" = none asked for.
        blocks_max: bound of the directory.
        ttl_s: of the leader's lease and the record; the same for all directories.
    """

    name: str
    endpoint: str = "tcp://127.0.0.1:0"
    admin_host: str = "127.0.0.1"
    admin_port: int | None = 0
    admin_token: str = ""
    blocks_max: int = BLOCKS_MAX
    ttl_s: float = TTL_S

    def __post_init__(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            ConfigError: names the setting and its value.
        """
        if not self.name or len(self.name) > 128 or "/" in self.name:
            raise ConfigError(f"name={self.name!r}: 1 to 128 characters without '/'")
        if self.blocks_max < 1:
            raise ConfigError(f"blocks_max={self.blocks_max}: at least 1")
        if self.admin_port is not None:
            check_admin(self.admin_host, self.admin_port, self.admin_token)

    def __repr__(self) -> str:
        """The token stays out of logs and tracebacks."""
        return f"CoordinatorConfig({self.name!r}, {self.endpoint}, admin {self.admin_host}:{self.admin_port})"


class Coordinator:
    """One directory process: `start`, `run_until`, `close`."""

    def __init__(
        self,
        config: CoordinatorConfig,
        metadata: MetadataStore,
        clock: Callable[[], float] = time.monotonic,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """Nothing is opened before `start`; `metadata` is not closed here; `registry`: what is shown."""
        self.config = config
        self.metrics = DirectoryMetrics(registry)
        self.clients = StoreClients()
        self.polls = StatsPoll(self.clients)
        self.service = DirectoryService(
            metadata,
            config.endpoint,
            config.blocks_max,
            clock,
            on_leave=self._on_leave,
            on_join=self.clients.join,
            on_task=self.handle,
        )
        self.leading: LeaderTerm | None = None
        """What this directory does as the leader; None: another leads, or nobody."""
        self._metadata = metadata
        self._clock = clock
        self._admin: AdminServer | None = None
        self._registration: Registration | None = None
        self._election: Election | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def directory(self) -> Directory:
        """What is known of the pool."""
        return self.service.directory

    def now_s(self) -> float:
        """Return the time of this process's clock."""
        return self._clock()

    @property
    def election(self) -> Election:
        """Who leads; only after `start`."""
        assert self._election is not None
        return self._election

    # ------------------------------------------------------------ life

    async def start(self) -> DirectoryRecord:
        """Open everything and begin to serve; returns how others reach it.

        Raises:
            ConfigError: a setting cannot work on this machine. Nothing stays open.
        """
        try:
            return await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> DirectoryRecord:
        config = self.config
        endpoint = await self.service.start()
        admin_url = ""
        if config.admin_port is not None:
            api = AdminApi(self)
            self._admin = AdminServer(api.answer, config.admin_host, config.admin_port, config.admin_token)
            admin_url = self._admin.start()
        self._election = Election(
            self._metadata, LEADER_KEY, config.name, endpoint, config.ttl_s, self._clock
        )
        self._election.start()
        self._tasks = [
            asyncio.create_task(self.polls.run(), name="directory stats"),
            asyncio.create_task(self._lead(), name="directory leader"),
        ]
        record = DirectoryRecord(config.name, endpoint, admin_url, os.getpid())
        value = msgspec.json.encode(record)
        key = DIRECTORIES_PREFIX + config.name
        self._registration = Registration(self._metadata, key, lambda: value, config.ttl_s)
        self._registration.start()
        log.info("coordinator.started", **msgspec.structs.asdict(record))
        return record

    async def run_until(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set; raises if one of the process's own tasks dies."""
        if not self._tasks:
            raise ConfigError("start the directory before run_until")
        stopped = asyncio.create_task(stop.wait(), name="coordinator stop")
        serving = asyncio.create_task(self.service.run_until(stop), name="coordinator directory")
        try:
            done, _ = await asyncio.wait(
                {stopped, serving, *self._tasks}, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                task.result()
        finally:
            stopped.cancel()
            serving.cancel()
            await asyncio.gather(stopped, serving, return_exceptions=True)

    async def close(self) -> None:
        """Stop (idempotent): give no more orders, resign, then stop answering."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._election:
            await self._election.close()
        if self._registration:
            await self._registration.close()
        if self._admin:
            await asyncio.to_thread(self._admin.close)
        await self.service.close()
        await self.clients.close()
        self._tasks = []
        self._election = self._registration = self._admin = None

    # ------------------------------------------------------------ leading

    async def _lead(self) -> None:
        while True:
            await self._lead_term(await self.election.wait_leading())

    async def _lead_term(self, term: Term) -> None:
        """Act as leader until `term` is over."""

        def leads() -> bool:
            return self.election.term == term

        leading = LeaderTerm(
            term,
            leads,
            self.directory,
            self.service.see_members,
            self.clients,
            self.polls,
            self._metadata,
            self.metrics.on_commands,
            self._clock,
        )
        log.info("coordinator.leads", term=term.number)
        over = asyncio.create_task(self.election.wait_over(term), name="term over")
        acting = asyncio.create_task(leading.run(), name="term")
        self.leading = leading
        try:
            await asyncio.wait({over, acting}, return_when=asyncio.FIRST_COMPLETED)
            if acting.done():
                acting.result()  # raises: it never ends by itself
        finally:
            self.leading = None
            over.cancel()
            acting.cancel()
            await leading.close()
            await asyncio.gather(over, acting, return_exceptions=True)
            log.info("coordinator.leads_no_more", term=term.number)

    def _on_leave(self, node: str) -> None:
        self.clients.leave(node)
        if self.leading:
            self.leading.on_leave(node)

    async def handle(self, request: TaskRequest) -> TaskReply:
        """Answer as the leader.

        Raises:
            NotLeader: another leads; the text names it. Else as LeaderTerm.handle.
        """
        leading = self.leading
        if leading is None or self.election.term != leading.term:
            record = await self.leader_record()
            if record is None:
                raise NotLeader(
                    f"directory {self.config.name} does not lead, and no leader is known yet: "
                    f"ask again within {2 * self.config.ttl_s:g} s"
                )
            where = f"{record.endpoint}, admin {record.admin_url or 'none'}"
            raise NotLeader(
                f"directory {self.config.name} does not lead: ask {record.name or 'the leader'} at {where}"
            )
        return await leading.handle(request)

    async def leader_record(self) -> DirectoryRecord | None:
        """Return the leader's record as far as it is known; None: nobody leads."""
        leader = self._election.leader if self._election else None
        if leader is None or (leader.candidate == self.config.name and self.leading is None):
            return None
        key = DIRECTORIES_PREFIX + leader.candidate
        try:
            for entry in (await self._metadata.get(key)).entries:
                if entry.key == key:
                    return msgspec.json.decode(entry.value, type=DirectoryRecord)
        except (MooncakeError, msgspec.MsgspecError) as error:
            log.debug("coordinator.no_leader_record", error=str(error))
        return DirectoryRecord(leader.candidate, leader.address, "", 0)
