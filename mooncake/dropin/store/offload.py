"""The SSD tier of a client's segment, by upstream's settings.

    enable_ssd_offload, ssd_offload_path            of setup
    MOONCAKE_OFFLOAD_FILE_STORAGE_PATH              the path, if setup names none
    MOONCAKE_OFFLOAD_TOTAL_SIZE_LIMIT_BYTES         how much of the disk it may take

Under the path each process has a directory of its own, `tier-0`, `tier-1`, ...: the ranks of one engine are
given the same path. A process takes the first one that no other has, and finds there what an earlier one
left. The file of a tier takes all its room at once, so that no later write can lack it, and keeps that size.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import structlog

from kvstore.header import HEADER_BYTES
from kvstore.ssd.file import FILE_NAME
from kvstore.ssd.layout import SEGMENT_BYTES, SEGMENTS_MIN
from kvstore.ssd.model import SsdConfig
from mooncake.core.config import fail
from mooncake.core.errors import ConfigError

PATH_ENV = "MOONCAKE_OFFLOAD_FILE_STORAGE_PATH"
LIMIT_ENV = "MOONCAKE_OFFLOAD_TOTAL_SIZE_LIMIT_BYTES"
PATH = "/data/file_storage"
"""Upstream's default."""
LIMIT_BYTES = 2 << 40
"""Upstream's default."""
FREE_SHARE = 0.5
"""Of what is free on the disk, for a tier that is made without a limit: others live there, too."""
PROCESSES_MAX = 64
"""That share one path: more than a host has accelerators."""
SEGMENT_BYTES_MIN = 1 << 20
"""Of tiers with a small limit, as tests have: objects beyond it stay in memory."""
SEGMENTS_WANTED = 8
"""A tier loses one of its segments at a time to make room: not a third of all."""
ENDS_BYTES = 2 * HEADER_BYTES
"""The pages at both ends of a tier's file."""
NODE = "mooncake-store"
"""Whose the files are: a client's own name changes with its port, what is on the disk need not."""

log = structlog.get_logger(__name__)


class Offload(msgspec.Struct, frozen=True):
    """Where a tier may be, and how large: `limit_bytes` 0 = nobody said."""

    path: str
    wanted: bool
    limit_bytes: int = 0

    @classmethod
    def of(cls, wanted: bool, path: str, env: Mapping[str, str]) -> "Offload | None":
        """Return what setup and the environment say; None: neither wants a tier nor names a place for one.

        Raises:
            ConfigError: names the setting that makes no sense.
        """
        named = path or env.get(PATH_ENV, "").strip()
        if not wanted and not named:
            return None
        name = "ssd_offload_path" if path else PATH_ENV
        if named and not named.startswith("/"):
            raise fail(name, named, "must be an absolute path")
        return cls(named or PATH, wanted, _limit(env))

    @contextlib.contextmanager
    def tier(self) -> Iterator[SsdConfig]:
        """Have a directory under the path for as long as this lasts; yield the settings of a tier there.

        Raises:
            ConfigError: the path is none, or every directory under it is taken.
        """
        if not os.access(self.path, os.W_OK | os.X_OK) or not Path(self.path).is_dir():
            raise fail("ssd_offload_path", self.path, "must be a directory that exists and can be written to")
        for number in range(PROCESSES_MAX):
            home = Path(self.path, f"tier-{number}")
            lock = os.open(f"{home}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            try:
                yield self._config(home)
            finally:
                os.close(lock)
            return
        raise ConfigError(f"ssd_offload_path={self.path!r}: {PROCESSES_MAX} processes use it already")

    def _config(self, home: Path) -> SsdConfig:
        file = home / FILE_NAME
        if file.exists():
            capacity_bytes = file.stat().st_size
            if self.limit_bytes and not _fits(capacity_bytes, self.limit_bytes):
                log.warning(
                    "mooncake.store: an ssd tier keeps its size", path=str(file), bytes=capacity_bytes
                )
        else:
            disk = os.statvfs(self.path)
            free_bytes = int(disk.f_bavail * disk.f_frsize * FREE_SHARE)
            capacity_bytes = self.limit_bytes or min(LIMIT_BYTES, free_bytes)
        return SsdConfig(
            node=NODE,
            path=str(home),
            capacity_bytes=capacity_bytes,
            segment_bytes=segment_bytes_of(capacity_bytes),
        )


def segment_bytes_of(capacity_bytes: int) -> int:
    """Return the segments of a tier: a power of two, and the same for the size that its file has then."""
    wanted = max(SEGMENT_BYTES_MIN, (capacity_bytes - ENDS_BYTES) // SEGMENTS_WANTED)
    return min(SEGMENT_BYTES, 1 << (wanted.bit_length() - 1))


def _fits(capacity_bytes: int, limit_bytes: int) -> bool:
    return capacity_bytes <= limit_bytes <= capacity_bytes + segment_bytes_of(limit_bytes) + ENDS_BYTES


def _limit(env: Mapping[str, str]) -> int:
    text = env.get(LIMIT_ENV, "").strip()
    if not text:
        return 0
    least = SEGMENTS_MIN * SEGMENT_BYTES_MIN + ENDS_BYTES
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise fail(LIMIT_ENV, text, f"a number of bytes, at least {least}")
    return int(text)
