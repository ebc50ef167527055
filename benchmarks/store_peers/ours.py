"""kvstore.client.pool: the store is a process of its own, the caller a plain thread of another."""

import asyncio
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog

from benchmarks.store_peers.base import Go, StoreContender
from kvstore.client.model import Result
from kvstore.client.pool import Pool
from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from mooncake.core.messages import StoreRecord

SEGMENT_POOLS = 7
"""Five sizes filled in, and room for what is being put."""
START_S_MAX = 30.0


class Ours(StoreContender):
    """put and get_into; checksums are made and verified."""

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Contender."""
        super().__init__(pool_bytes, folder)
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=open(os.devnull, "w")))  # noqa: SIM115
        record = msgspec.convert(self.start_owner(), StoreRecord)
        self.pool = Pool(stores=[record])

    @classmethod
    def own(cls, pool_bytes: int) -> tuple[dict[str, Any], object]:
        """Serve a store as `mooncake store` does, on a loop of its own."""
        started: list[StoreRecord] = []
        ready = threading.Event()

        async def serve() -> None:
            folder = tempfile.mkdtemp(dir=sys.argv[-1])  # the benchmark's own, which removes it
            config = StoreConfig(node="bench", capacity_bytes=SEGMENT_POOLS * pool_bytes, run_dir=folder)
            started.append(await StoreService(config).start())
            ready.set()
            await asyncio.Event().wait()

        threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
        if not ready.wait(START_S_MAX):
            raise RuntimeError("the store did not start")
        return msgspec.to_builtins(started[0]), None

    def put(self, keys: Sequence[str], at: Sequence[int], size: int) -> Go:
        """See StoreContender."""
        buffers = [self.local[start : start + size] for start in at]
        return lambda: _all(self.pool.put(keys, buffers))

    def get(self, keys: Sequence[str], at: Sequence[int], size: int) -> Go:
        """See StoreContender."""
        targets = [self.local[start : start + size] for start in at]
        return lambda: _all(self.pool.get_into(keys, targets))

    def exists(self, keys: Sequence[str]) -> Go:
        """See StoreContender."""

        def look() -> None:
            if not all(self.pool.exists(keys)):
                raise RuntimeError("an object is gone")

        return look

    def remove(self, keys: Sequence[str]) -> None:
        """See StoreContender."""
        self.pool.remove(keys)


class View(Ours):
    """Nothing is copied: views of the store's memory, verified."""

    def get(self, keys: Sequence[str], at: Sequence[int], size: int) -> Go:  # noqa: ARG002
        """See StoreContender."""

        def look() -> None:
            with self.pool.view(keys) as held:
                if None in held.views:
                    raise RuntimeError("an object is gone")

        return look

    def first_byte(self, key: str, size: int) -> int:  # noqa: ARG002
        """See StoreContender."""
        with self.pool.view([key]) as held:
            assert held.views[0] is not None
            return held.views[0][0]


def _all(results: Sequence[Result]) -> None:
    for result in results:
        if result.outcome != "done":
            raise RuntimeError(str(result))
