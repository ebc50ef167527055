"""What runs beside callers of `mooncake.store`: the metadata store's client and, with a segment, its node."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

import msgspec
import structlog

from kvstore.store.config import FileMemory, StoreConfig
from kvstore.store.service import StoreService
from mooncake.core.errors import MooncakeError, PeerGone, PeerTimeout
from mooncake.core.messages import STORES_PREFIX
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_open import open_metadata
from mooncake.core.metadata_registration import Registration
from mooncake.dropin.store.offload import Offload
from mooncake.dropin.store.settings import MASTER_KEY, QUOTAS_KEY, MasterSettings

START_S = 30.0
"""Memory is touched at the start: 0.1 s per GiB on an idle machine, ten times that on a busy one."""
ASK_S = 2.0
AWAY_S = 1.0
"""How long nobody asks a master again that did not answer: not every call pays ASK_S."""
CLOSE_S = 10.0

log = structlog.get_logger(__name__)
T = TypeVar("T")


class Background:
    """One event loop in a thread: the metadata store's client and, with a segment, its store node."""

    def __init__(
        self,
        master: str,
        config: StoreConfig | None,
        offload: Offload | None = None,
        memory: FileMemory | None = None,
    ) -> None:
        """Nothing is opened before `start`."""
        self.master_settings = MasterSettings()
        self._master = master
        self._config = config
        self._offload = offload
        self._memory = memory
        self._service: StoreService | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._metadata: MetadataStore | None = None
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._away_until_s = 0.0
        self._thread = threading.Thread(target=self._run, name="mooncake-store", daemon=True)

    def start(self) -> None:
        """Return when the segment, if there is one, can be found by others.

        Raises:
            ConfigError: it cannot work on this machine; PeerError: the master does not answer.
        """
        self._thread.start()
        if not self._ready.wait(START_S):
            self.close()
            raise PeerTimeout(f"the segment was not ready within {START_S:g} s")
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Withdraw the segment and end the thread (idempotent)."""
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # it has just ended by itself
                loop.call_soon_threadsafe(stop.set)
            self._thread.join(CLOSE_S)

    @property
    def alive(self) -> bool:
        """Whether it runs, with the segment if there is one."""
        return self._thread.is_alive()

    def has_master(self) -> bool:
        """Return whether the metadata store answers; "no" is believed for AWAY_S."""
        if self._metadata is None or time.monotonic() < self._away_until_s:
            return False
        try:
            self._ask(self._metadata.get(MASTER_KEY), ASK_S)
        except MooncakeError:
            self._away_until_s = time.monotonic() + AWAY_S
            return False
        return True

    def unmount_ssd(self) -> bool:
        """Do without the SSD tier from now on; return whether there was one.

        Raises:
            PeerError: it is not done after CLOSE_S.
        """
        service = self._service
        if service is None or service.tiering is None:
            return False
        self._ask(service.close_tier(), CLOSE_S)
        return True

    def retire(self) -> None:
        """Have the segment take nothing more; raises PeerError if it has ended."""
        service = self._service
        if service is not None:
            self._ask(_retire(service), ASK_S)

    def _ask(self, question: Coroutine[Any, Any, T], deadline_s: float) -> T:
        loop = self._loop
        if loop is None or not self._thread.is_alive():
            question.close()
            raise PeerGone("the thread has ended")
        future = asyncio.run_coroutine_threadsafe(question, loop)
        try:
            return future.result(deadline_s)
        except FutureTimeout:
            future.cancel()
            raise PeerTimeout("no answer") from None

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except MooncakeError as error:
            self._error = error
            if self._ready.is_set():
                log.error("mooncake.store: the segment of this process has ended", error=str(error))
        except BaseException as error:
            self._error = PeerGone(f"the segment of this process has ended: {error!r}")
            if not (isinstance(error, RuntimeError) and self._stop and self._stop.is_set()):
                raise
            # the interpreter is ending, so no thread can be started: what is left goes with the process
            log.debug("mooncake.store: closed in haste", reason=str(error))
        finally:
            self._ready.set()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            metadata = open_metadata(self._master)
            stack.push_async_callback(metadata.close)
            self.master_settings = await _read(metadata, MASTER_KEY, MasterSettings) or MasterSettings()
            self._metadata = metadata
            if self._config is None:
                self._ready.set()
                await self._stop.wait()
                return
            config = self.master_settings.tuned(self._config)
            if self._offload and (self._offload.wanted or self.master_settings.offload):
                ssd = stack.enter_context(self._offload.tier())
                ssd = msgspec.structs.replace(ssd, promote_hits=config.ssd_reads)
                config = msgspec.structs.replace(config, ssd=ssd)
            service = StoreService(config, metadata=metadata, memory=self._memory)
            record = await service.start()
            stack.push_async_callback(service.close)
            self._service = service
            if self.master_settings.multi_tenants:  # until the master divides them among all segments
                for tenant, quota_bytes in (await _read(metadata, QUOTAS_KEY, dict[str, int]) or {}).items():
                    service.node.set_quota(time.monotonic(), tenant, quota_bytes, strict=True)
            value = msgspec.json.encode(record)
            key = STORES_PREFIX + record.node
            registration = Registration(metadata, key, lambda: value, self.master_settings.client_ttl_s)
            registration.start()
            stack.push_async_callback(registration.close)
            try:
                async with asyncio.timeout(START_S / 2):
                    await registration.wait_registered()
            except TimeoutError:
                raise PeerTimeout("the master did not take the segment") from None
            self._ready.set()
            await service.run_until(self._stop)


async def _read(metadata: MetadataStore, key: str, kind: type[T]) -> T | None:
    for entry in (await metadata.get(key)).entries:
        if entry.key == key:
            try:
                return msgspec.json.decode(entry.value, type=kind)
            except msgspec.MsgspecError as error:
                log.warning("mooncake.store: what the master says makes no sense", key=key, error=str(error))
    return None


async def _retire(service: StoreService) -> None:
    service.node.retired = True
