"""redis over a unix socket: SET and GET of a block, MSET and MGET of a batch.

A GET leaves a new bytes object instead of filling registered memory: in redis' favour, no second copy.
"""

import importlib
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.transfer_peers.worker import CHECK_BYTES, Contender, pool

START_S_MAX = 10.0
ANSWER_S_MAX = 30.0
FILL_BYTES = 16 << 20
"""Per MSET while keys are filled in."""


class Redis(Contender):
    """The owner is redis-server."""

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Contender."""
        super().__init__(pool_bytes, folder)
        self.local = pool(pool_bytes)
        self.filled_size = 0
        path = self.folder / "redis.sock"
        settings = ["--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
        argv = ["redis-server", *settings]
        self.owner = subprocess.Popen(argv, stdout=subprocess.DEVNULL, text=True, cwd=self.folder)
        redis = importlib.import_module("redis")
        end_s = time.monotonic() + START_S_MAX
        while not path.exists() and self.owner.poll() is None and time.monotonic() < end_s:
            time.sleep(0.02)
        self.client: Any = redis.Redis(unix_socket_path=str(path), socket_timeout=ANSWER_S_MAX)
        self.client.ping()

    def fill(self, size: int) -> None:
        """Have every slot of `size` bytes hold a value, and nothing else."""
        if size == self.filled_size:
            return
        self.client.flushall()
        part = min(self.pool_bytes, max(size, FILL_BYTES))
        for start in range(0, self.pool_bytes, part):
            at = range(start, start + part, size)
            self.client.mset({f"{n}": self.local[n : n + size].data for n in at})
        self.filled_size = size

    def plan(self, op: str, size: int, local: list[int], remote: list[int]) -> Callable[[], object]:
        """See Contender."""
        self.fill(size)
        keys = [f"{at}" for at in remote]
        pages = [self.local[at : at + size].data for at in local]
        if op == "READ":
            return lambda: self.client.get(keys[0]) if len(keys) == 1 else self.client.mget(keys)
        pairs = dict(zip(keys, pages, strict=True))
        return lambda: self.client.set(keys[0], pages[0]) if len(keys) == 1 else self.client.mset(pairs)

    def check(self) -> None:
        """See Contender."""
        self.local[:CHECK_BYTES] = 7
        self.plan("WRITE", CHECK_BYTES, [0], [CHECK_BYTES])()
        if self.plan("READ", CHECK_BYTES, [0], [CHECK_BYTES])() != b"\x07" * CHECK_BYTES:
            raise RuntimeError("what came back is not what was sent")
