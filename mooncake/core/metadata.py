"""Where processes of one cluster find each other: a small store with leases and watches.

It holds membership and configuration, never per-block metadata (DESIGN 4): tens of keys, a few
writes a second. `MetadataStore` is the whole interface; backends are `metadata_memory` (embedded
default), `metadata_client` (the embedded one over rpc), and etcd later. What every backend must
do is written down in tests/unit/core/test_metadata_contract.py.

Revisions count changes of one life of the store; `epoch` names that life. A store that came back
empty has another epoch, so a watcher can never mistake its young revisions for its own past.
"""

from collections.abc import AsyncIterator
from typing import Protocol

from mooncake.core.metadata_messages import MetaChanges, MetaEntries, MetaPutResult

POLL_S = 1.0
"""A watch yields at least this often: it bounds how late a lost server is noticed."""


class MetadataStore(Protocol):
    """A key-value store with prefix reads, compare-and-put, leases and watches.

    Every call may raise PeerError (the store is away: retry) or CapacityError (a limit).
    """

    async def get(self, prefix: str) -> MetaEntries:
        """Return all entries whose key starts with `prefix`, sorted by key, at one revision."""
        ...

    async def put(
        self, key: str, value: bytes, lease_id: int = 0, if_revision: int | None = None
    ) -> MetaPutResult:
        """Write `key`; it lives as long as `lease_id` (0 = for ever).

        Args:
            key: up to 512 characters.
            value: up to 64 KiB.
            lease_id: from `grant`; the key leaves the lease it was under before.
            if_revision: write only if this is the key's revision (0 = the key is absent).

        Raises:
            RequestError: the lease is gone, or key or value are too large.
        """
        ...

    async def delete(self, key: str) -> None:
        """Remove one key; an absent key is fine."""
        ...

    async def grant(self, ttl_s: float) -> int:
        """Return a new lease that ends `ttl_s` after its last `keep_alive`."""
        ...

    async def keep_alive(self, lease_id: int) -> bool:
        """Refresh a lease; False = it is gone, with its keys."""
        ...

    async def revoke(self, lease_id: int) -> None:
        """End a lease and remove its keys; an unknown lease is fine."""
        ...

    def watch(self, prefix: str, from_revision: int, epoch: str = "") -> AsyncIterator[MetaChanges]:
        """Yield changes under `prefix` after `from_revision` in order, without gap or repeat.

        Batches without changes come at least every POLL_S seconds, so that a caller can act on
        time. A batch with `compacted` is the last one: history is gone or `epoch` is over, list
        again. PeerError ends the iteration; watching on from the last revision is safe.
        """
        ...

    async def close(self) -> None:
        """Release local resources; leases are left to expire."""
        ...
