"""Our `mooncake.store`, called as upstream's: master, an owner of the segment or none, and this client."""

import sys
from pathlib import Path
from typing import Any

import structlog

from benchmarks.store_peers.upstream import MASTER_PORT, Upstream

TTL_S = 3_600.0
"""A contender is stopped while others have their turn: that is no death."""


class DropIn(Upstream):
    """The same calls of the same names; checksums are made and verified."""

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Contender."""
        _prepare()
        super().__init__(pool_bytes, folder)

    @classmethod
    def own(cls, pool_bytes: int) -> tuple[dict[str, Any], object]:
        """See Upstream."""
        _prepare()
        return super().own(pool_bytes)

    @classmethod
    def master(cls) -> list[str]:
        """See Upstream."""
        flags = [f"--rpc_port={MASTER_PORT}", "--metrics_port=0", f"--client_ttl={TTL_S:g}"]
        return [sys.executable, "-m", "mooncake.dropin.master.command", *flags]


class DropInEmbedded(DropIn):
    """See UpstreamEmbedded."""

    embedded = True


def _prepare() -> None:
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
