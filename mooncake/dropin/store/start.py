"""Settings of `mooncake.store`, and what exists from `setup` on: an engine, a segment, the pool's client.

Upstream's names mean here:

    master_server_addr   HOST:PORT of `mooncake_master`, or etcd://...: where stores and directories register
    metadata_server      accepted and not used: stores say themselves where their memory is
    global_segment_size  memory that this process gives to the pool; 0 = none, it only uses the pool
    local_buffer_size    accepted and not used: nothing is staged
    enable_ssd_offload   the segment has an SSD tier below it, see mooncake.dropin.store.offload
    enable_client_http_server, client_http_port   see mooncake.dropin.client.http
"""

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, NamedTuple, TypeVar

import msgspec
import structlog

from kvstore.client.pool import Pool
from kvstore.store.config import EVICT_RATIO, FileMemory, StoreConfig
from kvstore.store.service import StoreService
from mooncake.core.config import fail
from mooncake.core.errors import MooncakeError, PeerError, PeerGone, PeerTimeout
from mooncake.core.messages import STORES_PREFIX
from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_open import check_metadata, open_metadata
from mooncake.core.metadata_registration import Registration
from mooncake.dropin.engine.env import FALSE, TRUE, EngineEnv
from mooncake.dropin.engine.start import environment, open_engine
from mooncake.dropin.store.offload import Offload
from transfer.config import split_name

SEGMENT_BYTES = 16 << 20
BUFFER_BYTES = 16 << 20
MASTER = "127.0.0.1:50051"
PROTOCOL = "tcp"
TENANT = "default"
CLIENT_HTTP_PORT = 9300
"""Upstream's defaults of the dict form."""
MASTER_KEY = "mooncake/master"
"""Where a master says what its flags are: a JSON object of MasterSettings."""
QUOTAS_KEY = "mooncake/quotas"
"""Where it says what tenants may have, for stores that join: a JSON object of bytes by tenant."""
SEGMENT_TTL_S = 5.0
"""A process whose interpreter is busy for so long is no dead one; upstream waits 10 s."""
START_S = 30.0
"""Memory is touched at the start: 0.1 s per GiB on an idle machine, ten times that on a busy one."""
CONNECT_S = 2.0
ASK_S = 2.0
AWAY_S = 1.0
"""How long nobody asks a master again that did not answer: not every call pays ASK_S."""
CLOSE_S = 10.0
AGE_NEVER_S = 86_400.0
"""Of blocks that go to the SSD only when memory runs short."""
PROTOCOLS = ("tcp", "rdma", "")
OTHER_NAMES = {"master_server_address": "master_server_addr", "device_name": "rdma_devices"}
"""What LMCache calls settings of the dict form; not to know them would mean the default master."""

_UNITS = "bkmgt"
_SIZE = re.compile(r"(-?[0-9]+(?:[.][0-9]+)?) *([bkmgt]?)i?b?")
log = structlog.get_logger(__name__)
T = TypeVar("T")


