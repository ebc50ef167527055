"""A dummy client: `mooncake.store` without a segment and without an engine of its own.

It uses the memory of this host's stores as every client does, and other hosts' through the real client
(mooncake.dropin.client.relay), which also tells it who is in the pool. While there is no real client every
call answers an error, never a miss; it is looked for until it is back.
"""

import contextlib
import threading
import time
from typing import TypeVar, cast

import msgspec
import structlog

from kvstore.client.members import ROOM_EVERY_S, Members
from kvstore.client.pool import Pool
from kvstore.store.config import FileMemory
from mooncake.core.config import fail
from mooncake.core.errors import ConfigError, MooncakeError, PeerTimeout, ProtocolError, RequestError
from mooncake.core.messages import Failure
from mooncake.core.rpc import raise_failure
from mooncake.core.secret import cluster_secret
from mooncake.dropin.client.line import Line, Neighbours, Welcome
from mooncake.dropin.client.relay import new_session
from mooncake.dropin.client.shared import RelayEngine, find_relay
from mooncake.dropin.store.background import Background
from mooncake.dropin.store.settings import MasterSettings, Settings, size_bytes
from mooncake.dropin.store.start import Started
from transfer.config import split_name
from transfer.engine import TransferEngine

SETUP_S = 4.0
"""For a real client that is started at the same time; upstream waits as long."""
CONNECT_S = 2.0
RETRY_S = 0.5
"""Between looks for a real client that is away."""
CLOSE_S = 10.0

log = structlog.get_logger(__name__)
T = TypeVar("T")


class DummySettings(Settings, frozen=True, kw_only=True):
    """Arguments of setup_dummy, checked."""

    server_address: str = ""
    mem_pool_size: int = 0

    @classmethod
    def of_dummy(
        cls, mem_pool_size: object, local_buffer_size: object, server_address: str
    ) -> "DummySettings":
        """Return the settings.

        Raises:
            ConfigError: one makes no sense.
        """
        try:
            split_name(server_address)
        except ConfigError as error:
            raise fail("server_address", server_address, f"HOST:PORT of mooncake_client: {error}") from error
        return cls(
            local_hostname="dummy",
            metadata_server="none",
            server_address=server_address,
            mem_pool_size=size_bytes("mem_pool_size", mem_pool_size),
            local_buffer_size=size_bytes("local_buffer_size", local_buffer_size),
        )


class LedMembers(Members):
    """Who is in the pool, as the real client says; one thread listens."""

    def __init__(self, engine: RelayEngine, address: tuple[str, int]) -> None:
        """`follow_relay` begins."""
        # the calls that the pool's client makes are those that a RelayEngine has
        super().__init__(cast(TransferEngine, engine), f"dummy-{new_session()[:12]}", touch=False)
        self.welcome = Welcome("", MasterSettings(), False)
        self._relay = engine
        self._address = address
        self._follower: Line | None = None
        self._over = threading.Event()
        self._listener: threading.Thread | None = None

    def follow_relay(self, deadline_s: float) -> None:
        """Return when the pool is known; follow it from then on.

        Raises:
            PeerError: there is no real client.
        """
        end_s = time.monotonic() + deadline_s
        while True:
            try:
                line = self._connect(min(end_s, time.monotonic() + CONNECT_S))
                break
            except MooncakeError:
                if time.monotonic() + RETRY_S >= end_s:
                    raise
                self._over.wait(RETRY_S)
        self._listener = threading.Thread(
            target=self._listen, args=(line,), name="mooncake-dummy", daemon=True
        )
        self._listener.start()

    def _connect(self, end_s: float) -> Line:
        line = self._relay.lead(find_relay(self._address, end_s), end_s)
        try:
            self.welcome = _next(line, Welcome, end_s)
            self._relay.share_all(end_s)
            self._take(_next(line, Neighbours, end_s))
        except BaseException:
            self._relay.lost()
            line.close()
            raise
        self._follower = line
        return line

    def _listen(self, line: Line | None) -> None:
        while not self._over.is_set():
            try:
                if line is None:
                    line = self._connect(time.monotonic() + CONNECT_S)
                    log.info("mooncake.store: the real client is back")
                self._take(_next(line, Neighbours, time.monotonic() + ROOM_EVERY_S))
            except PeerTimeout as error:
                if line is None:
                    log.debug("mooncake.store: no real client", reason=str(error))
                    self._over.wait(RETRY_S)
                else:
                    self._ask_all_rooms()
            except MooncakeError as error:
                if line is not None:
                    line.close()
                    self._relay.lost()
                    line = None
                    self.directories = {}  # what they do not know may be on stores that cannot be asked now
                    if not self._over.is_set():
                        log.warning("mooncake.store: the real client is away", reason=str(error))
                self._over.wait(RETRY_S)
        if line is not None:
            line.close()

    def _take(self, news: Neighbours) -> None:
        for record in news.stores:
            self.join(record)
        there = {record.node: None for record in news.stores}
        for node in list(self.stores):
            if node not in there:
                self.leave(node)
        guarded = bool(cluster_secret())
        self.directories = dict(news.directories) if guarded == self.welcome.guarded else {}

    def _ask_all_rooms(self) -> None:
        stores = self.stores
        if len(stores) > 1:
            for access in stores.values():
                self._ask_room(access)

    def close(self) -> None:
        """Hang up (idempotent)."""
        self._over.set()
        if self._follower is not None:
            self._follower.close()
        if self._listener is not None:
            self._listener.join(CLOSE_S)
        super().close()


