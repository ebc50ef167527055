"""Our `mooncake.store`, called as upstream's: master, a process that owns the segment, and this client."""

import socket
import subprocess
import sys
import time
from typing import Any

import structlog

from benchmarks.store_peers.upstream import MASTER_PORT, SEGMENT_POOLS, START_S_MAX, Upstream, client
from mooncake.dropin.store import start as store_start

TTL_S = 3_600.0
"""A contender is stopped while others have their turn: that is no death."""


class DropIn(Upstream):
    """The same calls of the same names; checksums are made and verified."""

    @classmethod
    def own(cls, pool_bytes: int) -> tuple[dict[str, Any], object]:
        """Start the master and own the segment."""
        structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
        argv = [
            sys.executable,
            "-m",
            "mooncake.dropin.master.command",
            f"--rpc_port={MASTER_PORT}",
            "--metrics_port=0",
        ]
        master = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end_s = time.monotonic() + START_S_MAX
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", MASTER_PORT)) == 0:
                    break
            if time.monotonic() > end_s or master.poll() is not None:
                raise RuntimeError("the master did not start")
            time.sleep(0.05)
        store_start.SEGMENT_TTL_S = TTL_S
        return {}, (client("127.0.0.1", SEGMENT_POOLS * pool_bytes, 16 << 20), master)