class MasterSettings(msgspec.Struct, frozen=True):
    """What clients have to know of a master's flags."""

    kv_lease_ttl_s: float = 10.0
    soft_pin_ttl_s: float = 1800.0
    client_ttl_s: float = SEGMENT_TTL_S
    evict_above_ratio: float = 1.0
    evict_ratio: float = EVICT_RATIO
    evict_soft_pins: bool = True
    offload: bool = False
    offload_on_evict: bool = False
    ssd_reads: int = 1
    multi_tenants: bool = False

    def tuned(self, config: StoreConfig) -> StoreConfig:
        """Return `config` with what a master has to say about it."""
        return msgspec.structs.replace(
            config,
            evict_above_ratio=self.evict_above_ratio,
            evict_ratio=self.evict_ratio,
            evict_soft_pins=self.evict_soft_pins,
            quota_needed=self.multi_tenants,
            ssd_age_s=AGE_NEVER_S if self.offload_on_evict else config.ssd_age_s,
            ssd_reads=self.ssd_reads,
        )


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Arguments of setup, checked."""

    local_hostname: str
    metadata_server: str
    global_segment_size: int = SEGMENT_BYTES
    local_buffer_size: int = BUFFER_BYTES
    protocol: str = PROTOCOL
    rdma_devices: str = ""
    master_server_addr: str = MASTER
    tenant_id: str = TENANT
    enable_ssd_offload: bool = False
    ssd_offload_path: str = ""
    enable_client_http_server: bool = False
    client_http_port: int = CLIENT_HTTP_PORT

    def __post_init__(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            ConfigError: names the setting and its value.
        """
        for name in ("local_hostname", "metadata_server"):
            if not getattr(self, name):
                raise fail(name, "", "it must be given")
        for name in ("global_segment_size", "local_buffer_size"):
            if getattr(self, name) < 0:
                raise fail(name, getattr(self, name), "must not be negative")
        if self.protocol not in PROTOCOLS:
            raise fail("protocol", self.protocol, "tcp or rdma")
        if not 0 <= self.client_http_port < 1 << 16:
            raise fail("client_http_port", self.client_http_port, "a port, 0 to 65535")
        self.offload  # noqa: B018 - raises

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Settings":
        """Return the settings of the dict form; sizes may be texts like "16MB".

        Raises:
            ConfigError: one is missing or wrong. Names that mean nothing here are logged.
        """
        known: dict[str, Any] = {}
        named = {OTHER_NAMES[name]: value for name, value in values.items() if name in OTHER_NAMES}
        named.update((name, value) for name, value in values.items() if name not in OTHER_NAMES)
        for name, value in named.items():
            if name in ("global_segment_size", "local_buffer_size"):
                known[name] = size_bytes(name, value)
            elif name in ("enable_ssd_offload", "enable_client_http_server"):
                known[name] = _truth(name, value)
            elif name == "client_http_port":
                known[name] = size_bytes(name, value)
            elif name in cls.__struct_fields__:
                known[name] = str(value)
            elif value not in (None, "", False, "false", "False", "0", 0):
                log.warning("mooncake.store: a setting that means nothing here", setting=name)
        missing = [name for name in ("local_hostname", "metadata_server") if name not in known]
        if missing:
            raise fail(missing[0], "", "it must be given")
        return cls(**known)

    @property
    def master(self) -> str:
        """The address of the metadata store, as core.metadata_open has it.

        Raises:
            ConfigError: it is no address.
        """
        text = self.master_server_addr or MASTER
        return check_metadata(text if "://" in text else f"tcp://{text}")

    @property
    def offload(self) -> Offload | None:
        """Where the segment's SSD tier may be; None: nobody named a place.

        Raises:
            ConfigError: a setting of it, or of the environment, makes no sense.
        """
        return Offload.of(self.enable_ssd_offload, self.ssd_offload_path, os.environ)

    @property
    def tenant(self) -> str:
        """Whose names ours are; the default tenant's need no label."""
        return "" if self.tenant_id in ("", TENANT) else self.tenant_id


