"""A process says that it is alive: one key under a lease, for as long as the process wants.

The store may be away, come back empty, or not be there yet; the owner never hears an exception of
it and works on. What the store says about us is soft state (DESIGN 2.2).
"""

import asyncio
import contextlib
import enum
from collections.abc import Callable

import structlog

from mooncake.core.errors import MooncakeError, PeerError, RequestError
from mooncake.core.metadata import MetadataStore

log = structlog.get_logger(__name__)

TTL_S = 2.0
"""A dead process is noticed within 3 s: etcd looks for ended leases every 0.5 s, and grants no shorter
one with its default settings. A process that stands still for 1.3 s (two beats) stays a member."""
BACKOFF_S_MIN, BACKOFF_S_MAX = 0.1, 2.0
"""Cap: a restarted Conductor sees everybody within 2 s plus one call deadline."""
CLOSE_S = 0.5
"""A store that is there answers in milliseconds; one that left first must not hold us up."""


class RegistrationState(enum.Enum):
    """What the last beat found."""

    NEW = "new"
    REGISTERED = "registered"
    AWAY = "away"
    CLOSED = "closed"


class Registration:
    """Keeps `key` in `store` with the value of `value_fn`, which is asked at every beat."""

    def __init__(
        self, store: MetadataStore, key: str, value_fn: Callable[[], bytes], ttl_s: float = TTL_S
    ) -> None:
        """Call `start` on a running event loop."""
        self._store = store
        self._key = key
        self._value_fn = value_fn
        self._ttl_s = ttl_s
        self._lease_id = 0
        self._written: bytes | None = None
        self._wake = asyncio.Event()
        self._registered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.state = RegistrationState.NEW
        self.registrations = 0
        """How often the key was written under a fresh lease; more than 1 = the store forgot us."""

    def start(self) -> None:
        """Begin; returns at once."""
        self._task = asyncio.create_task(self._run(), name=f"registration {self._key}")

    def refresh(self) -> None:
        """Write a changed value now instead of at the next beat."""
        self._wake.set()

    async def wait_registered(self) -> None:
        """Return once the key is in the store; bound it with asyncio.timeout."""
        await self._registered.wait()

    async def close(self) -> None:
        """Take the key back; waits at most CLOSE_S for the store, then leaves it to the lease."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self.state = RegistrationState.CLOSED
        self._registered.clear()
        if self._lease_id:
            with contextlib.suppress(MooncakeError, TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._store.revoke(self._lease_id)
            self._lease_id = 0

    async def _run(self) -> None:
        backoff_s = BACKOFF_S_MIN
        while True:
            try:
                await self._beat()
                self._turn(RegistrationState.REGISTERED)
                backoff_s = BACKOFF_S_MIN
                wait_s = self._ttl_s / 3
            except Exception as error:
                # an owner's faulty value_fn must not end the registration silently either
                if isinstance(error, MooncakeError):
                    self._turn(RegistrationState.AWAY, error)
                else:
                    log.exception("registration.failed", key=self._key)
                    self.state = RegistrationState.AWAY
                wait_s = backoff_s
                backoff_s = min(backoff_s * 2, BACKOFF_S_MAX)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            self._wake.clear()

    async def _beat(self) -> None:
        value = self._value_fn()
        if self._lease_id and not await self._store.keep_alive(self._lease_id):
            self._forget()
        if not self._lease_id:
            self._lease_id = await self._store.grant(self._ttl_s)
            self._written = None
        if value != self._written:
            try:
                await self._store.put(self._key, value, self._lease_id)
            except RequestError:
                self._forget()  # the lease ended between the two calls: the next beat starts over
                raise
            self.registrations += self._written is None
            self._written = value

    def _forget(self) -> None:
        self._lease_id, self._written = 0, None

    def _turn(self, state: RegistrationState, error: MooncakeError | None = None) -> None:
        if state is not self.state:
            if state is RegistrationState.AWAY:
                # a store that is away is told of once, by its client; what it refuses is about us
                say = log.debug if isinstance(error, PeerError) else log.warning
                say("registration.away", key=self._key, error=str(error))
            elif self.registrations > 1:
                log.info("registration.back", key=self._key)
        self.state = state
        if state is RegistrationState.REGISTERED:
            self._registered.set()
        else:
            self._registered.clear()
