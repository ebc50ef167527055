"""What exists from `setup` of `mooncake.store` on: an engine, a segment, the pool's client."""

import contextlib
import secrets
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import structlog

from kvstore.client.pool import Pool
from kvstore.store.config import FileMemory, StoreConfig
from mooncake.core.errors import PeerError, PeerGone
from mooncake.dropin.engine.env import EngineEnv
from mooncake.dropin.engine.start import environment, open_engine
from mooncake.dropin.store.background import Background
from mooncake.dropin.store.settings import TENANT, Settings, node_of
from transfer.config import split_name

CONNECT_S = 2.0

log = structlog.get_logger(__name__)


class Mounted(NamedTuple):
    """A segment that was given to the pool besides the first one; `stack` ends it."""

    background: Background
    stack: contextlib.ExitStack


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
