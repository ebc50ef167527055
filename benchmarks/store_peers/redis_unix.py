"""redis over a unix socket, with its C parser: SET, GET and EXISTS; for more than one key the quickest way.

That is MGET for GET, and for PUT either MSET or a pipeline of SETs.
"""

from collections.abc import Sequence

from benchmarks.store_peers.base import Go, StoreContender
from benchmarks.transfer_peers.redis_unix import Redis as Server

PIPELINE_BYTES = 64 << 10
"""From here on a pipeline takes a third to a half of MSET's time; below, up to four times as long."""


class Redis(StoreContender, Server):
    """The server is started as benchmarks.transfer starts it."""

    def put(self, keys: Sequence[str], at: Sequence[int], size: int) -> Go:
        """See StoreContender."""
        pages = [self.local[start : start + size].data for start in at]
        if len(keys) == 1:
            return lambda: self.client.set(keys[0], pages[0])
        pairs = dict(zip(keys, pages, strict=True))
        if size < PIPELINE_BYTES:
            return lambda: self.client.mset(pairs)

        def go() -> None:
            with self.client.pipeline(transaction=False) as pipeline:
                for key, page in pairs.items():
                    pipeline.set(key, page)
                pipeline.execute()

        return go

    def get(self, keys: Sequence[str], at: Sequence[int], size: int) -> Go:  # noqa: ARG002
        """See StoreContender."""

        def go() -> None:
            values = [self.client.get(keys[0])] if len(keys) == 1 else self.client.mget(keys)
            if any(value is None or len(value) != size for value in values):
                raise RuntimeError("an object is gone")

        return go

    def exists(self, keys: Sequence[str]) -> Go:
        """See StoreContender."""

        def go() -> None:
            if self.client.exists(*keys) != len(keys):
                raise RuntimeError("an object is gone")

        return go

    def first_byte(self, key: str, size: int) -> int:  # noqa: ARG002
        """See StoreContender."""
        return int(self.client.get(key)[0])

    def remove(self, keys: Sequence[str]) -> None:
        """See StoreContender."""
        self.client.delete(*keys)
