"""Mooncake's C++ store over TCP: master, a process that owns the segment or none, and this client.

Its processes listen on every address: run it in its own network.
"""

import importlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.store_peers.base import Go, StoreContender

MASTER_PORT = 50051
LOCAL_BUFFER_BYTES = 512 << 20
SEGMENT_POOLS = 7
START_S_MAX = 20.0


def client(name: str, segment_bytes: int, buffer_bytes: int) -> Any:
    """Return a store client, owner of `segment_bytes`."""
    store = importlib.import_module("mooncake.store").MooncakeDistributedStore()
    master = f"127.0.0.1:{MASTER_PORT}"
    code = store.setup(name, "P2PHANDSHAKE", segment_bytes, buffer_bytes, "tcp", "", master)
    if code:
        raise RuntimeError(f"setup: {code}")
    return store


class Upstream(StoreContender):
    """put_from and get_into for one object, batch_* for more; memory is registered."""

    embedded: ClassVar[bool] = False
    """Whether the segment is this client's, not another process's."""

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Contender."""
        super().__init__(pool_bytes, folder)
        self.start_owner()
        segment_bytes = SEGMENT_POOLS * pool_bytes if self.embedded else 0
        self.store = client("127.0.0.1", segment_bytes, LOCAL_BUFFER_BYTES)
        self.base = self.local.ctypes.data
        if code := self.store.register_buffer(self.base, self.local.size):
            raise RuntimeError(f"register_buffer: {code}")

    @classmethod
    def own(cls, pool_bytes: int) -> tuple[dict[str, Any], object]:
        """Start the master and, unless the client does, own the segment."""
        master = subprocess.Popen(cls.master(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end_s = time.monotonic() + START_S_MAX
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", MASTER_PORT)) == 0:
                    break
            if time.monotonic() > end_s or master.poll() is not None:
                raise RuntimeError("the master did not start")
            time.sleep(0.05)
        owner = None if cls.embedded else client("127.0.0.1", SEGMENT_POOLS * pool_bytes, 16 << 20)
        return {}, (owner, master)

    @classmethod
    def master(cls) -> list[str]:
        """Return the master's command line."""
        binary = shutil.which("mooncake_master", path=str(Path(sys.executable).parent))
        if binary is None:
            raise RuntimeError("no mooncake_master")
        return [binary, f"--rpc_port={MASTER_PORT}"]

    def put(self, keys: Sequence[str], at: Sequence[int], size: int) -> Go:
        """See StoreContender."""
        places, sizes = [self.base + start for start in at], [size] * len(keys)
        names = list(keys)

        def go() -> None:
            if len(names) == 1:
                codes = [self.store.put_from(names[0], places[0], size)]
            else:
                codes = self.store.batch_put_from(names, places, sizes)
            if any(codes):
                raise RuntimeError(f"put: {codes}")

        return go

    def get(self, keys: Sequence[str], at: Sequence[int], size: int) -> Go:
        """See StoreContender."""
        places, sizes = [self.base + start for start in at], [size] * len(keys)
        names = list(keys)

        def go() -> None:
            if len(names) == 1:
                got = [self.store.get_into(names[0], places[0], size)]
            else:
                got = self.store.batch_get_into(names, places, sizes)
            if got != sizes:
                raise RuntimeError(f"get: {got}")

        return go

    def exists(self, keys: Sequence[str]) -> Go:
        """See StoreContender."""
        names = list(keys)

        def go() -> None:
            if len(names) == 1:
                found = [self.store.is_exist(names[0])]
            else:
                found = self.store.batch_is_exist(names)
            if found != [1] * len(names):
                raise RuntimeError(f"exists: {found}")

        return go

    def remove(self, keys: Sequence[str]) -> None:
        """See StoreContender."""
        for key in keys:
            self.store.remove(key, True)


class UpstreamEmbedded(Upstream):
    """The segment is in the process that puts and gets, as most integrations have it."""

    embedded = True
