"""The methods of the store that give memory to the pool and take it back, by upstream's names."""

from collections.abc import Sequence
from typing import Any

import structlog

from kvstore.store.config import FileMemory
from mooncake.core.errors import MooncakeError
from mooncake.dropin.store.answers import answers_code
from mooncake.dropin.store.calls import Calls
from mooncake.dropin.store.types import INTERNAL, INVALID_PARAMS, OK
from transfer.segment import PAGE_BYTES

log = structlog.get_logger(__name__)


class SegmentForms:
    """Besides the segment of `setup`; every method may be called from any thread."""

    _calls: Calls | None

    def _need(self) -> Calls:
        raise NotImplementedError

    def allocate_and_mount_segment(
        self,
        size: int,
        protocol: str = "tcp",  # noqa: ARG002 - the pool's engine has its own
        location: str = "",  # noqa: ARG002 - host memory
    ) -> dict[str, Any]:
        """Give `size` more bytes to the pool: {"ret", "segment_ids", "allocated_size"}; ret -1: refused."""
        try:
            name = self._need().started.mount(size)
        except MooncakeError as error:
            log.error("mooncake.store: not mounted", size=size, reason=str(error))
            return {"ret": INTERNAL, "segment_ids": [], "allocated_size": 0}
        return {"ret": OK, "segment_ids": [name], "allocated_size": size}

    def mount_segment(
        self,
        path: str,
        size: int,
        offset: int = 0,
        protocol: str = "tcp",  # noqa: ARG002 - the pool's engine has its own
        location: str = "",  # noqa: ARG002 - host memory
    ) -> dict[str, Any]:
        """Give memory of a file to the pool, whole pages of it: {"ret", "segment_ids"}; ret -1: refused.

        What the file has there is overwritten. It must not be cut while it is mounted: that ends the process.
        """
        if not size and self._calls is not None:
            return {"ret": OK, "segment_ids": []}
        try:
            started = self._need().started
            whole = size // PAGE_BYTES * PAGE_BYTES
            name = started.mount(whole, FileMemory(path, offset))
        except MooncakeError as error:
            log.error("mooncake.store: not mounted", path=path, size=size, reason=str(error))
            return {"ret": INTERNAL, "segment_ids": []}
        return {"ret": OK, "segment_ids": [name]}

    def unmount_and_free_segment(self, segment_ids: Sequence[str], grace_period_seconds: int = 0) -> int:
        """Take mounted segments back, with what is in them; -1: one is none of ours."""
        return self.unmount_segment(segment_ids, grace_period_seconds)

    def unmount_segment(self, segment_ids: Sequence[str], grace_period_seconds: int = 0) -> int:
        """As unmount_and_free_segment: for the grace period they are read as ever, and take nothing more."""
        calls = self._calls
        if calls is None:
            return INVALID_PARAMS
        if grace_period_seconds < 0:
            raise TypeError(f"grace_period_seconds={grace_period_seconds}: must not be negative")
        done = [calls.started.unmount(one, grace_period_seconds) for one in segment_ids]
        return OK if all(done) else INTERNAL

    @answers_code
    def unmount_local_disk_segment(self, grace_period_seconds: int = 0) -> int:  # noqa: ARG002
        """Do without the SSD tier from now on: what only it has leaves the pool until the next start."""
        self._need().started.unmount_ssd()
        return OK

    def get_offload_rpc_read_count(self) -> int:
        """Return 0: no read goes by another client's disk."""
        return 0