def size_bytes(name: str, value: Any) -> int:
    """Return a size that is a number, or a text with a unit: "16MB", "1.5 gb"; 1 KB = 1024 bytes as upstream.

    Raises:
        ConfigError: it is neither.
    """
    match = _SIZE.fullmatch(str(value).strip().lower())
    if match is None or isinstance(value, bool):
        raise fail(name, value, "a number of bytes, or a text like 16MB or 1.5GB")
    unit = 1024 ** _UNITS.index(match[2])
    # a float has 53 bits: whole numbers stay whole
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def _truth(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in TRUE + FALSE + ("none",):
        raise fail(name, value, "true or false")
    return text in TRUE


def node_of(hostname: str) -> str:
    """Return the name of the store node of the client that calls itself `hostname`, "host:port"."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", hostname).lstrip("._-")[:63]


def segment_name(node: str) -> str:
    """Return the hostname of the client whose store node is `node`; another node's own name."""
    return re.sub(r"-(\d{1,5})$", r":\1", node)


class Mounted(NamedTuple):
    """A segment that was given to the pool besides the first one; `stack` ends it."""

    background: "Background"
    stack: contextlib.ExitStack


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


class Started:
    """Everything that exists from `setup` on."""

    def __init__(self, settings: Settings) -> None:
        """Start; the pool is known and the segment can be found by others then.

        Raises:
            ConfigError: a setting cannot work; PeerError: the master does not answer.
        """
        env = environment()
        self.settings = settings
        master = settings.master
        _check_listens(master)
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.engine = open_engine(settings.local_hostname, settings.protocol, settings.rdma_devices, env)
            stack.callback(self.engine.close)
            self.hostname = self.engine.name
            size = settings.global_segment_size
            config = self._segment(env, stack, node_of(self.hostname), size) if size else None
            self.background = Background(master, config, settings.offload)
            stack.callback(self.background.close)
            self.background.start()
            self.pool = Pool(master, engine=self.engine, sure=True)
            stack.callback(self.pool.close)
            self._stack = stack.pop_all()
        self._env = env
        self._master = master
        self._mounted: dict[str, Mounted] = {}
        self._leaving: dict[str, tuple[Mounted, threading.Timer]] = {}
        self._lock = threading.Lock()

    def mount(self, capacity_bytes: int, memory: FileMemory | None = None) -> str:
        """Give more memory to the pool, of a file or new; return the name of that segment.

        Raises:
            ConfigError: it cannot be had; PeerError: the master does not answer.
        """
        with contextlib.ExitStack() as stack, self._lock:
            name = f"{node_of(self.hostname)[:50]}-{secrets.token_hex(4)}"
            config = self._segment(self._env, stack, name, capacity_bytes)
            background = Background(self._master, config, memory=memory)
            stack.callback(background.close)
            background.start()
            self._mounted[name] = Mounted(background, stack.pop_all())
            return name

    def unmount(self, name: str, grace_s: float = 0.0) -> bool:
        """Take a mounted segment back, with what is in it; return whether it was there.

        With `grace_s` it takes nothing more from now on, can be read for so long, and goes then by itself.
        """
        with self._lock:
            mounted = self._mounted.pop(name, None)
            if mounted is None:
                return False
            if grace_s > 0:
                timer = threading.Timer(grace_s, self._end, (name,))
                timer.daemon = True
                self._leaving[name] = (mounted, timer)
        if grace_s <= 0:
            mounted.stack.close()
            return True
        try:
            mounted.background.retire()
        except PeerError as error:
            log.warning("mooncake.store: the segment has ended before its grace", name=name, error=str(error))
        timer.start()
        return True

    def _end(self, name: str) -> None:
        """End a segment whose grace is over (idempotent)."""
        with self._lock:
            mounted, timer = self._leaving.pop(name, (None, None))
        if mounted is not None and timer is not None:
            timer.cancel()
            mounted.stack.close()

    @property
    def tenant(self) -> str:
        """Whose names ours are, and who pays; where tenants need quotas the default one is like any other."""
        strict = self.background.master_settings.multi_tenants
        return self.settings.tenant or (TENANT if strict else "")

    def unmount_ssd(self) -> bool:
        """See Background."""
        return self.background.unmount_ssd()

    def on_close(self, callback: Callable[[], object]) -> None:
        """Have `callback` called by `close`, before anything else ends."""
        self._stack.callback(callback)

    def close(self) -> None:
        """End all of it (idempotent)."""
        for name in list(self._mounted):
            self.unmount(name)
        for name in list(self._leaving):
            self._end(name)
        self._stack.close()

    def _segment(
        self, env: EngineEnv, stack: contextlib.ExitStack, node: str, capacity_bytes: int
    ) -> StoreConfig:
        run_dir = tempfile.mkdtemp(prefix="mooncake-")
        stack.callback(shutil.rmtree, run_dir, ignore_errors=True)
        own = self.engine.config
        return StoreConfig(
            node=node,
            capacity_bytes=capacity_bytes,
            run_dir=run_dir,
            endpoint=f"tcp://{own.host}:*",
            events=f"tcp://{own.host}:*",
            transfer=msgspec.structs.replace(own, port=0, secret=env.secret),
        )


def _check_listens(master: str) -> None:
    """Say at once, not after a deadline, that nobody is there.

    Raises:
        PeerGone: no process listens at the address.
    """
    if not master.startswith("tcp://"):
        return
    try:
        host, port = split_name(master.removeprefix("tcp://"))
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        raise PeerGone(f"no master at {master}: {error}: start mooncake_master") from error