def _next(line: Line, kind: type[T], end_s: float) -> T:
    message, _ = line.receive(Welcome | Neighbours | Failure, end_s)
    raise_failure(message, "mooncake_client")
    if not isinstance(message, kind):
        raise ProtocolError(f"{type(message).__name__} instead of {kind.__name__}")
    return message


class DummyBackground(Background):
    """What a dummy knows of the master: what its real client said."""

    def __init__(self, members: LedMembers, engine: RelayEngine) -> None:
        """Runs no thread."""
        self.master_settings = members.welcome.master
        self._engine = engine

    def has_master(self) -> bool:
        """Return whether the real client is there: without it nobody can tell what the pool has."""
        return self._engine.is_led


class DummyStarted(Started):
    """Everything that exists from `setup_dummy` on."""

    def __init__(self, settings: DummySettings) -> None:
        """Start; the pool is known then.

        Raises:
            PeerError: there is no real client.
        """
        host, port = split_name(settings.server_address)
        self._stack = contextlib.ExitStack()
        self.hostname = ""
        with contextlib.ExitStack() as stack:
            relay = RelayEngine()
            stack.callback(relay.close)
            self.relay = relay
            self.engine = cast(TransferEngine, relay)  # register, unregister, buffer_at are what is used
            members = LedMembers(relay, (host, port))
            stack.callback(members.close)
            members.follow_relay(SETUP_S)
            self.settings = msgspec.structs.replace(settings, tenant_id=members.welcome.tenant)
            self.asked = settings
            self.background = DummyBackground(members, relay)
            self.pool = Pool(engine=self.engine, members=members, sure=True)
            stack.callback(self.pool.close)
            self._stack = stack.pop_all()

    def mount(self, capacity_bytes: int, memory: FileMemory | None = None) -> str:  # noqa: ARG002
        """Refuse.

        Raises:
            RequestError: always.
        """
        raise RequestError("a dummy client has no memory to give: the real client mounts segments")

    def unmount(self, name: str, grace_s: float = 0.0) -> bool:  # noqa: ARG002 - it has none
        """Return that there is no such segment."""
        return False

    def unmount_ssd(self) -> bool:
        """Return that there is none."""
        return False

    def close(self) -> None:
        """End all of it (idempotent)."""
        self._stack.close()

    def allocate(self, size_bytes: int) -> int:
        """Return the address of fresh memory that is shared with the real client; raises as RelayEngine."""
        return self.relay.allocate(size_bytes).address
