"""The file of tenants on disk: read at start, and again whenever its text changes."""

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path

import structlog

from conductor.tenants import Quotas, Tenants, parse_tenants
from mooncake.core.errors import ConfigError

log = structlog.get_logger(__name__)

POLL_S = 5.0
"""How often the file is read: it is short, and where it is mounted nobody can send signals."""
SIZE_BYTES_MAX = 1 << 20
"""A thousand tenants with keys take a fifth of it."""


class TenantsFile:
    """Remembers the text that holds, and the one it saw last: somebody may be writing it just now."""

    def __init__(self, path: str, environ: Mapping[str, str] | None = None) -> None:
        """`environ`: where the keys are that the file names; None = this process's."""
        self._path = Path(path)
        self._environ = os.environ if environ is None else environ
        self._text: str | None = None  # that holds, or was refused
        self._seen: str | None = None

    def read(self) -> Tenants:
        """Return what it says.

        Raises:
            ConfigError: it cannot be read, or something in it is wrong.
        """
        self._text = self._read()
        return parse_tenants(self._text, self._environ, str(self._path))

    def changed(self) -> Tenants | None:
        """Return what it says now, if it said so twice in a row; None: as before, or as wrong as before.

        Raises:
            ConfigError: it has changed to something wrong, or is gone; told once.
        """
        try:
            text = self._read()
        except ConfigError:
            if self._text is None:
                return None
            self._text = self._seen = None
            raise
        before, self._seen = self._seen, text
        if text == self._text or text != before:
            return None
        self._text = text
        return parse_tenants(text, self._environ, str(self._path))

    def _read(self) -> str:
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise ConfigError(f"tenants {self._path}: {error.strerror}: name a file that is there") from None
        if len(data) > SIZE_BYTES_MAX:
            raise ConfigError(f"tenants {self._path}: {len(data)} bytes: at most {SIZE_BYTES_MAX}")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"tenants {self._path}: no UTF-8 at byte {error.start}") from None


async def follow(file: TenantsFile, quotas: Quotas, poll_s: float = POLL_S) -> None:
    """Let `quotas` know each change of the file, until cancelled; a wrong one is logged, no more."""
    while True:
        await asyncio.sleep(poll_s)
        try:
            tenants = await asyncio.to_thread(file.changed)
        except ConfigError as error:
            log.error("tenants.refused", reason=str(error), advice="the entries of before still hold")
            continue
        if tenants is not None:
            quotas.change(time.monotonic(), tenants)
            log.info("tenants.changed", listed=len(tenants))
